"""Stopping: SIGTERM settles what is in flight and exits 0; a second one leaves at once and loses nothing."""

import asyncio
import signal
import time
from pathlib import Path

from tests.support.daemons import Daemon
from tests.support.messages import Messages, drain, execute, settings, stored_mark
from tests.support.metrics import metric
from tests.support.proxy import Proxy
from tests.support.servers import PostgresServer, RabbitMQServer, free_port
from tests.support.until import until

COUNT = 20_000
LOAD = f"select bridge.emit('load', n::text, 'key-' || n %% 50) from generate_series(1, {COUNT}) n order by n"
SMALL_PAGES = "[outbox]\npage_size = 200"


async def test_sigterm_under_load_settles_what_is_in_flight_and_nothing_is_repeated(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    with Daemon(tmp_path, settings(bridge_database, messages, SMALL_PAGES)) as bridge:
        await asyncio.to_thread(bridge.wait_for, "bridge.leading")
        taking = asyncio.create_task(messages.take_distinct(COUNT))
        loading = asyncio.create_task(execute(bridge_database, LOAD))
        stops_in_the_middle = 0
        for threshold in (300, 4000, 9000):
            await until(lambda least=threshold: messages.seen >= least)  # type: ignore[misc]
            assert await asyncio.to_thread(bridge.stop) == 0
            stops_in_the_middle += 0 < stored_mark(bridge_database) < COUNT
            bridge.start()
            await asyncio.to_thread(bridge.wait_for, "bridge.leading")
        await loading
        taken = await taking
        assert stops_in_the_middle
        assert len(taken) == len({message.message_id for message in taken}) == COUNT
        assert await asyncio.to_thread(bridge.stop) == 0


async def test_a_stop_waits_for_a_read_that_outlasts_what_was_in_flight_and_nothing_is_repeated(
    postgres: PostgresServer, rabbitmq: RabbitMQServer, bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    count, ends, port = 0, asyncio.Event(), free_port()

    async def trickle() -> None:
        nonlocal count
        while not ends.is_set():
            await execute(bridge_database, "select bridge.emit('load', %s)", str(count))
            count += 1

    async def in_flight() -> bool:
        return (await metric(port, "pgbridge_events_in_flight") or 0) > 0

    async with Proxy(postgres.host, postgres.port) as database, Proxy(rabbitmq.host, rabbitmq.port) as broker:
        dsn = bridge_database.replace(str(postgres.port), str(database.port))
        text = settings(dsn, messages, f"[observe]\nlisten = '127.0.0.1:{port}'")
        with Daemon(tmp_path, text.replace(str(rabbitmq.port), str(broker.port))) as bridge:
            await asyncio.to_thread(bridge.wait_for, "bridge.leading")
            trickling = asyncio.create_task(trickle())
            await until(lambda: count > 50)
            broker.blackhole = True
            database.delay_to_client = 0.15
            await until(in_flight)
            bridge.signal(signal.SIGTERM)
            await asyncio.to_thread(bridge.wait_for, "bridge.stopping")
            broker.blackhole = False
            assert await asyncio.to_thread(bridge.wait) == 0
            ends.set()
            await trickling
            assert "postgres.lost" not in [line["action"] for line in bridge.lines()]
            database.delay_to_client = 0.0
            bridge.start()
            taken = [int(message.body) for message in await messages.take(count)]
            assert taken == list(range(count))
            assert await asyncio.to_thread(bridge.stop) == 0
            assert await drain(messages.queue) == []


async def test_a_second_sigterm_leaves_at_once_and_loses_nothing(
    rabbitmq: RabbitMQServer, bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    async with Proxy(rabbitmq.host, rabbitmq.port) as wire:
        text = settings(bridge_database, messages, SMALL_PAGES).replace(str(rabbitmq.port), str(wire.port))
        with Daemon(tmp_path, text) as bridge:
            await asyncio.to_thread(bridge.wait_for, "bridge.leading")
            wire.blackhole = True
            await execute(bridge_database, LOAD)
            bridge.signal(signal.SIGTERM)
            await asyncio.to_thread(bridge.wait_for, "bridge.stopping")
            began = time.monotonic()
            bridge.signal(signal.SIGTERM)
            assert await asyncio.to_thread(bridge.wait) == 128 + signal.SIGTERM
            assert time.monotonic() - began < 1.0
            wire.blackhole = False
            bridge.start()
            taken = await messages.take_distinct(COUNT)
            assert {int(message.body) for message in taken} == set(range(1, COUNT + 1))
            assert await asyncio.to_thread(bridge.stop) == 0


async def test_a_stop_while_the_broker_is_silent_ends_within_its_limit(
    rabbitmq: RabbitMQServer, bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    async with Proxy(rabbitmq.host, rabbitmq.port) as wire:
        port = free_port()
        more = f"[relay]\nshutdown_limit = 1\n[observe]\nlisten = '127.0.0.1:{port}'"
        text = settings(bridge_database, messages, more)

        async def in_flight() -> bool:
            return await metric(port, "pgbridge_events_in_flight") == 1

        with Daemon(tmp_path, text.replace(str(rabbitmq.port), str(wire.port))) as bridge:
            await asyncio.to_thread(bridge.wait_for, "bridge.leading")
            wire.blackhole = True
            await execute(bridge_database, "select bridge.emit('load', '1')")
            await until(in_flight)
            assert await asyncio.to_thread(bridge.stop, 10.0) == 0
            assert bridge.wait_for("relay.stopped_with_events_in_flight")["events"] == 1
        wire.blackhole = False
        wire.cut()
        with Daemon(tmp_path, text) as bridge:
            await asyncio.to_thread(bridge.wait_for, "bridge.leading")
            assert [message.body for message in await messages.take(1)] == [b"1"]
            assert await asyncio.to_thread(bridge.stop) == 0


async def test_a_stop_while_the_database_is_away_ends_at_once_with_0(
    bridge_database: str, postgres: PostgresServer, messages: Messages, tmp_path: Path
) -> None:
    async with Proxy(postgres.host, postgres.port) as wire:
        dsn = bridge_database.replace(str(postgres.port), str(wire.port))
        with Daemon(tmp_path, settings(dsn, messages)) as bridge:
            await asyncio.to_thread(bridge.wait_for, "bridge.leading")
            wire.refuse = True
            wire.cut()
            await asyncio.to_thread(bridge.wait_for, "postgres.lost")
            assert await asyncio.to_thread(bridge.stop, 3.0) == 0
            bridge.wait_for("bridge.stopped_in_outage", 1.0)


async def test_a_stop_while_connecting_in_vain_ends_at_once(
    bridge_database: str, postgres: PostgresServer, messages: Messages, tmp_path: Path
) -> None:
    async with Proxy(postgres.host, postgres.port) as wire:
        dsn = bridge_database.replace(str(postgres.port), str(wire.port))
        with Daemon(tmp_path, settings(dsn, messages)) as bridge:
            await asyncio.to_thread(bridge.wait_for, "bridge.leading")
            wire.blackhole = True
            wire.cut()
            await asyncio.to_thread(bridge.wait_for, "postgres.lost")
            assert await asyncio.to_thread(bridge.stop, 3.0) == 0
