"""The log as a source: reads `bridge.outbox` by a mark and its gaps, and leads, one bridge per name.

Everything runs on one session, which holds the advisory lock of the lead: a bridge that lost its session can store
nothing. After any loss the stored cursor is read again; nothing in memory outlives the session.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from psycopg.types.json import Jsonb
from psycopg.types.multirange import Multirange
from psycopg.types.range import Range

from bridge.errors import DatabaseUnavailableError, SchemaError
from bridge.event import NO_HEADERS, Event, header_values
from bridge.postgres import connect, database_errors
from bridge.settings import OutboxSettings, PostgresSettings
from bridge.sources import DeadLetter, Page
from bridge.sources.doorbell import Doorbell
from bridge.sources.gaps import Gaps, Ranges

_FROZEN_AFTER = "15s"
"""The server ends a session that is silent for so long: its bridge is frozen, and another one may lead."""
_PULSE = 2.0
"""Seconds between two signs of life while the relay has no room for another page."""

_READ = "select * from bridge.read_page(%s, %s, %s, %s)"
_STORE = "select bridge.store_cursor(%s, %s, %s)"
_BURY = """
insert into bridge.dead_letter
    (bridge, event_id, sequence, topic, key, payload, content_type, headers, created_at, sink, code, reason, attempts)
values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
on conflict do nothing
"""


class Position(NamedTuple):
    """Where the reader stands behind a page."""

    mark: int
    gaps: Ranges


class OutboxSource:
    """The log, read by the leader of `name`. Implements `bridge.sources.Source`."""

    def __init__(self, name: str, postgres: PostgresSettings, outbox: OutboxSettings) -> None:
        self._name = name
        self._postgres = postgres
        self._outbox = outbox
        self._connection: AsyncConnection[TupleRow]
        self._source = ""
        self._mark = 0
        self._gaps = Gaps()
        # A page and a store never overlap: a horizon must not cover a gap that was found after it was taken.
        self._turn = asyncio.Lock()
        self._doorbell = Doorbell(name, outbox.poll_interval)

    async def open(self) -> None:
        """Connects; leads nothing yet. Raises DatabaseUnavailableError, PrivilegeError, RefusedError."""
        # A store that a crash loses is only a page that is published again, so its commit need not wait for the disk.
        self._connection = await connect(
            self._postgres,
            f"pgbridge {self._name}",
            options=f"-c synchronous_commit=off -c idle_session_timeout={_FROZEN_AFTER} -c timezone=UTC",
        )
        # Published without a change: a server's own encoding would be converted on the way.
        self._source = f"/{self._connection.info.dbname}/{self._name}"

    async def try_to_lead(self) -> bool:
        """Whether this session now leads. Takes up the work where the last leader stored it."""
        who = f"{socket.gethostname()}:{os.getpid()}"
        row = await self._fetch("select mark, gaps, horizon from bridge.take_lead(%s, %s)", (self._name, who))
        if row is None:
            return False
        self._mark = row[0]
        self._gaps = Gaps(tuple((gap.lower, gap.upper) for gap in row[1]), row[2])
        # Under the last leader the bell may have said awake: what runs now may commit without ringing.
        self._doorbell.fell_asleep(await self._take_horizon())
        return True

    async def standby(self, rung: asyncio.Event) -> None:
        """Waits until this session leads: tries every second, and at once when `rung` says that a leader left."""
        while not await self.try_to_lead():
            rung.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await rung.wait()

    @property
    def doorbell(self) -> Doorbell:
        """What wakes `read`."""
        return self._doorbell

    async def read(self) -> Page:
        while True:
            page, xmin = await self._read_page()
            if page.events:
                if self._doorbell.answered(len(page.events)):
                    await self._set_asleep(False)
                return page
            if self._gaps.wants_horizon:
                async with self._turn:
                    self._gaps.set_horizon(await self._take_horizon())
            if self._doorbell.should_fall_asleep():
                await self._set_asleep(True)
                self._doorbell.fell_asleep(await self._take_horizon())
                continue
            await self._doorbell.wait(xmin)

    async def _read_page(self) -> tuple[Page, int]:
        async with self._turn:
            limits = (self._outbox.page_size, self._outbox.page_bytes)
            rows = await self._fetch_all(_READ, (self._mark, _multirange(self._gaps.all()), *limits))
            xmin: int = rows[0][0]
            events = self._events(rows)
            ids = [event.sequence for event in events]
            full = len(ids) >= limits[0] or sum([len(event.payload) for event in events]) >= limits[1]
            looked_everywhere = not full or ids[-1] > self._mark
            self._mark = self._gaps.saw(self._mark, ids)
            if looked_everywhere:
                self._gaps.looked(xmin)
            return Page(events, Position(self._mark, self._gaps.all())), xmin

    def _events(self, rows: list[TupleRow]) -> list[Event]:
        source = self._source
        return [
            Event(
                event_id,
                topic,
                payload,
                key,
                source,
                created_at,
                content_type,
                header_values(json.loads(headers)) if headers else NO_HEADERS,
                sequence,
            )
            for sequence, event_id, topic, key, payload, content_type, headers, created_at in rows[1:]
        ]

    async def _take_horizon(self) -> int:
        ((horizon,),) = await self._fetch_all("select bridge.take_horizon()", ())
        return int(horizon)

    async def settle(self, page: Page) -> None:
        mark, gaps = cast(Position, page.position)
        async with self._turn:
            row = await self._fetch(_STORE, (self._name, mark, _multirange(gaps)))
            if row is None or row[0] is None:
                raise SchemaError(f"bridge.cursor has lost its row for {self._name!r}; restart the bridge")
            self._gaps.set_horizon(row[0])

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        with database_errors():
            async with self._connection.cursor() as cursor:
                await cursor.executemany(_BURY, [self._dead_row(letter) for letter in letters])

    def _dead_row(self, letter: DeadLetter) -> tuple[Any, ...]:
        event, failure = letter.event, letter.failure
        return (
            self._name,
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

    async def pulse(self) -> None:
        """Shows the server that this bridge is not frozen; runs until it is cancelled or the session is lost."""
        while True:
            await asyncio.sleep(_PULSE)
            await self._fetch("select 1", ())

    async def leave(self) -> None:
        """Hands the lead over, so that a standby need not wait for this session's end."""
        await self._fetch("select bridge.leave_lead(%s)", (self._name,))

    async def close(self) -> None:
        """Disconnects, which also ends the lead."""
        await self._connection.close()

    async def _set_asleep(self, sleeps: bool) -> None:
        await self._fetch("select bridge.set_asleep(%s, %s)", (self._name, sleeps))

    async def _fetch(self, query: str, values: tuple[Any, ...]) -> TupleRow | None:
        rows = await self._fetch_all(query, values)
        return rows[0] if rows else None

    async def _fetch_all(self, query: str, values: tuple[Any, ...]) -> list[TupleRow]:
        with database_errors():
            try:
                cursor = await self._connection.execute(query, values, prepare=True, binary=True)
            except psycopg.errors.IdleSessionTimeout as error:
                raise DatabaseUnavailableError("the session ended while this process was frozen") from error
            rows: list[TupleRow] = await cursor.fetchall()
            return rows


def _multirange(ranges: Ranges) -> Multirange[int]:
    return Multirange([Range(low, high) for low, high in ranges])
