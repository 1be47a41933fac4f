"""Reading `bridge.outbox` page by page, in one session. Who leads, and what is stored, is outbox.py's concern."""

import asyncio
import time
from typing import Any, Final, NamedTuple

import psycopg
from psycopg.rows import TupleRow
from psycopg.types.multirange import Multirange
from psycopg.types.range import Range

from bridge.errors import DatabaseUnavailableError
from bridge.event import Event, read_headers
from bridge.postgres.connection import Connection, answered
from bridge.sources.gaps import Gaps, Ranges

_SLOW: Final = 0.03
"""Seconds; a page of the usual size takes a third of that from a database nearby."""
_GROWTH: Final = 4
"""A page grows to so many times `outbox.page_size` at most."""
_REST: Final = 3
"""Times the duration of the last read: a trickle is read in pages of a few, for a quarter of the time at most."""
_SHORTEST_REST, _LONGEST_REST = 0.001, 0.005


class Position(NamedTuple):
    """A reader's position behind a page."""

    mark: int
    gaps: Ranges


class LogReader:
    """The position in the log, and the statements that move it."""

    def __init__(self, connection: Connection, name: str, *, page_size: int, page_bytes: int) -> None:
        self._connection = connection
        # Events name where they come from: the database and the bridge.
        self._source = f"/{connection.info.dbname}/{name}"
        self._least = self._page_size = page_size
        self._page_bytes = page_bytes
        self._mark = 0
        self._gaps = Gaps()
        self.rest = 0.0
        """Seconds to let pass before the next read while events are coming; 0 behind a full page."""
        # A page and a store never overlap: a horizon must not cover a gap that was found after it was taken.
        self._turn = asyncio.Lock()

    def start(self, position: Position, horizon: int | None) -> None:
        """Goes on at a position; `horizon` is a transaction id taken after its gaps were found."""
        self._mark = position.mark
        self._gaps = Gaps(position.gaps, horizon)

    async def read(self) -> tuple[list[Event], Position, int]:
        """The next events, none if there are none; the position behind them; the xmin of the snapshot that looked."""
        async with self._turn:
            began = time.monotonic()
            rows = await self.fetch_all(
                "select * from bridge.read_page(%s, %s, %s, %s)",
                (self._mark, multirange(self._gaps.all()), self._page_size, self._page_bytes),
            )
            xmin: int = rows[0][0]
            events = self._events(rows)
            ids = [event.sequence for event in events]
            full = len(ids) >= self._page_size or sum([len(event.payload) for event in events]) >= self._page_bytes
            looked_everywhere = not full or ids[-1] > self._mark
            self._mark = self._gaps.saw(self._mark, ids)
            if looked_everywhere:
                self._gaps.looked(xmin)
            took = time.monotonic() - began
            self._page_size = self._next_size(full, took)
            self.rest = 0.0 if full else min(max(_REST * took, _SHORTEST_REST), _LONGEST_REST)
            return events, Position(self._mark, self._gaps.all()), xmin

    def _next_size(self, full: bool, seconds: float) -> int:
        """Over a long way each page costs two round trips, so while it is full and slow, the next one is larger."""
        if not full:
            return self._least
        return min(2 * self._page_size, _GROWTH * self._least) if seconds > _SLOW else self._page_size

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
                read_headers(headers),
                sequence,
            )
            for sequence, event_id, topic, key, payload, content_type, headers, created_at in rows[1:]
        ]

    async def store(self, name: str, position: Position) -> None:
        """Stores a position that everything is settled up to. The caller's session must lead."""
        async with self._turn:
            ((horizon,),) = await self.fetch_all(
                "select bridge.store_cursor(%s, %s, %s)", (name, position.mark, multirange(position.gaps))
            )
            self._gaps.set_horizon(horizon)

    async def close_gaps(self) -> None:
        """Takes a horizon for gaps that have none, when nothing is stored that would bring one."""
        if self._gaps.wants_horizon:
            async with self._turn:
                self._gaps.set_horizon(await self.take_horizon())

    async def take_horizon(self) -> int:
        """A new transaction id: every transaction that began before has a lower one, or none yet."""
        ((horizon,),) = await self.fetch_all("select bridge.take_horizon()", ())
        return int(horizon)

    async def fetch_all(self, query: str, values: tuple[Any, ...]) -> list[TupleRow]:
        """Runs one statement. Raises DatabaseUnavailableError, PrivilegeError, SchemaError."""
        with answered(self._connection):
            try:
                cursor = await self._connection.execute(query, values, prepare=True, binary=True)
            except psycopg.errors.IdleSessionTimeout as error:
                raise DatabaseUnavailableError("the session ended while this process was frozen") from error
            return await cursor.fetchall()


def multirange(ranges: Ranges) -> Multirange[int]:
    """As the SQL functions take it."""
    return Multirange([Range(low, high) for low, high in ranges])
