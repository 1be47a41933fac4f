"""A worker's rate on a real PostgreSQL: how its starts are spaced over processes, and what those leave that end."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import LiteralString

import psycopg
import pytest
from psycopg.rows import TupleRow
from tenacity import wait_none

from bridge.errors import DatabaseUnavailableError
from bridge.postgres.connection import connect
from bridge.process.outage import Outage
from bridge.settings import PostgresSettings
from tests.support.until import rows_become, until
from workers.rate import HORIZON, LATE, Rate

WORKER = "mail"
WAITING = """
select count(*) from pg_stat_activity where datname = current_database() and cardinality(pg_blocking_pids(pid)) > 0
"""


class Process:
    """A worker process' connection. `given` are the answers that it got, as seconds and whether reserved."""

    def __init__(self, connection: psycopg.AsyncConnection[TupleRow]) -> None:
        self.connection = connection
        self.given: list[tuple[float, bool]] = []
        self.asked = 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def query(self, query: LiteralString, *parameters: object) -> Sequence[TupleRow]:
        self.asked += 1
        await self.answers.wait()
        rows = await (await self.connection.execute(query, parameters)).fetchall()
        self.given += [(seconds, reserved) for seconds, reserved in rows]
        return rows

    @property
    def reserved(self) -> int:
        return sum(reserved for _, reserved in self.given)

    def rate(self, per_second: float) -> Rate:
        return Rate(WORKER, per_second, self.query, Outage("database", wait_none()))

    async def take(self, wanted: int, per_second: float) -> list[tuple[float, bool]]:
        """As another process would, whose answer is not waited for."""
        return [
            (row[0], row[1])
            for row in await self.query(
                "select seconds, reserved from bridge.rate_take(%s, %s, %s, %s)", WORKER, wanted, per_second, HORIZON
            )
        ]


@contextlib.asynccontextmanager
async def process(settings: PostgresSettings) -> AsyncIterator[Process]:
    connection = await connect(settings, "pgbridge-worker mail")
    try:
        yield Process(connection)
    finally:
        await connection.close()


@pytest.fixture
async def one(shop: PostgresSettings) -> AsyncIterator[Process]:
    async with process(shop) as opened:
        yield opened


def most_within(seconds: float, starts: Sequence[float]) -> int:
    """Most starts that any window of this length holds."""
    return max(sum(first <= start < first + seconds for start in starts) for first in starts)


async def begun(rate: Rate, count: int) -> list[float]:
    """When each of so many callers that wait at the same time began, in their order."""

    async def one() -> float:
        await rate.wait()
        return time.monotonic()

    return sorted(await asyncio.gather(*(one() for _ in range(count))))


async def test_two_processes_together_begin_as_often_as_allowed_and_never_more(shop: PostgresSettings) -> None:
    async with process(shop) as one, process(shop) as other:
        both = await asyncio.gather(begun(one.rate(100), 100), begun(other.rate(100), 100))
    starts = sorted([*both[0], *both[1]])
    # What was due before a window may be late by as much.
    assert most_within(1.0 - LATE, starts) <= 100
    assert 1.99 - LATE <= starts[-1] - starts[0] < 3.0
    # Neither has waited until the other was done.
    assert both[0][0] < both[1][-1]
    assert both[1][0] < both[0][-1]


async def test_starts_are_evenly_spaced_whoever_asks(shop: PostgresSettings) -> None:
    async with process(shop) as one, process(shop) as other:
        given = [await one.take(3, 20), await other.take(3, 20), await one.take(3, 20)]
    assert all(reserved for call in given for _, reserved in call)
    first, second, third = ([seconds for seconds, _ in call] for call in given)
    assert first == pytest.approx([0, 0.05, 0.1])
    # Later calls count from a later moment, so that the spaces between them look shorter.
    assert second[0] <= 0.15
    assert third[0] <= 0.3
    for call in (second, third):
        assert [later - earlier for earlier, later in pairwise(call)] == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize("begun_before", [False, True])
async def test_of_two_that_ask_at_the_same_moment_one_begins(
    shop: PostgresSettings, bridge_database: str, begun_before: bool
) -> None:
    async with process(shop) as one, process(shop) as other:
        if begun_before:
            await one.take(1, 1 / 3600)
            forward(bridge_database, -3600)
        async with one.connection.transaction():
            assert await one.take(1, 1 / 3600) == [(0, True)]
            asks = asyncio.create_task(other.take(1, 1 / 3600))
            await rows_become(bridge_database, WAITING, [(1,)])
        [(_, reserved)] = await asks
        assert not reserved


async def test_three_thirds_of_a_second_do_not_fit_into_one(one: Process) -> None:
    first, second = [seconds for seconds, reserved in await one.take(4, 3) if reserved]
    assert first == 0
    assert 1 / 3 < second < 1 / 3 + 1e-5


async def test_idle_time_earns_nothing(one: Process, bridge_database: str) -> None:
    await one.take(1, 10)
    forward(bridge_database, -3600)
    assert [seconds for seconds, _ in await one.take(3, 10)] == pytest.approx([0, 0.1, 0.2])


async def test_only_what_begins_soon_is_reserved_however_many_ask(one: Process, bridge_database: str) -> None:
    given = await one.take(1000, 10)
    assert sum(reserved for _, reserved in given) == 1 + 10 * HORIZON
    # The others come back when the next one can be reserved.
    [again] = {seconds for seconds, reserved in given if not reserved}
    assert again == pytest.approx(0.1)
    assert ahead(bridge_database) <= HORIZON


async def test_at_one_an_hour_a_process_that_dies_takes_nothing_with_it_but_its_own_start(
    shop: PostgresSettings, bridge_database: str
) -> None:
    async with process(shop) as dies:
        given = await dies.take(1000, 1 / 3600)
    assert [reserved for _, reserved in given] == [True, *[False] * 999]
    assert ahead(bridge_database) <= 0
    async with process(shop) as other:
        [(seconds, reserved)] = await other.take(1, 1 / 3600)
        assert not reserved
        assert seconds == pytest.approx(3600 - HORIZON, abs=60)
        # Nobody has the next one until it is near.
        forward(bridge_database, -3599.9)
        [(seconds, reserved)] = await other.take(1, 1 / 3600)
        assert reserved
        assert 0 <= seconds <= 0.1


async def test_another_rate_holds_at_once(one: Process, bridge_database: str) -> None:
    await one.take(1, 1 / 3600)
    await asyncio.wait_for(one.rate(100).wait(), 5)
    [(seconds, reserved)] = await one.take(1, 1 / 3600)
    assert not reserved
    assert seconds > 3500


async def test_a_clock_of_the_database_that_went_back_blocks_nobody(one: Process, bridge_database: str) -> None:
    await one.take(1, 10)
    forward(bridge_database, 86400)
    await asyncio.wait_for(begun(one.rate(10), 3), 10)
    assert ahead(bridge_database) <= 2 * HORIZON


async def test_who_gives_up_before_it_is_asked_for_reserves_nothing(one: Process) -> None:
    rate = one.rate(100)
    one.answers.clear()
    waiting = [asyncio.create_task(rate.wait())]
    await until(lambda: one.asked == 1, "the first asks")
    waiting += [asyncio.create_task(rate.wait()) for _ in range(19)]
    await asyncio.sleep(0)
    for task in waiting[10:]:
        task.cancel()
    await asyncio.wait(waiting[10:])
    one.answers.set()
    await asyncio.gather(*waiting[:10])
    assert one.reserved == 10
    assert all(task.cancelled() for task in waiting[10:])


async def test_who_gives_up_while_it_waits_leaves_the_others_alone(one: Process) -> None:
    rate = one.rate(20)
    waiting = [asyncio.create_task(rate.wait()) for _ in range(10)]
    await until(lambda: one.reserved == 10, "all are reserved")
    for task in waiting[1::2]:
        task.cancel()
    await asyncio.gather(*waiting[::2])
    assert one.reserved == 10


async def test_who_gives_up_while_its_request_is_on_its_way_leaves_the_next_alone(one: Process) -> None:
    rate = one.rate(20)
    one.answers.clear()
    first = asyncio.create_task(rate.wait())
    await until(lambda: one.asked == 1, "it asks")
    first.cancel()
    await asyncio.wait([first])
    next_one = asyncio.create_task(rate.wait())
    one.answers.set()
    await asyncio.wait_for(next_one, 10)
    assert one.reserved == 2


async def test_what_piled_up_while_a_process_stood_still_does_not_begin_at_once(one: Process) -> None:
    waiting = asyncio.create_task(begun(one.rate(20), 10))
    await until(lambda: one.reserved == 10, "all are reserved")
    time.sleep(1.0)  # not asyncio's: the process itself stands still
    went_on = time.monotonic()
    starts = await waiting
    after = [start for start in starts if start >= went_on]
    # Nothing is lost, and what had been due for longer than it may be late is spaced as if it were asked for now.
    assert len(starts) == 10
    assert one.reserved == 10 + len(after)
    assert after[-1] - after[0] > (len(after) - 1) * 0.05 - LATE


async def test_an_outage_of_the_database_is_waited_for(one: Process) -> None:
    failures = 3

    async def query(query: LiteralString, *parameters: object) -> Sequence[TupleRow]:
        nonlocal failures
        if failures:
            failures -= 1
            raise DatabaseUnavailableError("postgres.dsn: gone")
        return await one.query(query, *parameters)

    outage = Outage("database", wait_none())
    await asyncio.wait_for(Rate(WORKER, 10, query, outage).wait(), 10)
    assert one.reserved == 1
    assert not outage.lasts


def forward(dsn: str, seconds: float) -> None:
    """As if the last start had been this much later."""
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute("update bridge.rates set last_at = last_at + make_interval(secs => %s)", [seconds])


def ahead(dsn: str) -> float:
    """Seconds until the last start that is reserved."""
    with psycopg.connect(dsn) as admin:
        row = admin.execute(
            "select extract(epoch from last_at - clock_timestamp())::float8 from bridge.rates"
        ).fetchone()
    assert row is not None
    return float(row[0])
