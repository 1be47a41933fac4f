"""One outage: told at its begin, when its kind changes, and at its end; waited out with growing delays."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs
from tenacity import wait_exponential, wait_exponential_jitter, wait_none, wait_random_exponential

from bridge.errors import DatabaseUnavailableError, LoginError, ReadOnlyServerError
from bridge.process.outage import Outage


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with capture_logs() as captured:
        yield captured


GONE = DatabaseUnavailableError("gone")


def test_an_outage_is_told_once_at_its_begin_and_once_at_its_end(lines: list[Any]) -> None:
    outage = Outage("sink", wait_none(), sink="events")
    outage.restored()
    assert lines == []
    for number in range(3):
        outage.lost(DatabaseUnavailableError(f"refused {number}"))
    outage.restored()
    outage.restored()
    lost, restored = lines
    assert lost == {"event": "sink.lost", "log_level": "warning", "sink": "events", "reason": "refused 0"}
    assert restored.pop("seconds") >= 0
    assert restored == {"event": "sink.restored", "log_level": "info", "sink": "events"}


def test_another_type_of_error_is_another_matter(lines: list[Any]) -> None:
    outage = Outage("postgres", wait_none())
    for error in (
        GONE,
        GONE,
        LoginError("wrong password"),
        LoginError("wrong password"),
        ReadOnlyServerError("standby"),
    ):
        outage.lost(error)
    outage.restored()
    outage.lost(GONE)
    assert [line["event"] for line in lines] == [
        "postgres.lost",
        "postgres.refusing",
        "postgres.refusing",
        "postgres.restored",
        "postgres.lost",
    ]


def test_health_says_what_is_lost_for_how_long_and_the_last_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    outage = Outage("sink", wait_none(), sink="events")
    assert outage.problem is None
    outage.lost(GONE)
    began = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: began + 12)
    assert outage.problem == "sink events: lost for 12 s: gone"
    outage.lost(LoginError("the login is refused"))
    assert outage.problem == "sink events: refusing for 12 s: the login is refused"
    assert outage.lasts
    outage.restored()
    assert outage.problem is None
    assert not outage.lasts


async def test_delays_grow_and_begin_anew_after_a_success() -> None:
    outage = Outage("postgres", wait_exponential(multiplier=0.001, max=0.004))
    assert [outage.delay(failures) for failures in (1, 2, 3, 4, 400)] == [0.001, 0.002, 0.004, 0.004, 0.004]
    for _ in range(3):
        outage.lost(GONE)
        await outage.wait()
    assert outage.failures == 3
    outage.restored()
    assert outage.failures == 0


@pytest.mark.parametrize(
    "backoff",
    [wait_exponential_jitter(multiplier=0.1, max=5.0, jitter=0.5), wait_random_exponential(multiplier=0.1, max=5.0)],
)
def test_delays_stay_in_their_bounds_after_an_outage_of_months(backoff: Any) -> None:
    outage = Outage("postgres", backoff)
    assert all(0 <= outage.delay(failures) <= 5.0 for failures in (1, 10, 10_000, 1_000_000))


async def test_a_stop_cuts_the_wait_short() -> None:
    outage, stop = Outage("postgres", wait_exponential(multiplier=60)), asyncio.Event()
    waiting = asyncio.create_task(outage.wait(stop))
    await asyncio.sleep(0)
    stop.set()
    async with asyncio.timeout(5):
        await waiting
        await outage.wait(stop)


async def test_a_call_is_made_again_until_it_is_answered(lines: list[Any]) -> None:
    outage, errors = Outage("database", wait_none(), worker="w"), [GONE, LoginError("no"), GONE]

    async def ask(number: int, *, times: int) -> int:
        if errors:
            raise errors.pop()
        return number * times

    assert await outage.outlast(ask, 7, times=2) == 14
    assert [line["event"] for line in lines] == [
        "database.lost",
        "database.refusing",
        "database.lost",
        "database.restored",
    ]
    assert {line["worker"] for line in lines} == {"w"}


async def test_other_errors_are_not_waited_out(lines: list[Any]) -> None:
    outage = Outage("database", wait_none())

    async def ask() -> None:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        await outage.outlast(ask)
    assert lines == []


async def test_an_outage_that_calls_share_is_told_once_and_its_delays_do_not_add_up(lines: list[Any]) -> None:
    outage = Outage("database", wait_exponential(multiplier=0.001, max=60))
    failing = dict.fromkeys(range(50), 3)

    async def ask(number: int) -> int:
        if failing[number]:
            failing[number] -= 1
            raise GONE
        return number

    async with asyncio.timeout(5):
        answers = await asyncio.gather(*(outage.outlast(ask, number) for number in range(50)))
    assert answers == list(range(50))
    assert [line["event"] for line in lines] == ["database.lost", "database.restored"]
