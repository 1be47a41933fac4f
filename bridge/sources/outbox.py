"""The log as a source, for the bridge that leads: one per name.

Everything runs on one session, which holds the advisory lock of the lead: a bridge that lost its session can store
nothing. After any loss the stored cursor is read again; nothing in memory outlives the session.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

from psycopg import Notify
from psycopg.types.json import Jsonb

from bridge.postgres.connection import Connection, answered, connect
from bridge.settings import OutboxSettings, PostgresSettings
from bridge.sources import DeadLetter, Page
from bridge.sources.doorbell import Doorbell
from bridge.sources.log import LogReader, Position

_FROZEN_AFTER: Final = "15s"
"""The server ends a session that is silent for so long: its bridge is frozen, and another one may lead."""
_PULSE: Final = 2.0
"""Seconds between two signs of life while the relay has no room for another page."""
_STORE_PAUSE: Final = 0.05
"""Seconds between two stores of the cursor. What was settled since the last one is published again after a crash."""

_BURY: Final = """
insert into bridge.dead_letter
    (bridge, event_id, sequence, topic, key, payload, content_type, headers, created_at, sink, code, reason, attempts)
values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
on conflict do nothing
"""


class Calls:
    """What the database calls out to the bridge `name`: that there are events, and that a leader left."""

    CHANNELS = ("bridge_bell", "bridge_lead")

    def __init__(self, name: str, doorbell: Doorbell) -> None:
        self._name = name
        self.doorbell = doorbell
        self.left = asyncio.Event()
        """Set when a bridge of this name hands the lead over."""

    def heard(self, notification: Notify) -> None:
        """Takes a notification of one of CHANNELS."""
        if notification.channel == "bridge_bell":
            self.doorbell.ring()
        elif notification.payload == self._name:
            self.left.set()


class OutboxSource:
    """The log, read by the leader of `name`. Implements `bridge.sources.Source`."""

    def __init__(self, name: str, connection: Connection, outbox: OutboxSettings, doorbell: Doorbell) -> None:
        self._name = name
        self._connection = connection
        self._log = LogReader(connection, name, page_size=outbox.page_size, page_bytes=outbox.page_bytes)
        self._doorbell = doorbell
        self._settled: Position | None = None
        """Where everything is settled, and the cursor is not stored yet."""
        self._news = asyncio.Event()

    @staticmethod
    async def connect(name: str, postgres: PostgresSettings) -> Connection:
        """A session for a source. Raises DatabaseUnavailableError, PrivilegeError, RefusedError."""
        session = await connect(postgres, f"pgbridge {name}")
        with answered(session):
            # A store that a crash loses is only a page that is published again: its commit need not wait for the disk.
            await session.execute(
                "select set_config('synchronous_commit', 'off', false), set_config('timezone', 'UTC', false), "
                "set_config('idle_session_timeout', %s, false), "
                # A frozen bridge that has asked for a page is not idle: the server waits for it to read.
                "set_config('tcp_user_timeout', %s, false)",
                (_FROZEN_AFTER, _FROZEN_AFTER),
            )
        return session

    async def try_to_lead(self) -> bool:
        """Whether this session now leads. Takes up the work where the last leader stored it.

        Raises DatabaseUnavailableError, PrivilegeError, SchemaError.
        """
        who = f"{socket.gethostname()}:{os.getpid()}"
        rows = await self._log.fetch_all("select mark, gaps, horizon from bridge.take_lead(%s, %s)", (self._name, who))
        if not rows:
            return False
        mark, gaps, horizon = rows[0]
        self._log.start(Position(mark, tuple((gap.lower, gap.upper) for gap in gaps)), horizon)
        # Under the last leader the bell may have said awake: what runs now may commit without ringing.
        self._doorbell.fell_asleep(await self._log.take_horizon())
        return True

    async def standby(self, left: asyncio.Event, able: Callable[[], None]) -> None:
        """Waits until this session leads: tries every second, and at once when `left` says that a leader went.

        Calls `able` after each try, which shows that this session could lead. Raises what `try_to_lead` raises.
        """
        while True:
            # Before the look: a leader may go right after it.
            left.clear()
            leads = await self.try_to_lead()
            able()
            if leads:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await left.wait()

    async def read(self) -> Page:
        """The next page; sleeps until the doorbell rings while there is none. Raises DatabaseUnavailableError."""
        while True:
            if not self._doorbell.asleep:
                await asyncio.sleep(self._log.rest)
            events, position, xmin = await self._log.read()
            if events:
                if self._doorbell.answered():
                    await self._set_asleep(False)
                return Page(events, position)
            await self._log.close_gaps()
            if self._doorbell.should_fall_asleep():
                await self._set_asleep(True)
                self._doorbell.fell_asleep(await self._log.take_horizon())
            else:
                await self._doorbell.wait(xmin)

    async def settle(self, page: Page) -> None:
        """Remembers the position behind the page; `keep` and `leave` store it."""
        self._settled = cast(Position, page.position)
        self._news.set()

    async def store(self) -> None:
        """Stores the cursor behind what is settled. Raises DatabaseUnavailableError, PrivilegeError, SchemaError."""
        self._news.clear()
        if (settled := self._settled) is None:
            return
        await self._log.store(self._name, settled)
        # Not before: a stop may interrupt the store, and leave() makes up for it.
        if self._settled is settled:
            self._settled = None

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        """Writes them into `bridge.dead_letter`. Raises DatabaseUnavailableError, PrivilegeError."""
        await bury(self._connection, self._name, letters)

    async def keep(self) -> None:
        """Stores the cursor as it moves, at once if it rested, and shows the server that this bridge is not frozen.

        Runs until it is cancelled. Raises DatabaseUnavailableError once the session is lost.
        """
        while True:
            try:
                async with asyncio.timeout(_PULSE):
                    await self._news.wait()
            except TimeoutError:
                await self._log.fetch_all("select 1", ())
            else:
                await self.store()
                await asyncio.sleep(_STORE_PAUSE)

    async def leave(self) -> None:
        """Stores the cursor and hands the lead over, so that a standby need not wait for this session's end.

        Raises DatabaseUnavailableError, PrivilegeError, SchemaError.
        """
        await self.store()
        await self._log.fetch_all("select bridge.leave_lead(%s)", (self._name,))

    async def _set_asleep(self, sleeps: bool) -> None:
        await self._log.fetch_all("select bridge.set_asleep(%s, %s)", (self._name, sleeps))


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
