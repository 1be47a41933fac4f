"""Plain pg_notify as a source of its own, straight from memory (`buffer = "memory"`): at most once.

LISTEN forgets whoever is not connected, so a gap in listening is measured and told. What was heard is bounded in
memory: what it cannot hold is dropped and counted.
"""

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import structlog
from psycopg import AsyncConnection, Notify
from psycopg.rows import TupleRow

from bridge.errors import PgbridgeError
from bridge.event import NO_HEADERS, Event
from bridge.postgres.connection import answered, connect
from bridge.process.metrics import DEAF_SECONDS, NOTIFICATIONS, NOTIFICATIONS_DROPPED
from bridge.process.tasks import background, one_error
from bridge.settings import ChannelsSettings, PostgresSettings
from bridge.sources import DeadLetter, Page
from bridge.sources.listener import Listener

log = structlog.get_logger()


class GapWatch:
    """Measures for how long nobody listened, and says so: what was sent meanwhile is gone."""

    def __init__(self) -> None:
        self._hears = False
        self._deaf_since: float | None = None

    def lost(self, reason: str | None) -> None:
        """The listening connection went away; None: with the session of the lead, which tells the reason."""
        if self._hears:
            self._hears = False
            self._deaf_since = time.monotonic()
            if reason is not None:
                log.warning("channels.deaf", reason=reason)

    def restored(self) -> None:
        """It hears."""
        self._hears = True
        log.info("channels.listening")
        if self._deaf_since is not None:
            gap = time.monotonic() - self._deaf_since
            self._deaf_since = None
            DEAF_SECONDS.inc(gap)
            log.error(
                "channels.gap",
                seconds=round(gap, 3),
                hint="notifications sent in this time are lost; bridge.notify() would have kept them",
            )


log = structlog.get_logger()

_PAGE = 2000
"""Notifications in one page."""


class ChannelSource:
    """Notifications straight from memory, at most once. Implements `bridge.sources.Source`."""

    def __init__(self, name: str, postgres: PostgresSettings, channels: ChannelsSettings) -> None:
        self._name = name
        self._postgres = postgres
        self._channels = channels
        self._heard: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._empty = asyncio.Event()
        self._dropped = 0
        self._gap = GapWatch()
        self._source = ""

    async def session(self, ready: Callable[[], None]) -> None:
        """Listens until a connection is lost; calls `ready` once it stands by or hears.

        Raises DatabaseUnavailableError, PrivilegeError, ListenError, RefusedError on a standby server.
        """
        lead = await connect(self._postgres, f"pgbridge {self._name}")
        self._source = f"/{lead.info.dbname}/{self._name}"
        listener = Listener(
            self._postgres,
            self._channels.listen,
            self.hear,
            heartbeat=self._channels.heartbeat,
            application_name=f"pgbridge {self._name} channels",
        )

        def hears() -> None:
            self._gap.restored()
            ready()

        try:
            while not await _leads(lead, self._name):
                ready()
                await asyncio.sleep(1.0)
            await listener.open()
            with one_error():
                async with background(_watch(lead)):
                    await listener.run(hears)
        except PgbridgeError as error:
            self._gap.lost(str(error))
            raise
        finally:
            await listener.close()
            await lead.close()

    def hear(self, notification: Notify) -> None:
        """Takes one notification, or drops and counts it when the buffer is full."""
        NOTIFICATIONS.inc()
        if len(self._heard) >= self._channels.buffer_events:
            NOTIFICATIONS_DROPPED.inc()
            if not self._dropped:
                log.error(
                    "channels.dropping",
                    capacity=self._channels.buffer_events,
                    hint='the broker is too slow or down; buffer = "outbox" loses nothing',
                )
            self._dropped += 1
            return
        self._heard.append(_event(notification, self._source))
        self._arrived.set()

    async def read(self) -> Page:
        while not self._heard:
            self._empty.set()
            self._arrived.clear()
            await self._arrived.wait()
        self._empty.clear()
        self._say_dropped()
        taken = [self._heard.popleft() for _ in range(min(_PAGE, len(self._heard)))]
        return Page(taken, None)

    async def drain(self, limit: float) -> None:
        """At a clean stop: waits until all that was heard is read; says what is left after `limit` seconds."""
        try:
            async with asyncio.timeout(limit):
                while self._heard:
                    self._empty.clear()
                    await self._empty.wait()
        except TimeoutError:
            NOTIFICATIONS_DROPPED.inc(len(self._heard))
            self._dropped += len(self._heard)
        self._say_dropped()

    def _say_dropped(self) -> None:
        if self._dropped:
            log.error("channels.dropped", events=self._dropped)
            self._dropped = 0

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        """There is no table to keep them in: the relay's log line is what remains."""

    async def settle(self, page: Page) -> None:
        """Nothing is stored, so nothing has to be settled."""


async def _leads(session: AsyncConnection[TupleRow], name: str) -> bool:
    """Whether this session is the only one of its name that listens, so that nothing is forwarded twice."""
    with answered(session):
        cursor = await session.execute(
            "select pg_try_advisory_lock(hashtextextended('pgbridge lead ' || %s, 0))", (name,)
        )
        row = await cursor.fetchone()
    return row is not None and bool(row[0])


async def _watch(session: AsyncConnection[TupleRow]) -> None:
    """Notices the end of the session that holds the lead."""
    while True:
        await asyncio.sleep(2.0)
        with answered(session):
            await session.execute("select 1")


def _event(notification: Notify, source: str) -> Event:
    return Event(
        id=str(uuid.uuid4()),
        topic=notification.channel,
        payload=notification.payload.encode(),
        key=notification.channel,
        source=source,
        time=datetime.now(UTC),
        content_type="text/plain",
        headers=NO_HEADERS,
    )


_BATCH = 2000
"""Notifications in one INSERT."""


class Intake:
    """Writes notifications into the log, in batches, durably; from there the outbox carries them."""

    def __init__(self, name: str, postgres: PostgresSettings, channels: ChannelsSettings) -> None:
        self._name = name
        self._postgres = postgres
        self._channels = channels
        self._heard: deque[Notify] = deque()
        self._arrived = asyncio.Event()
        self._gap = GapWatch()
        self.room = asyncio.Event()
        self.room.set()

    async def session(self) -> None:
        """Listens and stores until a connection is lost; what it holds then stays for the next session.

        Raises DatabaseUnavailableError, PrivilegeError, ListenError.
        """
        listener = Listener(
            self._postgres,
            self._channels.listen,
            self.hear,
            room=self.room,
            heartbeat=self._channels.heartbeat,
            application_name=f"pgbridge {self._name} channels",
        )
        try:
            await listener.open()
            with one_error():
                async with background(self._store_for_ever()):
                    await listener.run(self._gap.restored)
        except PgbridgeError as error:
            self._gap.lost(str(error))
            raise
        except asyncio.CancelledError:
            self._gap.lost(None)
            raise
        finally:
            await listener.close()

    def hear(self, notification: Notify) -> None:
        """Takes one notification; clears `room` when the listener has to wait."""
        NOTIFICATIONS.inc()
        self._heard.append(notification)
        self._arrived.set()
        if len(self._heard) >= self._channels.buffer_events:
            self.room.clear()

    async def _store_for_ever(self) -> None:
        connection = await connect(self._postgres, f"pgbridge {self._name} intake")
        try:
            while True:
                while not self._heard:
                    self._arrived.clear()
                    await self._arrived.wait()
                await self._store(connection)
        finally:
            await connection.close()

    async def drain(self) -> None:
        """Stores what is still held, at a clean stop. Raises PgbridgeError, after saying how much is lost with it."""
        if not self._heard:
            return
        try:
            connection = await connect(self._postgres, f"pgbridge {self._name} intake")
            try:
                while self._heard:
                    await self._store(connection)
            finally:
                await connection.close()
        finally:
            if self._heard:
                NOTIFICATIONS_DROPPED.inc(len(self._heard))
                log.error("channels.dropped", events=len(self._heard))

    async def _store(self, connection: AsyncConnection[TupleRow]) -> None:
        batch = [self._heard[index] for index in range(min(_BATCH, len(self._heard)))]
        with answered(connection):
            await connection.execute(
                "select bridge.intake(%s, %s)",
                ([n.channel for n in batch], [n.payload for n in batch]),
            )
        # Only now, since a lost session must leave them here for the next one.
        for _ in batch:
            self._heard.popleft()
        self.room.set()
