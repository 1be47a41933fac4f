"""Plain pg_notify: what the listener hears, as a source of its own (`memory`) or written to the log (`outbox`).

LISTEN forgets whoever is not connected, so a gap in listening is measured and told: it is the one thing that a bridge
cannot make up for. What was heard is bounded in memory: `memory` drops and counts what it cannot hold, `outbox` stops
reading from the server until its last batch is stored.
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

from bridge.errors import DatabaseUnavailableError
from bridge.event import NO_HEADERS, Event
from bridge.observe.metrics import DEAF_SECONDS, NOTIFICATIONS, NOTIFICATIONS_DROPPED
from bridge.postgres import connect, database_errors
from bridge.settings import ChannelsSettings, PostgresSettings
from bridge.sources import DeadLetter, Page
from bridge.sources.listener import Listener
from bridge.supervise import background

log = structlog.get_logger()

_PAGE = 2000
"""Notifications in one page, or in one INSERT."""


class ChannelSource:
    """Notifications straight from memory, at most once. Implements `bridge.sources.Source`."""

    def __init__(self, name: str, postgres: PostgresSettings, channels: ChannelsSettings) -> None:
        self._name = name
        self._postgres = postgres
        self._channels = channels
        self._heard: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._dropped = 0
        self._gap = GapWatch()
        self._source = ""

    async def session(self, ready: Callable[[], None]) -> None:
        """Listens until a connection is lost; calls `ready` once it stands by or hears.

        Raises DatabaseUnavailableError, PrivilegeError, ListenError, RefusedError on a standby server.
        """
        lead = await connect(self._postgres, f"pgbridge {self._name}")
        self._source = f"/{lead.info.dbname}/{self._name}"
        listener = _listener(self._name, self._postgres, self._channels, self.hear, None)

        def hears() -> None:
            self._gap.restored()
            ready()

        try:
            while not await _leads(lead, self._name):
                ready()
                await asyncio.sleep(1.0)
            await listener.open()
            async with background(_watch(lead)):
                await listener.run(hears)
        except* DatabaseUnavailableError as group:
            self._gap.lost(group.exceptions[0])
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
            self._arrived.clear()
            await self._arrived.wait()
        if self._dropped:
            log.error("channels.dropped", events=self._dropped)
            self._dropped = 0
        taken = [self._heard.popleft() for _ in range(min(_PAGE, len(self._heard)))]
        return Page(taken, None)

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        """There is no table to keep them in: the relay's log line is what remains."""

    async def settle(self, page: Page) -> None:
        """Nothing is stored, so nothing has to be settled."""


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
        listener = _listener(self._name, self._postgres, self._channels, self.hear, self.room)
        try:
            await listener.open()
            async with background(self._store_for_ever()):
                await listener.run(self._gap.restored)
        except* DatabaseUnavailableError as group:
            self._gap.lost(group.exceptions[0])
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
        """Stores what is still held, at a clean stop."""
        if self._heard:
            connection = await connect(self._postgres, f"pgbridge {self._name} intake")
            try:
                while self._heard:
                    await self._store(connection)
            finally:
                await connection.close()

    async def _store(self, connection: AsyncConnection[TupleRow]) -> None:
        batch = [self._heard[index] for index in range(min(_PAGE, len(self._heard)))]
        with database_errors():
            await connection.execute(
                "select bridge.intake(%s, %s)",
                ([n.channel for n in batch], [n.payload for n in batch]),
            )
        # Only now, since a lost session must leave them here for the next one.
        for _ in batch:
            self._heard.popleft()
        self.room.set()


class GapWatch:
    """Measures for how long nobody listened, and says so: what was sent meanwhile is gone."""

    def __init__(self) -> None:
        self._deaf_since: float | None = None

    def lost(self, error: BaseException) -> None:
        """The listening connection went away."""
        if self._deaf_since is None:
            self._deaf_since = time.monotonic()
            log.warning("channels.deaf", reason=str(error))

    def restored(self) -> None:
        """It hears."""
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


async def _leads(session: AsyncConnection[TupleRow], name: str) -> bool:
    """Whether this session is the only one of its name that listens, so that nothing is forwarded twice."""
    with database_errors():
        cursor = await session.execute(
            "select pg_try_advisory_lock(hashtextextended('pgbridge lead ' || %s, 0))", (name,)
        )
        row = await cursor.fetchone()
    return row is not None and bool(row[0])


async def _watch(session: AsyncConnection[TupleRow]) -> None:
    """Notices the end of the session that holds the lead."""
    while True:
        await asyncio.sleep(2.0)
        with database_errors():
            await session.execute("select 1")


def _listener(
    name: str,
    postgres: PostgresSettings,
    channels: ChannelsSettings,
    hear: Callable[[Notify], None],
    room: asyncio.Event | None,
) -> Listener:
    return Listener(
        postgres,
        channels.listen,
        hear,
        room=room,
        heartbeat=channels.heartbeat,
        application_name=f"pgbridge {name} channels",
    )


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
