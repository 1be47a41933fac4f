"""The doorbell under adversarial timing: late at most by the poll interval, and no NOTIFY while the bridge is awake."""

import asyncio
import time
from pathlib import Path

import psycopg
import pytest
from psycopg import AsyncConnection

from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.sink import NatsSink
from bridge.settings import OutboxSettings
from bridge.sources import doorbell as doorbell_module
from bridge.sources.doorbell import BUSY_PAGES, Doorbell
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings
from tests.support.outbox import lead, open_outbox
from tests.support.servers import NatsServer
from tests.support.until import rows_become, until


def asleep(dsn: str) -> bool:
    with psycopg.connect(dsn) as connection:
        row = connection.execute("select asleep from bridge.bell").fetchone()
    assert row is not None
    return bool(row[0])


class CountingDoorbell(Doorbell):
    """Counts the looks that found nothing."""

    looks = 0

    last_xmin = 0

    async def wait(self, xmin: int, ring: asyncio.Event) -> None:
        self.looks += 1
        self.last_xmin = xmin
        await super().wait(xmin, ring)

    @property
    def is_certain(self) -> bool:
        """Whether the last look saw the end of all that ran when the bridge fell asleep."""
        return self.asleep and self._certain_at is not None and self.last_xmin >= self._certain_at


class Reader:
    """A leading source whose bell nobody hears, read on in the background: only its own looks find events."""

    def __init__(self, dsn: str, poll_interval: float) -> None:
        self._dsn = dsn
        self._poll_interval = poll_interval
        self.found: asyncio.Queue[tuple[str, float]] = asyncio.Queue()

    async def __aenter__(self) -> "Reader":
        self.doorbell = CountingDoorbell(self._poll_interval)
        outbox = await open_outbox(self._dsn, OutboxSettings(poll_interval=self._poll_interval), self.doorbell)
        self._session = outbox.session
        self.source = await lead(outbox)
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._session.close()

    async def _read(self) -> None:
        while True:
            for event in (await self.source.read(2000)).events:
                self.found.put_nowait((event.id, time.monotonic()))

    async def find(self, event_id: str) -> float:
        """When it was found."""
        async with asyncio.timeout(20):
            while True:
                found, at = await self.found.get()
                if found == event_id:
                    return at


async def wake_up(reader: Reader, dsn: str) -> None:
    """A burst, as of a load."""
    async with await AsyncConnection.connect(dsn, autocommit=True) as connection:

        async def is_awake() -> bool:
            await connection.execute("select bridge.emit('load', 'x')")
            reader.doorbell.ring()
            return not reader.doorbell.asleep

        await until(is_awake)


async def test_a_transaction_that_saw_the_bridge_awake_is_found_although_it_does_not_ring(
    bridge_database: str,
) -> None:
    async with Reader(bridge_database, 30.0) as reader:
        await wake_up(reader, bridge_database)
        async with await AsyncConnection.connect(bridge_database) as writer:
            row = await (await writer.execute("select bridge.emit('load', 'late')::text")).fetchone()
            assert row is not None
            await until(lambda: reader.doorbell.asleep)
            # It sleeps, and goes on looking all the same, since this transaction may commit unheard.
            await until(lambda enough=reader.doorbell.looks + 10: reader.doorbell.looks >= enough)  # type: ignore[misc]
            await writer.commit()
            committed = time.monotonic()
            assert await reader.find(str(row[0])) - committed < 0.5


async def test_no_wake_up_is_later_than_the_poll_interval_whatever_the_snapshot_says(bridge_database: str) -> None:
    interval = 0.6
    async with Reader(bridge_database, interval) as reader:
        await wake_up(reader, bridge_database)
        # Its snapshot goes on saying awake, and it has no transaction id that a horizon could wait for.
        async with await AsyncConnection.connect(bridge_database) as writer:
            await writer.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
            await writer.execute("select 1 from bridge.bell")
            await until(lambda: reader.doorbell.is_certain)
            row = await (await writer.execute("select bridge.emit('load', 'old snapshot')::text")).fetchone()
            await writer.commit()
            committed = time.monotonic()
            assert row is not None
            assert await reader.find(str(row[0])) - committed < interval + 0.3


async def test_no_event_is_late_while_the_bridge_falls_asleep_and_wakes_up_all_the_time(
    bridge_database: str, messages: Messages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interval = 2.0
    monkeypatch.setattr(doorbell_module, "QUIET", 0.02)
    monkeypatch.setattr(doorbell_module, "BUSY_PAGES", 2)
    async with Reader(bridge_database, interval) as reader, await AsyncConnection.connect(bridge_database) as bell:
        await bell.set_autocommit(True)
        await bell.execute("listen bridge_bell")
        reader.doorbell._recent = type(reader.doorbell._recent)(maxlen=2)

        async def hear() -> None:
            async for _ in bell.notifies():
                reader.doorbell.ring()

        hearing = asyncio.create_task(hear())
        late = []
        async with await AsyncConnection.connect(bridge_database) as writer:
            for number in range(150):
                row = await (await writer.execute("select bridge.emit('load', 'x')::text")).fetchone()
                # Nothing is waited for: the commits are to fall everywhere between two sleeps.
                await asyncio.sleep(0.007 * (number % 7))
                await writer.commit()
                committed = time.monotonic()
                assert row is not None
                late.append(await reader.find(str(row[0])) - committed)
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
        assert max(late) < interval
        # Falling asleep closes the race itself: hardly one has to wait for the poll behind it.
        assert sorted(late)[-5] < interval / 2


async def test_a_trickle_leaves_the_bridge_asleep_and_a_load_wakes_it_until_it_is_quiet(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    with Daemon(tmp_path, settings(bridge_database, messages)) as bridge:
        await asyncio.to_thread(bridge.wait_for, "bridge.leading")
        async with await AsyncConnection.connect(bridge_database, autocommit=True) as writer:
            for number in range(BUSY_PAGES // 2):
                await writer.execute("select bridge.emit('load', %s::text)", (str(number),))
                await messages.take(1)
                assert asleep(bridge_database)
            async with asyncio.timeout(60):
                while asleep(bridge_database):
                    await writer.execute("select bridge.emit('load', 'x')")
            assert await _notifications_during(bridge_database, "select bridge.emit('load', 'awake')") == 0
            await until(lambda: asleep(bridge_database))
        assert await _notifications_during(bridge_database, "select bridge.emit('load', 'asleep')") == 1


async def test_nobody_rings_for_a_bridge_that_has_no_room_or_has_left(
    bridge_database: str, server_folder: Path, unique: str, tmp_path: Path
) -> None:
    """A commit with NOTIFY costs three times as much as one without, and nobody would react."""
    with NatsServer(server_folder) as broker:
        await NatsSink(NatsSettings(type="nats", url=broker.url, stream=unique)).topology(apply=True)
        text = f"""
name = "test"
[postgres]
dsn = "{bridge_database}"
[relay]
events_in_flight = 100
[sinks.events]
type = "nats"
url = "{broker.url}"
stream = "{unique}"
[[routes]]
topic = "#"
sink = "events"
"""
        with Daemon(tmp_path, text) as bridge:
            await asyncio.to_thread(bridge.wait_for, "bridge.leading")
            await until(lambda: asleep(bridge_database))
            await asyncio.to_thread(broker.kill)
            await asyncio.to_thread(bridge.wait_for, "sink.lost")
            await execute(bridge_database, "select bridge.emit('load', 'x') from generate_series(1, 500)")
            await until(lambda: not asleep(bridge_database))
            assert await _notifications_during(bridge_database, "select bridge.emit('load', 'no room')") == 0
            await asyncio.to_thread(broker.start)
            await rows_become(bridge_database, "select backlog from bridge.status()", [(0,)])
            await until(lambda: asleep(bridge_database))
            assert bridge.stop() == 0
        assert not asleep(bridge_database)
        assert await _notifications_during(bridge_database, "select bridge.emit('load', 'nobody there')") == 0


async def _notifications_during(dsn: str, statement: str) -> int:
    async with await AsyncConnection.connect(dsn, autocommit=True) as listening:
        await listening.execute("listen bridge_bell")
        await execute(dsn, statement)
        return len([note async for note in listening.notifies(timeout=0.3)])
