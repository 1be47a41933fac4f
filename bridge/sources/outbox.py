"""The log, for the bridge that leads: one session, and on it a source with a position of its own for each sink.

Everything runs on one session, which holds the advisory lock of the lead: a bridge that lost its session can store
nothing. After any loss the stored positions are read again; nothing in memory outlives the session.
"""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

import structlog
from psycopg import Notify
from psycopg.types.json import Jsonb

from bridge.errors import SchemaError
from bridge.postgres.connection import DSN_KEY, answered, connect
from bridge.postgres.pause import Pause
from bridge.postgres.wire import Connection
from bridge.settings import OutboxSettings, PostgresSettings
from bridge.sources import DeadLetter, Page
from bridge.sources.doorbell import Doorbell
from bridge.sources.log import LogReader, PageBytes, Position, Reader, fetch_all, read_multirange, take_horizon
from bridge.sources.pauses import Pauses

log = structlog.get_logger()

_FROZEN_AFTER: Final = 15.0
"""Seconds; the server ends a session that is silent for so long: its bridge is frozen, and another one may lead."""
_PULSE: Final = 2.0
"""Seconds between two signs of life, where nothing is read or stored."""
_PULSES_TO_LIVE: Final = 3
"""A bridge that polls more seldom gives fewer signs of life, so that the database may rest, and is given more time."""
_STORE_PAUSE: Final = 0.05
"""Seconds between two stores of the positions. What was settled since is published again after a crash."""
_STORE_SHARE: Final = 10
_LONGEST_STORE_PAUSE: Final = 1.0
"""The pause is at least so many times what the last store took, up to so many seconds. Under a snapshot that stays open
each store leaves a version of its row, and the next one walks through all of them; many gaps make it longer too."""
_HELD_PAUSE: Final = 0.00005
"""Seconds more for each event that is held: thousands of ids make a store longer."""

_BURY: Final = """
insert into bridge.dead_letter
    (bridge, event_id, sequence, topic, key, payload, content_type, headers, created_at, sink, code, reason, attempts)
values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
on conflict do nothing
"""

_BEGINS: Final = {
    "beginning": "this sink is new, and begins at the beginning of the log",
    "removed": "its position was removed by hand, so what it had not published is not known: all is published (again)",
    "now": 'this sink is new, and begins with what is recorded from now on; start = "beginning" would publish the log',
    "renamed": "this sink is new, and goes on where one that the settings do not name any more was",
    "routes": "topics that come from another sink may not have been published there, so they are published again",
    "restarted": "the log was emptied and its numbers begin again, so it is read from its beginning",
}
"""Why a reader does not simply go on where it was, by the words of `bridge.begin_reading`."""
_EXPECTED: Final = {"beginning", "now"}
"""What a first start says; the rest may repeat events."""


class Problem(NamedTuple):
    """Why a sink is behind."""

    words: str
    seconds: float
    """For how long."""


class Calls:
    """What the database calls out to the bridge `name`: that there are events, now or soon, and that a leader left."""

    CHANNELS = ("bridge_bell", "bridge_lead", "bridge_pause", "bridge_scheduled")

    def __init__(self, name: str, doorbell: Doorbell) -> None:
        self._name = name
        self.doorbell = doorbell
        self.left = asyncio.Event()
        """Set when a bridge of this name hands the lead over."""
        self.when_paused: Callable[[], None] = lambda: None
        """Called when a sink of this bridge was paused or resumed."""
        self.when_scheduled: Callable[[], None] = lambda: None
        """Called when an event was scheduled that is due before all others."""

    def heard(self, notification: Notify) -> None:
        """Takes a notification of one of CHANNELS."""
        if notification.channel == "bridge_bell":
            self.doorbell.ring()
        elif notification.channel == "bridge_scheduled":
            self.when_scheduled()
        elif notification.payload == self._name:
            if notification.channel == "bridge_pause":
                self.when_paused()
            else:
                self.left.set()


class OutboxSource:
    """The log as one sink's source. Implements `bridge.sources.Source`."""

    def __init__(self, outbox: "Outbox", reader: Reader) -> None:
        settings = outbox.settings
        self.reader = reader
        self._outbox = outbox
        self._log = LogReader(
            outbox.session,
            outbox.name,
            reader,
            page_size=settings.page_size,
            page_bytes=outbox.page_bytes,
            pause=None if reader.sink else settings.poll_interval,
        )
        self._settled: Position | None = None
        """Where everything is settled, and that is not stored yet."""
        self._held: frozenset[int] = frozenset()
        self._stored_held: frozenset[int] | None = None
        self.begins_held = 0
        """Events that the last leader held for this sink."""

    def start(self, mark: int, gaps: str, horizon: int, held: int) -> None:
        """Goes on where `bridge.begin_reading` says."""
        self.begins_held = held
        self._log.start(Position(mark, read_multirange(gaps)), horizon)

    async def read(self, most: int) -> Page:
        """The next page; sleeps until the doorbell rings while there is none. Raises DatabaseUnavailableError."""
        doorbell = self._outbox.doorbell
        # What has no route is not worth a bell.
        listens = bool(self.reader.sink)
        while True:
            await self._outbox.pauses.resumed(self.reader.sink)
            if not listens or not doorbell.asleep:
                await asyncio.sleep(self._log.rest)
            ring = doorbell.next_ring
            look = await self._log.read(most)
            if look.rows:
                if listens:
                    await self._outbox.saw_events()
                return Page(look.events, look.position)
            await self._log.close_gaps()
            if listens and not await self._outbox.fell_asleep():
                await doorbell.wait(look.xmin, ring)

    async def settle(self, position: object, held: Collection[int]) -> None:
        """Remembers the position; `Outbox.keep` and `Outbox.leave` store it."""
        self._settled = cast(Position, position)
        self._held = frozenset(held)
        self._outbox.news.set()

    @property
    def held_count(self) -> int:
        """Events that are held, as of the last `settle`."""
        return len(self._held)

    @property
    def store_seconds(self) -> float:
        """How long the last store of its position took the server."""
        return self._log.store_seconds

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        """Writes them into `bridge.dead_letter`. Raises DatabaseUnavailableError, PrivilegeError."""
        await bury(self._outbox.session, self._outbox.name, letters)

    async def store(self) -> None:
        """Stores the position behind what is settled. Raises DatabaseUnavailableError, PrivilegeError, SchemaError."""
        if (settled := self._settled) is None:
            return
        held = self._held
        await self._log.store(settled, None if held == self._stored_held else held)
        self._stored_held = held
        # Not before: a stop may interrupt the store, and leave() makes up for it.
        if self._settled is settled and self._held is held:
            self._settled = None


class Outbox:
    """The log of the bridge `name`, on one session: who leads, the sources, and the storing of their positions."""

    def __init__(
        self,
        name: str,
        session: Connection,
        settings: OutboxSettings,
        doorbell: Doorbell,
        page_bytes: PageBytes | None = None,
        pauses: Pauses | None = None,
    ) -> None:
        """`page_bytes` and `pauses` outlive the session, for whoever opens the next one."""
        self.name = name
        self.page_bytes = page_bytes or PageBytes(settings.page_bytes)
        self.session = session
        self.settings = settings
        self.doorbell = doorbell
        self.news = asyncio.Event()
        """Some source has settled something, or there is something to ask for."""
        self.pauses = pauses or Pauses()
        self._look_soon = False
        self.sources: list[OutboxSource] = []

    @staticmethod
    async def connect(name: str, postgres: PostgresSettings, outbox: OutboxSettings | None = None) -> Connection:
        """A session for the log. Raises DatabaseUnavailableError, PrivilegeError, RefusedError."""
        outbox = outbox or OutboxSettings()
        frozen_after = max(_FROZEN_AFTER, _PULSES_TO_LIVE * max(pulse_interval(outbox), outbox.standby_interval))
        session = await connect(postgres, f"pgbridge {name}")
        with answered(session):
            # A store that a crash loses is only a page that is published again: its commit need not wait for the disk.
            await session.execute(
                "select set_config('synchronous_commit', 'off', false), set_config('timezone', 'UTC', false), "
                "set_config('idle_session_timeout', %s, false), "
                # A frozen bridge that has asked for a page is not idle: the server waits for it to read.
                "set_config('tcp_user_timeout', %s, false)",
                [f"{frozen_after * 1000:.0f}ms"] * 2,
            )
        return session

    async def try_to_lead(self, readers: Sequence[Reader]) -> bool:
        """Whether this session now leads. Makes a source for each reader, where the last leader stored its position.

        Raises DatabaseUnavailableError, PrivilegeError, and SchemaError where the log's sequence is behind the log.
        """
        await require_sequence(self.session)
        # Before a reader begins, and in a standby for what it says of itself.
        await self._look_at_pauses()
        who = f"{socket.gethostname()}:{os.getpid()}"
        ((leads,),) = await fetch_all(self.session, "select bridge.take_lead($1, $2)", (self.name, who))
        if not leads:
            return False
        positions = await fetch_all(
            self.session,
            "select sink, mark, gaps, horizon, held, began from bridge.begin_reading($1, $2)",
            (self.name, json.dumps([reader._asdict() for reader in readers])),
        )
        by_sink = {reader.sink: reader for reader in readers}
        self.sources = []
        for sink, mark, gaps, horizon, held, began in positions:
            source = OutboxSource(self, by_sink[sink])
            source.start(mark, gaps, horizon, held)
            self.sources.append(source)
            if sink and began in _BEGINS:
                say = log.info if began in _EXPECTED else log.warning
                say("outbox.position", sink=sink, mark=mark, begins=began, reason=_BEGINS[began])
        # Under the last leader the bell may have said awake: what runs now may commit without ringing.
        self.doorbell.fell_asleep(await take_horizon(self.session))
        return True

    async def standby(self, readers: Sequence[Reader], left: asyncio.Event, able: Callable[[], None]) -> None:
        """Waits until this session leads: tries again and again, and at once when `left` says that a leader went.

        Calls `able` after each try, which shows that this session could lead. Raises what `try_to_lead` raises.
        """
        while True:
            # Before the look: a leader may go right after it.
            left.clear()
            leads = await self.try_to_lead(readers)
            able()
            if leads:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.standby_interval):
                    await left.wait()

    async def saw_events(self) -> None:
        """A reader has found rows: enough of them show that reading on is cheaper than being rung for."""
        if self.doorbell.answered():
            await self._set_asleep(False)

    async def fell_asleep(self) -> bool:
        """A reader has found nothing. Whether the bridge fell asleep over it, which calls for one more look."""
        if not self.doorbell.should_fall_asleep():
            return False
        await self._set_asleep(True)
        self.doorbell.fell_asleep(await take_horizon(self.session))
        return True

    async def keep(self, problems: Callable[[], Mapping[str, Problem]]) -> None:
        """Stores positions as they move, at once if they rested, and shows the server that this bridge is not frozen.

        `problems` says which sinks are behind and why; that is stored too, for `pgbridge status`. Runs until it is
        cancelled. Raises DatabaseUnavailableError once the session is lost.
        """
        known: Mapping[str, Problem] = {}
        pulse = pulse_interval(self.settings)
        next_pulse = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pulse):
                    await self.news.wait()
            await self.store()
            if time.monotonic() >= next_pulse or self._look_soon:
                next_pulse = time.monotonic() + pulse
                known = await self._pulse(known, problems())
            await asyncio.sleep(self.store_pause)

    @property
    def store_pause(self) -> float:
        """Seconds until the next store, by what the last one took."""
        took = sum(source.store_seconds for source in self.sources)
        held = sum(source.held_count for source in self.sources)
        return max(_STORE_PAUSE + _HELD_PAUSE * held, min(_LONGEST_STORE_PAUSE, _STORE_SHARE * took))

    def look_soon(self) -> None:
        """A sink was paused or resumed: what is paused is asked for now, and not with the next sign of life."""
        self._look_soon = True
        self.news.set()

    async def _look_at_pauses(self) -> None:
        self._look_soon = False
        rows = await fetch_all(self.session, "select sink, since, who, why from bridge.paused_sinks($1)", (self.name,))
        self.pauses.found({sink: Pause(*pause) for sink, *pause in rows})

    async def _pulse(self, known: Mapping[str, Problem], now: Mapping[str, Problem]) -> Mapping[str, Problem]:
        # The sign of life.
        await self._look_at_pauses()
        for sink in {*known, *now}:
            problem, before = now.get(sink), known.get(sink)
            if (problem and problem.words) != (before and before.words):
                await fetch_all(
                    self.session,
                    "select bridge.store_problem($1, $2, $3, $4)",
                    (
                        self.name,
                        sink,
                        None if problem is None else problem.words,
                        None if problem is None else problem.seconds,
                    ),
                )
        if self.doorbell.deaf(_PULSE):
            self.doorbell.woke_up()
            await self._set_asleep(False)
        return now

    async def store(self) -> None:
        """Stores what is settled. Raises DatabaseUnavailableError, PrivilegeError, SchemaError."""
        self.news.clear()
        for source in self.sources:
            await source.store()

    async def leave(self) -> None:
        """Stores the positions and hands the lead over, so that a standby need not wait for this session's end.

        Raises DatabaseUnavailableError, PrivilegeError, SchemaError.
        """
        await self.store()
        await fetch_all(self.session, "select bridge.leave_lead($1)", (self.name,))

    async def _set_asleep(self, sleeps: bool) -> None:
        await fetch_all(self.session, "select bridge.set_asleep($1, $2)", (self.name, sleeps))


def pulse_interval(settings: OutboxSettings) -> float:
    """Seconds between two signs of life of a session."""
    return max(_PULSE, settings.poll_interval)


async def require_sequence(session: Connection) -> None:
    """Raises SchemaError where the log's sequence would hand out ids below those that the log already has: nobody
    would look for them."""
    ((last_value, last_id),) = await fetch_all(session, "select last_value, last_id from bridge.sequence_state()", ())
    if last_id > last_value:
        raise SchemaError(
            f"{DSN_KEY}: the sequence bridge.outbox_id_seq is at {last_value}, and the log already has the id "
            f"{last_id}: new events would not be seen. "
            f"Run: select setval('bridge.outbox_id_seq', {last_id})"
        )


async def bury(connection: Connection, name: str, letters: Sequence[DeadLetter]) -> None:
    """Stores dead letters of the bridge `name`. Raises DatabaseUnavailableError, PrivilegeError."""
    with answered(connection):
        async with connection.cursor() as cursor:
            await cursor.executemany(_BURY, [_dead_row(name, letter) for letter in letters])


def _dead_row(name: str, letter: DeadLetter) -> tuple[Any, ...]:
    event, failure = letter.event, letter.failure
    return (
        name,
        event.id,
        event.sequence,
        event.topic,
        event.key,
        event.payload.decode(),
        event.content_type,
        Jsonb(dict(event.headers)),
        event.time,
        letter.sink,
        failure.code,
        failure.reason,
        letter.attempts,
    )
