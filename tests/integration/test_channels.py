"""Plain pg_notify: floods, gaps, and listeners that died half-open."""

import asyncio
import time
from pathlib import Path

import psycopg
import pytest
from psycopg import Notify
from pydantic import SecretStr
from tenacity import wait_fixed

from bridge.errors import DatabaseUnavailableError
from bridge.process.outage import Outage
from bridge.process.tasks import background, one_error
from bridge.settings import ChannelsSettings, PostgresSettings
from bridge.sources import listener as listener_module
from bridge.sources.channels import Intake
from bridge.sources.listener import Listener
from tests.support.commands import command
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings
from tests.support.metrics import MEMORY, metric
from tests.support.proxy import Proxy
from tests.support.servers import PostgresServer, RabbitMQServer, free_port
from tests.support.until import rows_become, until
from tests.support.unwrapped import unwrapped

FLOOD = 100_000
NOTIFY = "select pg_notify('Orders', n::text) from generate_series({}, {}) n order by n"


def one(dsn: str, query: str) -> object:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


async def heard(port: int, count: int) -> None:
    """Waits until the bridge has heard so many notifications; the server cannot tell, since its sockets hold some."""

    async def heard_all() -> bool:
        return await metric(port, "pgbridge_notifications_total") == count

    await until(heard_all, f"{count} notifications are heard")


async def test_a_flood_keeps_its_order_in_bounded_memory_and_empties_the_servers_queue(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    port = free_port()
    more = f"[channels]\nlisten = ['Orders']\nbuffer_events = 5000\n[observe]\nlisten = '127.0.0.1:{port}'"
    with Daemon(tmp_path, settings(bridge_database, messages, more)) as bridge:
        await asyncio.to_thread(bridge.wait_for, "channels.listening")
        before, most = await metric(port, MEMORY), 0.0
        flooding = asyncio.create_task(execute(bridge_database, NOTIFY.format(1, FLOOD)))

        async def stored_all() -> bool:
            nonlocal most
            most = max(most, await metric(port, MEMORY))
            return one(bridge_database, "select count(*) from bridge.outbox") == FLOOD

        await until(stored_all, limit=60)
        await flooding
        assert most - before < 60_000_000
        stored = await execute(
            bridge_database,
            "select count(*) from (select payload::int as n, lag(payload::int, 1, 0) over (order by id) as before "
            "from bridge.outbox) o where n <> before + 1",
        )
        assert stored == [(0,)]
        await until(lambda: one(bridge_database, "select pg_notification_queue_usage()") == 0)
        assert [line["action"] for line in bridge.lines() if line["action"].startswith("channels.")] == [
            "channels.listening"
        ]
        assert await asyncio.to_thread(bridge.stop) == 0


async def test_memory_drops_counts_and_says_what_it_cannot_hold_while_the_broker_is_down(
    rabbitmq: RabbitMQServer, database: str, messages: Messages, tmp_path: Path
) -> None:
    port = free_port()
    more = (
        "[channels]\nlisten = ['Orders']\nbuffer = 'memory'\nbuffer_events = 5000\n[relay]\nretry_max = 0.5\n"
        f"[observe]\nlisten = '127.0.0.1:{port}'"
    )
    async with Proxy(rabbitmq.host, rabbitmq.port) as wire:
        text = settings(database, messages, more).replace(str(rabbitmq.port), str(wire.port))
        with Daemon(tmp_path, text) as bridge:
            await asyncio.to_thread(bridge.wait_for, "channels.listening")
            wire.refuse = True
            wire.cut()
            before = await metric(port, MEMORY)
            await execute(database, NOTIFY.format(1, FLOOD))
            await asyncio.to_thread(bridge.wait_for, "channels.dropping")
            await heard(port, FLOOD)
            assert one(database, "select pg_notification_queue_usage()") == 0
            assert await metric(port, MEMORY) - before < 60_000_000
            wire.refuse = False
            await asyncio.to_thread(bridge.wait_for, "sink.restored")
            assert await asyncio.to_thread(bridge.stop) == 0
            dropped = sum(line["events"] for line in bridge.lines() if line["action"] == "channels.dropped")
            assert 0 < dropped < FLOOD
            numbers = [int(message.body) for message in await messages.take(FLOOD - dropped)]
            assert numbers == sorted(set(numbers))


async def test_a_gap_in_listening_is_measured_and_told(
    bridge_database: str, postgres: PostgresServer, messages: Messages, tmp_path: Path
) -> None:
    more = "[channels]\nlisten = ['Orders']"
    async with Proxy(postgres.host, postgres.port) as wire:
        dsn = bridge_database.replace(str(postgres.port), str(wire.port))
        with Daemon(tmp_path, settings(dsn, messages, more)) as bridge:
            await asyncio.to_thread(bridge.wait_for, "channels.listening")
            began = time.monotonic()
            wire.refuse = True
            wire.cut()
            await asyncio.to_thread(bridge.wait_for, "postgres.lost")
            wire.refuse = False
            gap = (await asyncio.to_thread(bridge.wait_for, "channels.gap"))["seconds"]
            assert 0 < gap < time.monotonic() - began
            await execute(bridge_database, NOTIFY.format(1, 1))
            assert [message.body for message in await messages.take(1)] == [b"1"]


async def test_a_listener_that_died_half_open_is_noticed_within_its_heartbeat(
    database: str, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "_PROBE_TIMEOUT", 0.5)
    async with Proxy(postgres.host, postgres.port) as wire:
        dsn = database.replace(str(postgres.port), str(wire.port))
        listener = Listener(
            PostgresSettings(dsn=SecretStr(dsn), connect_timeout=2), ["Orders"], lambda _: None, heartbeat=0.3
        )
        hears = asyncio.Event()
        await listener.open()
        try:
            listening = asyncio.create_task(listener.run(hears.set))
            await asyncio.wait_for(hears.wait(), 8)
            wire.blackhole = True
            with pytest.raises(DatabaseUnavailableError), one_error():
                await asyncio.wait_for(listening, 8)
        finally:
            wire.blackhole = False
            await listener.close()


async def test_a_listener_that_has_no_room_is_not_taken_for_a_dead_one(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "_PROBE_TIMEOUT", 0.2)
    room, heard = asyncio.Event(), []
    room.set()

    def hear(notification: Notify) -> None:
        heard.append(int(notification.payload))
        room.clear()

    listener = Listener(PostgresSettings(dsn=SecretStr(database)), ["Orders"], hear, room=room, heartbeat=0.1)
    hears = asyncio.Event()
    await listener.open()
    try:
        with one_error():
            async with background(listener.run(hears.set)):
                await hears.wait()
                await execute(database, NOTIFY.format(1, 10_000))
                await until(lambda: not room.is_set())
                # Five times as long as silence is waited for; a listener that waits for room shows no sign of it.
                await asyncio.sleep(1.0)
                while len(heard) < 10_000:
                    room.set()
                    await asyncio.sleep(0)
        assert heard == list(range(1, 10_001))
    finally:
        await listener.close()


async def test_what_memory_holds_at_a_clean_stop_is_still_published(
    rabbitmq: RabbitMQServer, database: str, messages: Messages, tmp_path: Path
) -> None:
    port = free_port()
    more = f"[channels]\nlisten = ['Orders']\nbuffer = 'memory'\n[observe]\nlisten = '127.0.0.1:{port}'"
    async with Proxy(rabbitmq.host, rabbitmq.port) as wire:
        text = settings(database, messages, more).replace(str(rabbitmq.port), str(wire.port))
        with Daemon(tmp_path, text) as bridge:
            await asyncio.to_thread(bridge.wait_for, "channels.listening")
            wire.blackhole = True
            await execute(database, NOTIFY.format(1, 10_000))
            await heard(port, 10_000)
            stopping = asyncio.create_task(asyncio.to_thread(bridge.stop))
            await asyncio.to_thread(bridge.wait_for, "bridge.stopping")
            wire.blackhole = False
            assert await stopping == 0
            taken = await messages.take(10_000)
            assert [int(message.body) for message in taken] == list(range(1, 10_001))


async def test_a_notification_whose_store_was_not_answered_is_stored_again_under_the_same_id(
    bridge_database: str, postgres: PostgresServer
) -> None:
    async with Proxy(postgres.host, postgres.port) as wire:
        dsn = bridge_database.replace(str(postgres.port), str(wire.port))
        outage = Outage("channels", wait_fixed(0.1))
        settings_ = PostgresSettings(dsn=SecretStr(dsn))
        intake = Intake("test", settings_, ChannelsSettings(listen=["Orders"]), outage)
        running = asyncio.create_task(intake.run())
        # Sent until one is stored: from then on the intake listens, and has its connection.
        while one(bridge_database, "select count(*) from bridge.outbox") == 0:
            await execute(bridge_database, "notify \"Orders\", 'first'")
            await asyncio.sleep(0.05)
        await until(lambda: not intake._heard, "what was sent first is settled")
        wire.delay_to_client = 60
        for payload in ("a", "b"):
            intake.hear(Notify("Orders", payload, 0))
        await rows_become(bridge_database, "select count(*) from bridge.outbox where payload in ('a', 'b')", [(2,)])
        wire.delay_to_client = 0
        wire.cut()
        await until(lambda: outage.lasts)
        running.cancel()
        await asyncio.wait([running])
        await intake.drain()
        stored = await execute(
            bridge_database,
            "select payload, count(*), count(distinct event_id) from bridge.outbox where payload <> 'first' "
            "group by payload order by payload",
        )
        assert stored == [("a", 2, 1), ("b", 2, 1)]


async def test_check_warns_of_each_forwarded_channel_that_any_role_may_send_to_it(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    text = settings(bridge_database, messages, '[channels]\nlisten = ["orders", "Stock Level"]')
    out, _ = await command("check", "--config", str(Daemon(tmp_path, text).config))
    warned = [line for line in unwrapped(out).splitlines() if "any role that may connect" in line]
    assert [line.partition("any role")[0].split() for line in warned] == [
        ["warn", "channel", "orders"],
        ["warn", "channel", "Stock", "Level"],
    ]
    assert all("bridge.notify()" in line for line in warned)
