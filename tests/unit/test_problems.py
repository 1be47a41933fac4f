"""What is wrong is told by one function: `pgbridge status` prints in red what the console has at its top."""

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import click
import pytest

from bridge.commands.status import status_text
from bridge.postgres.problems import Problem, problems
from bridge.postgres.status import Bridge, Guards, SinkPosition, Status, Waiting, WorkerStatus
from bridge.settings import Settings

NOW = datetime(2026, 2, 3, 14, 5, tzinfo=UTC)
POSITION = SinkPosition("events", 5, 0, 0, 0, True, None, 0.1, None, None)
BRIDGE = Bridge("shop", "host:1", NOW - timedelta(hours=1), 9, True, 0, (POSITION,))
GUARDS = Guards(0.1, 3.0, "pid 1", True, 1000, None, None, ())
WORKER = WorkerStatus("payments", 1, 2, 3, 0, 0, True, None)
WELL = Status(NOW, (BRIDGE,), GUARDS, Waiting(0, True, None), (WORKER,))

WRONG = {
    "nobody leads": replace(WELL, bridges=(replace(BRIDGE, leader=None),)),
    "a sink is lost": replace(
        WELL, bridges=(replace(BRIDGE, sinks=(replace(POSITION, problem="lost: gone", problem_seconds=75.0),)),)
    ),
    "dead letters of the outbox": replace(WELL, bridges=(replace(BRIDGE, dead_letters=3),)),
    "dead letters of a worker": replace(WELL, workers=(replace(WORKER, dead_letters=4),)),
    "held keys": replace(WELL, workers=(replace(WORKER, held_keys=2),)),
    "a long transaction": replace(WELL, guards=replace(GUARDS, oldest_transaction_seconds=4000.0)),
    "a full queue": replace(WELL, guards=replace(GUARDS, notification_queue_usage=0.6)),
    "held back": replace(WELL, guards=replace(GUARDS, held_back_by=("old", "older"))),
    "overdue": replace(WELL, scheduled=Waiting(3, True, NOW - timedelta(seconds=9))),
}


def red(status: Status, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """The lines of `pgbridge status` that are red: name and words."""
    monkeypatch.setattr("bridge.process.terminal.columns", lambda: 1000)
    text = status_text(Settings(name="shop"), None, status)
    lines = [click.unstyle(line) for line in re.findall(r"\x1b\[31m.*?\x1b\[0m", text)]
    return {(name.strip(), words) for name, words in (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines)}


@pytest.mark.parametrize("status", WRONG.values(), ids=WRONG)
def test_what_status_prints_in_red_is_what_the_console_calls_wrong(
    status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(problems(status, "shop"))
    assert found
    assert {(problem.field, problem.words) for problem in found} == red(status, monkeypatch)
    assert all(problem.mend for problem in found)


def test_where_all_is_well_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(problems(WELL, "shop")) == []
    assert red(WELL, monkeypatch) == set()


def test_a_bridge_that_has_never_run_is_a_problem() -> None:
    [problem] = problems(WELL, "other")
    assert problem == Problem("bridge other", "leader", "it has not run on this database yet", problem.mend)
    assert "pgbridge run" in problem.mend
