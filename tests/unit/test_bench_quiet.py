"""When the machine counts as quiet, and what becomes of a round in which it was not."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping

import pytest

from tests.bench import quiet
from tests.bench.latency import percentile
from tests.bench.quiet import Disturbance, Reading, disturbance
from tests.bench.results import Row, as_json, table
from tests.bench.rounds import Plan, interleave, order_of, take_turns

START = Reading(total=5_000, busy=3_000, ours=1_000, stolen=40, kernel={2: 300, 9: 700})


def later(
    *, foreign: int = 0, ours: int = 0, stolen: int = 0, kernel: Mapping[int, int] = START.kernel, total: int = 1_000
) -> Reading:
    """A reading after so many ticks of everything."""
    busy = START.busy + foreign + ours
    return Reading(START.total + total, busy, START.ours + ours, START.stolen + stolen, kernel)


def readings(*shares: float) -> Callable[[], Reading]:
    """A machine where other programs take these shares of the processors, measurement by measurement."""

    def look() -> Iterator[Reading]:
        for share in shares:
            yield START
            yield later(foreign=round(share * 1_000))

    found = look()
    return lambda: next(found)


def counted() -> Callable[[], float]:
    """A contender that gives 1, 2, 3, ..."""
    values = iter(range(1, 100))
    return lambda: float(next(values))


def test_what_is_busy_and_not_ours_is_somebody_elses() -> None:
    assert disturbance(START, later(foreign=200, ours=700, stolen=20)) == Disturbance(foreign=0.2, steal=0.02)
    assert disturbance(START, later(foreign=20, stolen=80)) == Disturbance(foreign=0.02, steal=0.08)


@pytest.mark.parametrize(
    "after", [later(foreign=50), later(stolen=50), later(ours=1_000), later(foreign=-30, ours=500)]
)
def test_a_machine_is_quiet_up_to_the_bounds_however_busy_we_are(after: Reading) -> None:
    assert disturbance(START, after) is None


def test_nobody_follows_the_same_one_in_every_round() -> None:
    orders = [order_of(["a", "b", "c", "d"], turn) for turn in range(4)]
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in orders)
    before = {name: {order[order.index(name) - 1] for order in orders if order[0] != name} for name in "abcd"}
    assert all(len(names) > 1 for names in before.values()), before


def test_the_kernels_threads_are_nobodys_also_when_one_ends_with_all_that_it_did() -> None:
    assert disturbance(START, later(foreign=200, kernel={2: 400, 11: 60})) is None
    assert disturbance(START, later(foreign=200, kernel={2: 320})) == Disturbance(foreign=0.18, steal=0.0)


def test_a_short_measurement_is_not_judged_by_a_few_ticks() -> None:
    assert disturbance(START, later(foreign=10, total=20)) is None
    assert disturbance(START, later(foreign=11, total=20)) is not None
    assert disturbance(START, START) is None


def test_children_are_ours_while_they_run_and_after_they_ended() -> None:
    before = quiet.read()
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    wait = "import sys\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", burn + wait], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        running = quiet.read()
    ended = quiet.read()
    ticks = 0.25 * os.sysconf("SC_CLK_TCK")
    assert running.ours - before.ours >= ticks
    assert ended.ours >= running.ours
    assert ended.total > before.total
    assert ended.busy > before.busy


def test_a_disturbed_round_is_repeated_for_all_contenders_and_leaves_nothing_behind() -> None:
    # The second round's second contender is disturbed, once.
    look = readings(0.0, 0.01, 0.0, 0.3, 0.0, 0.0)
    found = interleave(Plan(2, repeats=2, look=look), {"ours": counted(), "peer": counted()})
    assert found.values == {"ours": [1.0, 3.0], "peer": [1.0, 3.0]}
    assert found.not_quiet == ""


def test_beyond_the_last_repeat_a_round_counts_and_its_rows_say_so() -> None:
    look = readings(0.5, 0.4, 0.3, 0.0)
    found = interleave(Plan(3, repeats=1, look=look), {"ours": counted()})
    assert found.values == {"ours": [2.0, 3.0, 4.0]}
    told = "round 1 (other programs 40%, steal 0%), round 2 (other programs 30%, steal 0%)"
    row = found.row("r", "ms")
    assert row.not_quiet == found.each(lambda value: -value).not_quiet == told
    assert as_json(row)["not_quiet"] == told
    other = found.row("s", "ms")
    assert table([row, other, Row("t", "ms", [1.0])]).splitlines()[-1] == f"not quiet: {told}: r; s"
    assert as_json(Row("t", "ms", [1.0]))["not_quiet"] is None


def test_a_round_is_told_with_the_worst_that_its_contenders_met() -> None:
    found = interleave(Plan(1, look=readings(0.1, 0.6, 0.0)), {name: counted() for name in ("a", "b", "c")})
    assert found.not_quiet == "round 1 (other programs 60%, steal 0%)"


def test_without_repeats_a_disturbed_round_counts_at_once() -> None:
    found = interleave(Plan(1, look=readings(0.5)), {"ours": counted()})
    assert found.values == {"ours": [1.0]}
    assert found.not_quiet != ""


def test_the_machine_is_told_as_not_quiet_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    interleave(Plan(1, repeats=1, look=readings(0.5, 0.0)), {"ours": counted()})
    told = capsys.readouterr().err
    assert "round 1: ours: the machine was not quiet: other programs 50%, steal 0%" in told
    assert "round 1 is repeated; 0 repeats are left" in told


def test_a_contender_that_fails_in_a_disturbed_round_is_not_tried_again() -> None:
    def fails() -> float:
        raise RuntimeError("no broker")

    # The one that fails is looked at before, and not after.
    looks = iter([START, later(foreign=500), START, START, later()])
    found = interleave(Plan(1, repeats=1, look=lambda: next(looks)), {"ours": counted(), "broken": fails})
    assert found.values == {"ours": [2.0], "broken": []}
    assert found.errors == {"broken": "RuntimeError: no broker"}


def test_contenders_may_measure_several_things_at_once() -> None:
    def both() -> tuple[float, float]:
        return 3.0, 4.0

    found = take_turns(Plan(2, look=readings(0, 0)), {"ours": both}, lambda pair: pair[0])
    assert found.each(lambda pair: pair[0]).row("r", "ms").ours == [3.0, 3.0]
    assert found.each(lambda pair: pair[1]).row("r", "ms").ours == [4.0, 4.0]


def test_a_measurement_without_its_value_is_a_failure_of_its_contender() -> None:
    def nothing() -> list[float]:
        return []

    def shown(values: list[float]) -> float:
        return percentile(values, 0.5)

    looks = readings(0, 0, 0)
    found = take_turns(Plan(2, look=looks), {"ours": nothing, "peer": lambda: [2.0]}, shown)
    assert found.errors == {"ours": "ValueError: no event arrived"}
    assert found.values == {"ours": [], "peer": [[2.0], [2.0]]}


@pytest.mark.parametrize(
    ("load", "share", "told"),
    [
        (0.2, 0.0, ""),
        (2.5, 0.0, "load average 2.50, nothing else at this moment"),
        (0.2, 0.4, "load average 0.20, other programs 40%, steal 0%"),
    ],
)
def test_a_machine_that_is_not_at_rest_before_the_first_round_is_told(
    monkeypatch: pytest.MonkeyPatch, load: float, share: float, told: str
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert quiet.at_rest(readings(share), seconds=0.0) == told
