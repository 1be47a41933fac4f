"""Scheduled events, `emit(at => ...)`: each gets into the log once, in order and when it is due, or is cancelled."""

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
from psycopg import AsyncConnection

from bridge.postgres.schema import migrate
from bridge.sources import scheduled as module
from bridge.sources.scheduled import Schedule
from tests.support.commands import command, json_of
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings
from tests.support.metrics import get
from tests.support.outbox import lead, open_outbox
from tests.support.servers import PostgresServer, free_port
from tests.support.until import rows_become, until

RESTING = "[outbox]\npoll_interval = 60"
"""Only what wakes the bridge lets it look in time."""
MANY = """
select bridge.emit('due', n::text, at => {}, key => 'key-' || n %% 50) from generate_series({}, {}) n order by n
"""
LOGGED = "select payload::int from bridge.outbox where topic = 'due' order by id"


@asynccontextmanager
async def schedule(dsn: str, poll_interval: float = 0.05) -> AsyncIterator[Schedule]:
    """What the bridge that leads moves events with, doing so in the background."""
    outbox = await open_outbox(dsn)
    await lead(outbox)
    made = Schedule(outbox.session, poll_interval)
    moving = asyncio.create_task(made.move_for_ever())
    try:
        yield made
    finally:
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)
        await outbox.session.close()


async def logged(dsn: str) -> list[int]:
    """The numbers in the log, in its order."""
    return [int(str(number)) for (number,) in await execute(dsn, LOGGED)]


async def all_moved(dsn: str) -> None:
    await rows_become(dsn, "select count(*) from bridge.scheduled", [(0,)])


def in_order_of_keys(numbers: list[int]) -> bool:
    return all(own == sorted(own) for key in range(50) for own in [[n for n in numbers if n % 50 == key]])


async def test_an_event_is_sent_when_it_is_due_and_a_sleeping_bridge_wakes_for_it(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    with Daemon(tmp_path, settings(bridge_database, messages, RESTING)) as bridge:
        bridge.wait_for("bridge.leading")
        emit = (
            "select bridge.emit('due', %s, at => clock_timestamp() + %s::interval, key => 'k', headers => '{\"a\": 1}')"
        )
        await execute(bridge_database, emit, "hour", "1 hour")
        # The bridge sleeps until then, and must hear of one that comes before; that one's time wakes it by itself.
        [(event_id,)] = await execute(bridge_database, emit, "soon", "1.5 s")
        [(due,)] = await execute(bridge_database, "select at from bridge.scheduled where payload = 'soon'")
        assert await logged_topics(bridge_database) == []
        (taken,) = await messages.take(1, timeout=20)
        assert isinstance(due, datetime)
        assert -0.01 < (datetime.now(UTC) - due).total_seconds() < 10
        assert (taken.body, taken.message_id, taken.headers["a"]) == (b"soon", str(event_id), "1")
        assert datetime.fromisoformat(str(taken.headers["cloudEvents_time"])) >= due, "its time is that of its move"
        await rows_become(bridge_database, "select payload from bridge.scheduled", [("hour",)])
        assert bridge.stop() == 0


async def logged_topics(dsn: str) -> list[tuple[object, ...]]:
    return await execute(dsn, "select topic from bridge.outbox")


async def test_ten_thousand_that_are_due_in_one_moment_are_sent_in_order(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    with Daemon(tmp_path, settings(bridge_database, messages)) as bridge:
        bridge.wait_for("bridge.leading")
        await execute(bridge_database, MANY.format("now() + interval '1 hour'", 1, 10_000))
        await execute(bridge_database, "update bridge.scheduled set at = now()")
        taken = await messages.take(10_000)
        assert bridge.stop() == 0
    assert in_order_of_keys([int(message.body) for message in taken])
    assert sorted(int(message.body) for message in taken) == list(range(1, 10_001))


async def test_kills_of_the_leader_while_it_moves_lose_nothing_and_repeat_nothing_in_the_log(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    text = settings(bridge_database, messages)
    one, two = Daemon(tmp_path / "one", text), Daemon(tmp_path / "two", text)
    count = 6000
    with one, two:
        leader, other = one, two
        await until(lambda: any(x["action"] == "bridge.leading" for d in (one, two) for x in d.lines()))
        if not any(x["action"] == "bridge.leading" for x in one.lines()):
            leader, other = two, one
        for start in range(1, count, 1500):
            await execute(bridge_database, MANY.format("now() + interval '1 hour'", start, start + 1499))
            before = len(await logged(bridge_database))
            # One is due every millisecond, so that a kill falls into a move or between two.
            await execute(
                bridge_database,
                "update bridge.scheduled set at = interval '1 ms' * ((payload::int - 1) %% 1500) + ("
                "  select greatest(now(), max(at)) from bridge.scheduled where at < now() + interval '30 minutes') "
                "where at > now() + interval '30 minutes'",
            )
            await until(lambda before=before: grown(bridge_database, before))  # type: ignore[misc]
            leader.kill()
            other.wait_for("bridge.leading")
            leader.start()
            leader.wait_for("bridge.started")
            leader, other = other, leader
        await all_moved(bridge_database)
        numbers = await logged(bridge_database)
        assert sorted(numbers) == list(range(1, count + 1))
        assert in_order_of_keys(numbers)
        taken = await messages.take_distinct(count)
        first = list(dict.fromkeys(int(message.body) for message in taken))
        assert in_order_of_keys(first)
        assert [one.stop(), two.stop()] == [0, 0]


async def grown(dsn: str, before: int) -> bool:
    return len(await logged(dsn)) > before


async def test_each_of_many_cancelled_when_due_is_either_cancelled_or_sent(bridge_database: str) -> None:
    count = 3000
    await execute(bridge_database, MANY.format("clock_timestamp() + interval '1 hour'", 1, count))
    cancelled: list[int] = []

    async def cancel_those_about_to_go(seed: int) -> None:
        chosen = random.Random(seed)
        async with await AsyncConnection.connect(bridge_database, autocommit=True) as connection:
            look = (
                "select payload::int, event_id from bridge.scheduled where at < clock_timestamp() + interval '2 ms' "
                "order by at, id offset %s limit 1"
            )
            while await (await connection.execute("select 1 from bridge.scheduled limit 1")).fetchone():
                row = await (await connection.execute(look, (chosen.randrange(3),))).fetchone()
                if row is None:
                    continue
                cursor = await connection.execute("select bridge.cancel(%s)", row[1:])
                if await cursor.fetchone() == (True,):
                    cancelled.append(row[0])

    async with schedule(bridge_database):
        await execute(
            bridge_database,
            "update bridge.scheduled set at = clock_timestamp() + interval '1 ms' * payload::int",
        )
        await asyncio.gather(*map(cancel_those_about_to_go, range(4)))
        await all_moved(bridge_database)
    sent = await logged(bridge_database)
    assert sorted([*cancelled, *sent]) == list(range(1, count + 1))
    assert min(len(cancelled), len(sent)) > 50, "neither side always won"


async def test_what_somebody_is_cancelling_holds_its_key_and_nothing_else(
    bridge_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 20)
    await execute(bridge_database, MANY.format("clock_timestamp() + interval '10 s' + interval '1 ms' * n", 1, 1000))
    await execute(bridge_database, "update bridge.scheduled set at = at - interval '12 s'")
    async with await AsyncConnection.connect(bridge_database) as canceller:
        # More than one move takes, and before all others.
        await canceller.execute("select bridge.cancel(event_id) from bridge.scheduled where payload::int <= 30")
        async with schedule(bridge_database):
            held = {number for number in range(1, 1001) if number % 50 in range(1, 31)}
            await until(lambda: grown(bridge_database, 1000 - 600 - 1))
            # They are looked at again and again; whoever is not behind them in a key has gone.
            assert set(await logged(bridge_database)) == set(range(1, 1001)) - held
            await canceller.rollback()
            await all_moved(bridge_database)
    numbers = await logged(bridge_database)
    assert sorted(numbers) == list(range(1, 1001))
    assert in_order_of_keys(numbers)


async def test_what_becomes_due_while_the_database_is_down_is_sent_afterwards(
    server_folder: Path, unique: str, messages: Messages, tmp_path: Path
) -> None:
    with PostgresServer(server_folder / unique) as server:
        dsn = server.create_database("shop")
        migrate(dsn)
        with Daemon(tmp_path, settings(dsn, messages)) as bridge:
            bridge.wait_for("bridge.leading")
            await execute(dsn, MANY.format("clock_timestamp() + interval '1 s' + interval '1 ms' * n", 1, 1000))
            await asyncio.to_thread(server.kill)
            began = time.monotonic()
            await asyncio.to_thread(bridge.wait_for, "postgres.lost")
            await until(lambda: time.monotonic() - began > 2.0)
            await asyncio.to_thread(server.start)
            taken = await messages.take_distinct(1000)
            assert in_order_of_keys(list(dict.fromkeys(int(message.body) for message in taken)))
            assert sorted(await logged(dsn)) == list(range(1, 1001))
            assert bridge.stop() == 0


async def test_bridges_of_several_names_move_each_event_once_and_in_order(bridge_database: str) -> None:
    await execute(bridge_database, MANY.format("clock_timestamp() + interval '300 ms' * (n / 1000)", 1, 6000))
    sessions = [(await open_outbox(bridge_database)).session for _ in range(3)]
    moving = [asyncio.create_task(Schedule(session, 0.05).move_for_ever()) for session in sessions]
    await all_moved(bridge_database)
    for task in moving:
        assert not task.done()
        task.cancel()
    await asyncio.gather(*moving, return_exceptions=True)
    for session in sessions:
        await session.close()
    numbers = await logged(bridge_database)
    assert sorted(numbers) == list(range(1, 6001))
    assert in_order_of_keys(numbers)


@pytest.fixture
def listener(bridge_database: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    with psycopg.connect(bridge_database, autocommit=True) as connection:
        connection.execute("listen bridge_scheduled")
        yield connection


async def test_only_what_is_due_before_all_others_wakes_the_bridge(
    bridge_database: str, listener: psycopg.Connection[tuple[object, ...]]
) -> None:
    def heard() -> int:
        """NOTIFYs so far; ours comes behind all that were sent before."""
        listener.execute("notify bridge_scheduled, 'ours'")
        count = 0
        for note in listener.notifies():
            if note.payload == "ours":
                break
            count += 1
        return count

    emit = "select bridge.emit('t', 'x', at => now() + %s::interval)"
    await execute(bridge_database, emit, "1 hour")
    assert heard() == 1
    await execute(bridge_database, emit, "2 hours")
    await execute(bridge_database, emit, "-1 hours")
    assert heard() == 0
    await execute(bridge_database, emit, "30 minutes")
    assert heard() == 1
    await execute(bridge_database, "update bridge.scheduled set at = now() - interval '1 hour'")
    await execute(bridge_database, emit, "3 hours")
    assert heard() == 1, "what is past is about to go"
    async with await AsyncConnection.connect(bridge_database) as preparing:
        await preparing.execute("set local bridge.doorbell = off")
        await preparing.execute(emit, ("1 minute",))
        await preparing.commit()
    assert heard() == 0, "a transaction that is to be prepared may not notify"


@pytest.fixture
def config(bridge_database: str, messages: Messages, tmp_path: Path) -> str:
    return str(Daemon(tmp_path, settings(bridge_database, messages)).config)


async def test_commands_schedule_list_follow_and_cancel_an_event(bridge_database: str, config: str) -> None:
    of = ("--config", config)
    emit = ("emit", "shop.reminder", '{"n": 1}', "--key", "k", "--header", "a=b")
    _, said = await command(*emit, "--at", "2099-01-01T00:00:00Z", *of, expect=2)
    assert "an event of topic 'shop.reminder' cannot wait until 2099-01-01 00:00:00+00; 10 years are allowed" in said
    out, _ = await command(*emit, "--at", "2h", *of)
    event_id = out.strip()
    [(other_id,)] = await execute(
        bridge_database, "select bridge.emit('other', 'x', at => now() + interval '1 year')::text"
    )
    [(sent_id,)] = await execute(bridge_database, "select bridge.emit('other', 'x')::text")

    [found] = await json_of("scheduled", "list", "--topic", "shop.#", *of)
    assert {name: found[name] for name in ("event_id", "topic", "key", "content_type", "bytes")} == {
        "event_id": event_id, "topic": "shop.reminder", "key": "k", "content_type": "application/json", "bytes": 8,
    }  # fmt: skip
    wait = datetime.fromisoformat(found["at"]) - datetime.fromisoformat(found["scheduled_at"])
    assert 7140 < wait.total_seconds() < 7260
    out, err = await command("scheduled", "list", "--limit", "1", *of)
    assert event_id in out, "the next one first"
    assert str(other_id) not in out
    assert "more than 1" in err

    where = await json_of("where", event_id, *of)
    assert (where["scheduled"], where["logged"]) == (found, None)
    out, _ = await command("where", event_id, *of)
    assert "waits" in out
    assert (await json_of("status", *of, expect=1))["scheduled"] == {
        "events": 2, "exact": True, "next_at": found["at"],
    }  # fmt: skip
    out, _ = await command("status", *of, expect=1)
    assert "2 events, the next in 1 h 59 min" in out

    _, err = await command("scheduled", "cancel", event_id, str(sent_id), *of, expect=1)
    assert "1 cancelled" in err
    assert f"the event {sent_id} does not wait for its time" in err
    _, err = await command("where", event_id, *of, expect=1)
    assert "not among those that wait for their time" in err


async def test_what_is_overdue_shows_in_status_and_in_the_leaders_metrics(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    port = free_port()
    text = settings(bridge_database, messages, f'[observe]\nlisten = "127.0.0.1:{port}"\nsample_interval = 0.2')
    bridge = Daemon(tmp_path, text)
    await execute(bridge_database, MANY.format("clock_timestamp() + interval '1 hour'", 1, 3))
    await execute(bridge_database, "update bridge.scheduled set at = now() - interval '1 hour' where payload = '1'")
    out, _ = await command("status", "--config", str(bridge.config), expect=1)
    assert "3 events, the next overdue for 1 h" in out, "nobody leads"
    async with await AsyncConnection.connect(bridge_database) as canceller:
        await canceller.execute("select bridge.cancel(event_id) from bridge.scheduled where payload = '1'")
        with bridge:
            bridge.wait_for("bridge.leading")

            async def tells(waiting: int, *, overdue: bool) -> bool:
                _, metrics = await get(port, "/metrics")
                figures = dict(re.findall(r"^(pgbridge_scheduled_\w+){.*} (.+)$", metrics, flags=re.MULTILINE))
                # The leader has asked when they are there.
                return bool(figures) and (
                    float(figures["pgbridge_scheduled_events"]) == waiting
                    and (float(figures["pgbridge_scheduled_overdue_seconds"]) >= 3600) == overdue
                )

            await until(lambda: tells(3, overdue=True))
            await canceller.commit()
            await until(lambda: tells(2, overdue=False))
            assert bridge.stop() == 0
