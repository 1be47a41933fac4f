"""Pruning: deletes what is settled and old, in chunks, and nothing else."""

import asyncio
from pathlib import Path

import psycopg

from bridge.postgres.prune import prune
from bridge.postgres.wire import Connection
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings
from tests.support.until import rows_become

OLD = "update bridge.outbox set created_at = now() - interval '2 days'"
CURSOR = (
    "insert into bridge.cursor (name, sink, mark, gaps, horizon, system_identifier) "
    "values (%s, 'events', %s, %s, '3', 1)"
)


async def pruned(dsn: str, *, after: int = 0, chunk: int = 10) -> tuple[int, int]:
    async with await Connection.connect(dsn, autocommit=True) as connection:
        return await prune(connection, 86400.0, after, chunk)


async def ids(dsn: str) -> list[object]:
    return [row[0] for row in await execute(dsn, "select id from bridge.outbox order by id")]


async def emit(dsn: str, count: int) -> None:
    await execute(dsn, "select bridge.emit('a', 'x') from generate_series(1, %s)", count)


async def test_only_what_is_old_and_settled_by_every_bridge_goes(bridge_database: str) -> None:
    await emit(bridge_database, 100)
    await execute(bridge_database, OLD + " where id <= 80")
    await execute(bridge_database, CURSOR, "ahead", 100, "{}")
    await execute(bridge_database, CURSOR, "behind", 60, "{[21,23),[50,51)}")
    assert (await pruned(bridge_database))[0] == 57
    # Those in gaps may have come late and be unsent; above 60 one bridge has not settled; above 80 they are young.
    assert await ids(bridge_database) == [21, 22, 50, *range(61, 101)]
    await execute(bridge_database, "update bridge.cursor set mark = 100, gaps = '{}'")
    assert (await pruned(bridge_database))[0] == 23
    assert await ids(bridge_database) == list(range(81, 101))


async def test_nothing_goes_that_some_sink_has_not_settled_or_holds(bridge_database: str) -> None:
    await emit(bridge_database, 20)
    await execute(bridge_database, OLD)
    await execute(bridge_database, CURSOR, "one", 20, "{}")
    await execute(bridge_database, CURSOR.replace("'events'", "'other'"), "one", 10, "{}")
    await execute(
        bridge_database, "update bridge.cursor set held = '{[3,4),[7,9)}', old_gaps = '{[5,6)}' where sink = 'other'"
    )
    assert await pruned(bridge_database) == (6, 2)
    assert await ids(bridge_database) == [3, 5, 7, 8, *range(11, 21)]


async def test_without_any_bridge_nothing_goes(bridge_database: str) -> None:
    await emit(bridge_database, 20)
    await execute(bridge_database, OLD)
    assert await pruned(bridge_database) == (0, 0)
    assert len(await ids(bridge_database)) == 20


async def test_the_next_round_finds_a_row_that_committed_late(bridge_database: str) -> None:
    async with await psycopg.AsyncConnection.connect(bridge_database) as late:
        await late.execute("select bridge.emit('late', 'x')")
        await emit(bridge_database, 30)
        await execute(bridge_database, OLD)
        await execute(bridge_database, CURSOR, "one", 31, "{[1,2)}")
        deleted, after = await pruned(bridge_database)
        assert (deleted, after) == (30, 0)
        await late.execute(OLD)
        await late.commit()
    assert await pruned(bridge_database, after=after) == (0, 0), "it is not settled yet"
    await execute(bridge_database, "update bridge.cursor set gaps = '{}'")
    assert (await pruned(bridge_database, after=after))[0] == 1


async def test_a_call_deletes_no_more_than_its_chunk(bridge_database: str) -> None:
    await emit(bridge_database, 50)
    await execute(bridge_database, OLD)
    await execute(bridge_database, CURSOR, "one", 50, "{}")
    call = "select deleted, next_after from bridge.prune(now() - interval '1 day', 20, %s)"
    assert await execute(bridge_database, call, 0) == [(20, 20)]
    assert await execute(bridge_database, call, 20) == [(20, 40)]
    assert await execute(bridge_database, call, 40) == [(10, 50)]


async def test_pruning_under_load_loses_nothing(bridge_database: str, messages: Messages, tmp_path: Path) -> None:
    count = 20_000
    text = settings(bridge_database, messages, '[outbox]\nretention = "0s"\npage_size = 100')

    async def produce() -> None:
        async with await psycopg.AsyncConnection.connect(bridge_database, autocommit=True) as connection:
            for start in range(0, count, 100):
                await connection.execute(
                    "select bridge.emit('load', n::text) from generate_series(%s::int, %s::int) n",
                    (start + 1, start + 100),
                )

    async def prune_all_the_while(done: asyncio.Event) -> int:
        total = after = 0
        async with await Connection.connect(bridge_database, autocommit=True) as connection:
            while not done.is_set():
                deleted, after = await prune(connection, 0.0, after, 50)
                total += deleted
                await asyncio.sleep(0.01)  # a pace: pruning without a rest takes the machine from what it runs beside
        return total

    with Daemon(tmp_path, text) as bridge:
        bridge.wait_for("bridge.leading")
        done = asyncio.Event()
        pruning = asyncio.create_task(prune_all_the_while(done))
        producing = asyncio.create_task(produce())
        taken = await messages.take(count, timeout=60)
        await producing
        assert sorted(int(message.body) for message in taken) == list(range(1, count + 1))
        await rows_become(bridge_database, "select backlog from bridge.status()", [(0,)])
        done.set()
        assert await pruning > 0
        assert bridge.stop() == 0


async def test_the_leader_prunes_by_itself(bridge_database: str, messages: Messages, tmp_path: Path) -> None:
    await emit(bridge_database, 30)
    await execute(bridge_database, OLD + " where id <= 20")
    await execute(bridge_database, CURSOR, "test", 30, "{}")
    text = settings(bridge_database, messages, '[outbox]\nretention = "1d"')
    with Daemon(tmp_path, text) as bridge:
        assert bridge.wait_for("outbox.pruned")["events"] == 20
        assert await ids(bridge_database) == list(range(21, 31))
