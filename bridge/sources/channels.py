"""What plain pg_notify says, and the two ways to carry it on.

`Channels` (`buffer = "memory"`) has a source for each sink, straight from memory, at most once: what a sink's buffer
cannot hold is dropped and counted. `Intake` (`buffer = "outbox"`) writes it into the log, from where it is carried at
least once. For both, PostgreSQL keeps nothing for whoever does not listen: `Deafness` measures for how long nobody did.
"""

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Final, Literal, NamedTuple

import structlog
from psycopg import Notify

from bridge.errors import PgbridgeError
from bridge.event import NO_HEADERS, Event
from bridge.postgres.connection import answered, connect
from bridge.postgres.pooler import require_own_session
from bridge.postgres.wire import Connection
from bridge.process.metrics import DEAF_SECONDS, NOTIFICATIONS, NOTIFICATIONS_DROPPED
from bridge.process.outage import Outage
from bridge.process.tasks import background, in_own_task, one_error
from bridge.routes import Routes
from bridge.settings import ChannelsSettings, PostgresSettings
from bridge.sources import DeadLetter, Page
from bridge.sources.listener import Listener

log = structlog.get_logger()

_PAGE: Final = 2000
"""Notifications in one page."""

_BATCH: Final = 2000
"""Notifications in one INSERT."""

_PULSE: Final = 2.0
"""Seconds between two looks whether the session of the lead lives."""


class Deafness:
    """The time in which this process did not listen, although it had listened before: what was sent then is gone."""

    def __init__(self) -> None:
        self._listens = False
        self._since: float | None = None

    def begin(self, reason: str | None) -> None:
        """The listening connection went away. None: together with the session of the lead, whose loss is logged."""
        if self._listens:
            self._listens = False
            self._since = time.monotonic()
            if reason is not None:
                log.warning("channels.deaf", reason=reason)

    def end(self) -> None:
        """The process listens. Counts and logs how long it did not."""
        self._listens = True
        log.info("channels.listening")
        if self._since is not None:
            gap = time.monotonic() - self._since
            self._since = None
            DEAF_SECONDS.inc(gap)
            log.error(
                "channels.gap",
                seconds=round(gap, 3),
                hint="notifications sent in this time are lost; bridge.notify() would have kept them",
            )


class MemorySource:
    """What was heard for one sink and waits in memory, at most once. Implements `bridge.sources.Source`."""

    def __init__(self, sink: str, capacity: int) -> None:
        self._sink = sink
        self._capacity = capacity
        self._heard: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._empty = asyncio.Event()
        self._dropped = 0

    def hear(self, event: Event) -> None:
        """Takes one notification, or drops and counts it when the buffer is full."""
        if len(self._heard) >= self._capacity:
            NOTIFICATIONS_DROPPED.inc()
            if not self._dropped:
                log.error(
                    "channels.dropping",
                    sink=self._sink,
                    capacity=self._capacity,
                    hint='the broker is too slow or down; buffer = "outbox" loses nothing',
                )
            self._dropped += 1
            return
        self._heard.append(event)
        self._arrived.set()

    async def read(self, most: int) -> Page:
        """What was heard and not read yet; waits until there is something."""
        while not self._heard:
            self._empty.set()
            self._arrived.clear()
            await self._arrived.wait()
        self._empty.clear()
        self._say_dropped()
        return Page([self._heard.popleft() for _ in range(min(_PAGE, most, len(self._heard)))], None)

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
            log.error("channels.dropped", sink=self._sink, events=self._dropped)
            self._dropped = 0

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        """There is no table to keep them in: the relay's log line is what remains."""

    async def settle(self, position: object, held: Collection[int]) -> None:
        """Nothing is stored, so nothing has to be settled."""


class Channels:
    """Notifications straight from memory: one listener, and a source for each sink."""

    def __init__(
        self,
        name: str,
        postgres: PostgresSettings,
        channels: ChannelsSettings,
        routes: Routes,
        unrouted: Callable[[Event], None],
    ) -> None:
        """`unrouted` gets what no route takes."""
        self._name = name
        self._postgres = postgres
        self._channels = channels
        self._routes = routes
        self._unrouted = unrouted
        self.sources = {sink: MemorySource(sink, channels.buffer_events) for sink in routes.sinks}
        self._deafness = Deafness()
        self._source = ""
        self._number = 0
        """Of the notifications heard: what a place in the log is for other events."""

    async def session(self, be: Callable[[Literal["standby", "leading"]], None]) -> None:
        """Listens until a connection is lost; calls `be` once it stands by, and once it listens.

        Raises DatabaseUnavailableError, PrivilegeError, ListenError, RefusedError on a standby server.
        """
        name = f"pgbridge {self._name}"
        lead = await connect(self._postgres, name)
        self._source = f"/{lead.info.dbname}/{self._name}"
        listener = Listener(
            self._postgres,
            self._channels.listen,
            self.hear,
            heartbeat=self._channels.heartbeat,
            application_name=f"pgbridge {self._name} channels",
            sender=lead,
        )

        try:
            # Before the lock, which would stay with the pool, so that nobody could lead any more.
            await require_own_session(lead, self._postgres, name)
            while not await _leads(lead, self._name):
                be("standby")
                await asyncio.sleep(self._channels.standby_interval)
            await listener.open()
            with one_error():
                async with background(_watch(lead)):
                    await listener.run(partial(self._listens, be))
        except PgbridgeError as error:
            self._deafness.begin(str(error))
            raise
        finally:
            await listener.close()
            await lead.close()

    def _listens(self, be: Callable[[Literal["leading"]], None]) -> None:
        self._deafness.end()
        be("leading")

    def hear(self, notification: Notify) -> None:
        """Takes one notification, for each sink that a route leads to."""
        NOTIFICATIONS.inc()
        self._number += 1
        event = _event(notification, self._source, self._number)
        sinks = self._routes.sinks_of(event.topic)
        for sink in sinks:
            self.sources[sink].hear(event)
        if not sinks:
            self._unrouted(event)

    async def drain(self, limit: float) -> None:
        """At a clean stop: waits until all that was heard is read, up to `limit` seconds."""
        await asyncio.gather(*[source.drain(limit) for source in self.sources.values()])


async def _leads(session: Connection, name: str) -> bool:
    """Whether this session is the only one of its name that listens, so that nothing is forwarded twice."""
    with answered(session):
        cursor = await session.execute(
            "select pg_try_advisory_lock(hashtextextended('pgbridge lead ' || %s, 0))", (name,)
        )
        row = await cursor.fetchone()
    return row is not None and bool(row[0])


async def _watch(session: Connection) -> None:
    """Raises DatabaseUnavailableError when the session that holds the lead ends."""
    while True:
        await asyncio.sleep(_PULSE)
        with answered(session):
            await session.execute("select 1")


def _event(notification: Notify, source: str, number: int) -> Event:
    return Event(
        id=str(uuid.uuid4()),
        topic=notification.channel,
        payload=notification.payload.encode(),
        key=notification.channel,
        source=source,
        time=datetime.now(UTC),
        content_type="text/plain",
        headers=NO_HEADERS,
        sequence=number,
    )


class _Heard(NamedTuple):
    """A notification, and the id of its event: the same however often a lost answer makes us store it."""

    id: uuid.UUID
    channel: str
    payload: str


class Intake:
    """Writes notifications into the log, in batches, durably; from there the outbox carries them."""

    def __init__(self, name: str, postgres: PostgresSettings, channels: ChannelsSettings, outage: Outage) -> None:
        """`outage` says whether nothing is heard or stored now, and how long to wait before the next try."""
        self._name = name
        self._postgres = postgres
        self._channels = channels
        self._heard: deque[_Heard] = deque()
        self._arrived = asyncio.Event()
        self._deafness = Deafness()
        self._outage = outage
        self.room = asyncio.Event()
        self.room.set()

    async def run(self) -> None:
        """Listens and stores until it is cancelled, in one session after the other.

        A lost one is opened anew by itself, so that the log is carried on meanwhile.
        """
        try:
            while True:
                try:
                    await in_own_task(self._session())
                except PgbridgeError as error:
                    self._deafness.begin(str(error))
                    self._outage.lost(error)
                    await self._outage.wait()
        finally:
            self._deafness.begin(None)
            self._outage.dismiss()

    async def _session(self) -> None:
        """Until a connection is lost; what it holds then stays for the next session.

        Raises DatabaseUnavailableError, PrivilegeError, ListenError.
        """
        store = await connect(self._postgres, f"pgbridge {self._name} intake")
        listener = Listener(
            self._postgres,
            self._channels.listen,
            self.hear,
            room=self.room,
            heartbeat=self._channels.heartbeat,
            application_name=f"pgbridge {self._name} channels",
            sender=store,
        )
        try:
            await listener.open()
            with one_error():
                async with background(self._store_for_ever(store)):
                    await listener.run(self._hears)
        finally:
            await listener.close()
            await store.close()

    def _hears(self) -> None:
        self._deafness.end()
        self._outage.restored()

    def hear(self, notification: Notify) -> None:
        """Takes one notification; clears `room` when the listener has to wait."""
        NOTIFICATIONS.inc()
        self._heard.append(_Heard(uuid.uuid4(), notification.channel, notification.payload))
        self._arrived.set()
        if len(self._heard) >= self._channels.buffer_events:
            self.room.clear()

    async def _store_for_ever(self, connection: Connection) -> None:
        while True:
            while not self._heard:
                self._arrived.clear()
                await self._arrived.wait()
            await self._store(connection)

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

    async def _store(self, connection: Connection) -> None:
        batch = [self._heard[index] for index in range(min(_BATCH, len(self._heard)))]
        with answered(connection):
            await connection.execute(
                "select bridge.intake(%s, %s, %s)",
                ([n.id for n in batch], [n.channel for n in batch], [n.payload for n in batch]),
            )
        # Only now, since a lost session must leave them here for the next one.
        for _ in batch:
            self._heard.popleft()
        self.room.set()
