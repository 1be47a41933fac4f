"""Gaps that wait for a transaction which stays open: when they are looked into, and what is stored of them."""

import asyncio
from typing import Any

import psycopg
import pytest

from bridge.sources import log
from bridge.sources.gaps import MANY
from bridge.sources.outbox import Outbox, OutboxSource
from tests.support.messages import execute
from tests.support.outbox import lead, open_outbox

# Each number is emitted, and every other one rolled back.
ALTERNATING = """
do $$ begin
    for n in 1..%s loop
        perform bridge.emit('a', n::text);
        begin
            perform bridge.emit('a', 'never');
            raise division_by_zero;
        exception when division_by_zero then null;
        end;
    end loop;
end $$
"""
STORED = "select mark, gaps::text, old_gaps::text from bridge.cursor where sink = 'events'"


async def payloads(source: OutboxSource, count: int) -> list[str]:
    """Reads so many events, and settles and stores what was read."""
    found: list[str] = []
    while len(found) < count:
        page = await source.read(10_000)
        found += [event.payload.decode() for event in page.events]
        await source.settle(page.position, ())
        await source.store()
    return found


async def gaps_under(writer: psycopg.AsyncConnection[Any], dsn: str, source: OutboxSource) -> None:
    """The writer stays open, and above its event there are so many gaps that they are old at once."""
    await writer.execute("select bridge.emit('a', 'late')")
    await execute(dsn, ALTERNATING % (MANY + 10))
    assert len(await payloads(source, MANY + 10)) == MANY + 10
    await execute(dsn, "select bridge.emit('a', 'next')")
    assert await payloads(source, 1) == ["next"]


@pytest.fixture
async def outbox(bridge_database: str) -> Any:
    outbox = await open_outbox(bridge_database)
    yield outbox
    await outbox.session.close()


async def test_old_gaps_are_not_looked_into_while_who_may_fill_them_stays_open(
    bridge_database: str, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await lead(outbox)
    asked: list[tuple[Any, ...]] = []
    fetch_all = log.fetch_all

    async def fetch(connection: Any, query: str, values: tuple[Any, ...]) -> Any:
        if "read_page" in query:
            asked.append(values)
        return await fetch_all(connection, query, values)

    async with await psycopg.AsyncConnection.connect(bridge_database) as writer:
        await gaps_under(writer, bridge_database, source)
        monkeypatch.setattr(log, "fetch_all", fetch)
        await execute(bridge_database, "select bridge.emit('a', 'fresh')")
        assert await payloads(source, 1) == ["fresh"]
        (looked,) = asked
        assert len(looked[1]) < 100, "a gap or two are recent"
        await writer.commit()
    assert await payloads(source, 1) == ["late"]


async def test_old_gaps_are_written_when_they_change_and_looked_into_by_the_next_leader(
    bridge_database: str, outbox: Outbox
) -> None:
    source = await lead(outbox)
    async with await psycopg.AsyncConnection.connect(bridge_database) as writer:
        await gaps_under(writer, bridge_database, source)
        ((mark, gaps, old_gaps),) = await execute(bridge_database, STORED)
        assert len(str(gaps)) < 100
        assert str(old_gaps).count("[") > MANY

        # What is not written stays, whatever it is.
        await execute(bridge_database, "update bridge.cursor set old_gaps = '{[1,2)}'")
        await execute(bridge_database, "select bridge.emit('a', 'fresh')")
        assert await payloads(source, 1) == ["fresh"]
        ((_, _, unchanged),) = await execute(bridge_database, STORED)
        assert unchanged == "{[1,2)}"
        await execute(bridge_database, "update bridge.cursor set old_gaps = %s", old_gaps)

        await outbox.leave()
        await outbox.session.close()
        again = await open_outbox(bridge_database)
        try:
            await writer.commit()
            assert await payloads(await lead(again), 1) == ["late"]
            # All who might fill them have ended: with the next horizon they are forgotten.
            await execute(bridge_database, "select bridge.emit('a', n::text) from generate_series(1, 3) n")
            await payloads(again.sources[0], 3)
            ((later, gaps, old_gaps),) = await execute(bridge_database, STORED)
            assert int(str(later)) > int(str(mark))
            assert (gaps, old_gaps) == ("{}", "{}")
        finally:
            await again.session.close()


async def test_late_rows_in_very_many_gaps_come_in_order_and_before_what_lies_above(
    bridge_database: str, outbox: Outbox
) -> None:
    """More gaps than one page looks into, each of which gets its row at once."""
    source = await lead(outbox)
    count = 2 * log._GAPS_AT_ONCE
    async with (
        await psycopg.AsyncConnection.connect(bridge_database) as late,
        await psycopg.AsyncConnection.connect(bridge_database, autocommit=True) as other,
    ):
        await late.execute(
            f"declare numbers cursor for select bridge.emit('late', n::text) from generate_series(1, {count}) n"
        )
        # The ids of both alternate.
        for _ in range(20):
            await late.execute(f"fetch {count // 20} from numbers")
            await other.execute("select bridge.emit('a', 'x')")
        assert await payloads(source, 20) == ["x"] * 20
        await late.commit()
        await other.execute("select bridge.emit('a', 'last')")
        assert await payloads(source, count + 1) == [*map(str, range(1, count + 1)), "last"]


async def test_the_longer_a_store_takes_the_less_often_it_happens(bridge_database: str, outbox: Outbox) -> None:
    source = await lead(outbox)
    pauses = []
    for _ in range(20):  # since on a busy machine some take long
        assert await emitted_and_stored(bridge_database, source) == ["1"]
        pauses.append(outbox.store_pause)
    assert 0.05 <= min(pauses) < 0.3
    await execute(
        bridge_database,
        "create function take_long() returns trigger language plpgsql as "
        "'begin perform pg_sleep(0.03); return new; end'",
    )
    await execute(
        bridge_database, "create trigger long before update on bridge.cursor for each row execute function take_long()"
    )
    assert await emitted_and_stored(bridge_database, source) == ["1"]
    assert 0.3 <= outbox.store_pause <= 1.0


async def test_a_store_that_waits_for_the_session_is_not_taken_for_a_slow_one(
    bridge_database: str, outbox: Outbox
) -> None:
    """Behind a page of megabytes: what had been settled meanwhile was stored up to a second late."""
    source = await lead(outbox)
    pauses = []
    for _ in range(5):  # since on a busy machine some take long
        await execute(bridge_database, "select bridge.emit('a', '1')")
        page = await source.read(10)
        await source.settle(page.position, ())
        await asyncio.gather(outbox.session.rows("select pg_sleep(0.1)::text"), source.store())
        pauses.append(outbox.store_pause)
    assert min(pauses) < 0.3


async def emitted_and_stored(dsn: str, source: OutboxSource) -> list[str]:
    await execute(dsn, "select bridge.emit('a', '1')")
    return await payloads(source, 1)
