"""Several bridges of one name: one reads, the others stand by, and the lead passes on without a loss."""

import asyncio
import signal
import time
from pathlib import Path

import psycopg
import pytest

from bridge.errors import DatabaseUnavailableError
from bridge.settings import OutboxSettings
from bridge.sources import outbox as outbox_module
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings, stored_mark
from tests.support.outbox import READERS, lead, open_outbox
from tests.support.until import rows_become, until

TERMINATE_LEADER = """
select pg_terminate_backend(pid) from pg_locks
where locktype = 'advisory' and granted and database = (select oid from pg_database where datname = current_database())
"""
LOAD = "select bridge.emit('load', n::text, 'key-' || n %% 50) from generate_series({}, {}) n order by n"


def pair(tmp_path: Path, text: str) -> tuple[Daemon, Daemon]:
    return Daemon(tmp_path / "one", text), Daemon(tmp_path / "two", text)


async def test_two_bridges_give_no_duplicate_in_20000_events_without_a_fault(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    text = settings(bridge_database, messages)
    one, two = pair(tmp_path, text)
    with one, two:
        one.wait_for("bridge.started")
        two.wait_for("bridge.started")
        taking = asyncio.create_task(messages.take(20_000, 120.0))
        for start in range(1, 20_001, 1000):
            await execute(bridge_database, LOAD.format(start, start + 999))
        taken = await taking
        await execute(bridge_database, "select bridge.emit('load', 'the last')")
        (last,) = await messages.take(1)
        assert last.body == b"the last"
        assert sorted(int(message.body) for message in taken) == list(range(1, 20_001))
        leaders = [daemon for daemon in (one, two) if any(x["action"] == "bridge.leading" for x in daemon.lines())]
        assert len(leaders) == 1
        assert [one.stop(), two.stop()] == [0, 0]


async def test_a_standby_takes_over_within_3_s_of_a_kill_and_at_once_on_sigterm(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    one, two = pair(tmp_path, settings(bridge_database, messages))
    with one:
        one.wait_for("bridge.leading")
        with two:
            two.wait_for("bridge.started")
            began = time.monotonic()
            one.kill()
            two.wait_for("bridge.leading")
            assert time.monotonic() - began < 3.0
            one.start()
            one.wait_for("bridge.started")
            began = time.monotonic()
            assert two.stop() == 0
            one.wait_for("bridge.leading")
            # Less than the second after which a standby tries by itself would still pass once in a while by luck.
            assert time.monotonic() - began < 0.9
            await execute(bridge_database, "select bridge.emit('load', 'x')")
            assert len(await messages.take(1)) == 1


async def test_a_frozen_leader_stores_nothing_when_it_wakes_and_stands_by(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    text = settings(bridge_database, messages, "[outbox]\npage_size = 100")
    one, two = pair(tmp_path, text)
    with one, two:
        one.wait_for("bridge.started")
        two.wait_for("bridge.started")
        await until(lambda: any(x["action"] == "bridge.leading" for d in (one, two) for x in d.lines()))
        first, second = (one, two) if any(x["action"] == "bridge.leading" for x in one.lines()) else (two, one)
        taking = asyncio.create_task(messages.take_distinct(20_000))
        loading = asyncio.create_task(execute(bridge_database, LOAD.format(1, 20_000)))
        await loading
        await until(lambda: messages.seen > 500)
        first.signal(signal.SIGSTOP)
        # What idle_session_timeout does 15 s later.
        await execute(bridge_database, TERMINATE_LEADER)
        second.wait_for("bridge.leading")
        await taking
        await until(lambda: stored_mark(bridge_database) == 20_000)
        look = "select mark, gaps::text, stored_at, who from bridge.cursor join bridge.leader using (name)"
        stored = await execute(bridge_database, look)
        first.signal(signal.SIGCONT)
        first.wait_for("postgres.restored")
        assert [x["action"] for x in first.lines()].count("bridge.leading") == 1
        assert await execute(bridge_database, look) == stored
        assert [first.stop(), second.stop()] == [0, 0]


async def test_a_bridge_that_stands_by_or_waits_holds_no_snapshot(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    one, two = pair(tmp_path, settings(bridge_database, messages))
    with one, two:
        one.wait_for("bridge.started")
        two.wait_for("bridge.started")
        idle: set[int] = set()
        pids: set[int] = set()
        async with asyncio.timeout(10):
            # A look may fall into one of their short statements, or find the session with which one tried its bell;
            # what counts is that none of the four that stay goes on holding one.
            while len(pids) != 4 or not pids <= idle:
                rows = await execute(
                    bridge_database,
                    "select pid, backend_xmin, state from pg_stat_activity "
                    "where application_name like 'pgbridge%%' and datname = current_database()",
                )
                pids = {int(str(pid)) for pid, _, _ in rows}
                idle |= {int(str(pid)) for pid, xmin, state in rows if xmin is None and state == "idle"}


async def test_the_server_ends_the_session_of_a_leader_that_is_frozen_within_a_page(
    bridge_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "_FROZEN_AFTER", 1.0)
    monkeypatch.setattr(outbox_module, "_PULSE", 0.1)
    session = (await open_outbox(bridge_database)).session
    try:
        await session.execute("select bridge.take_lead('test', 'me')")
        # More than the sockets' buffers hold, and nobody reads it.
        session.pgconn.send_query(b"select repeat('x', 1000000) from generate_series(1, 100)")
        await rows_become(
            bridge_database,
            "select 1 from pg_locks where locktype = 'advisory' "
            "and database = (select oid from pg_database where datname = current_database())",
            [],
        )
    finally:
        await session.close()


async def test_a_session_that_lost_the_lead_can_store_nothing(bridge_database: str) -> None:
    old, new = [await open_outbox(bridge_database) for _ in range(2)]
    try:
        assert await old.try_to_lead(READERS)
        assert not await new.try_to_lead(READERS)
        await execute(bridge_database, "select bridge.emit('load', 'x')")
        page = await old.sources[0].read(10)
        await execute(bridge_database, TERMINATE_LEADER)
        await lead(new)
        await old.sources[0].settle(page.position, ())
        with pytest.raises(DatabaseUnavailableError):
            await old.store()
        assert stored_mark(bridge_database) == 0
    finally:
        await old.session.close()
        await new.session.close()


async def test_a_store_that_is_interrupted_by_the_stop_is_made_up_for_when_leaving(bridge_database: str) -> None:
    outbox = await open_outbox(bridge_database)
    waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%%store_cursor%%'"
    try:
        source = await lead(outbox)
        await execute(bridge_database, LOAD.format(1, 10))
        page = await source.read(10)
        with psycopg.connect(bridge_database) as other:
            other.execute("select from bridge.cursor for update")
            keeping = asyncio.create_task(outbox.keep(dict))
            await source.settle(page.position, ())
            await rows_become(bridge_database, waits, [(1,)])
            keeping.cancel()
            await asyncio.wait([keeping])
            other.rollback()
        await outbox.leave()
        assert stored_mark(bridge_database) == 10
    finally:
        await outbox.session.close()


async def test_a_page_in_flight_is_read_again_by_the_next_leader(bridge_database: str) -> None:
    await execute(bridge_database, LOAD.format(1, 10))
    pages = []
    for _ in range(2):
        outbox = await open_outbox(bridge_database, OutboxSettings(page_size=10))
        pages.append((await (await lead(outbox)).read(100)).events)
        await outbox.session.close()
    assert pages[0] == pages[1]
