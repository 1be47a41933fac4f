"""Reading `bridge.outbox` page by page for one reader. Who leads, and what is stored when, is outbox.py's concern."""

import asyncio
import operator
import re
import time
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

import psycopg
from psycopg.rows import TupleRow
from psycopg.types.string import ByteaBinaryLoader

from bridge.errors import DatabaseUnavailableError, NoAnswerError, SchemaError
from bridge.event import Event, read_headers
from bridge.postgres.connection import DSN_KEY, answered
from bridge.postgres.wire import Connection, Value, array_text
from bridge.sources.gaps import MANY, Gaps, Ranges, Snapshot, all_joined

_RANGE: Final = re.compile(r"\[(\d+),(\d+)\)")
_SLOW: Final = 0.03
"""Seconds; a page of the usual size takes a third of that from a database nearby."""
_GROWTH: Final = 4
"""A page grows to so many times `outbox.page_size` at most."""
_REST: Final = 3
"""Times the duration of the last read: a trickle is read in pages of a few, for a quarter of the time at most."""
_SHORTEST_REST, _LONGEST_REST = 0.003, 0.005
"""Seconds. With 1 ms at least, 30 events a second cost a seventh of a core, for looks that found nothing."""
_LONG_REST: Final = 9
"""Times the duration of the last read, for a reader in no hurry: it leaves nine tenths of the session to the others."""
_GAPS_AT_ONCE: Final = 5000
"""Old gaps that one page looks into at most, each with an index scan: some ten milliseconds."""
_LOOKED_EVERYWHERE, _SUSPECT_ENDED = 1, -1
"""What `bridge.read_page` says of its look; anything else: there was no room."""


class Position(NamedTuple):
    """A reader's position behind a page."""

    mark: int
    gaps: Ranges
    """The recent ones."""
    old_gaps: tuple[Ranges, ...] = ()
    """In parts; one that has not changed since another position is the same object."""


class Reader(NamedTuple):
    """Who reads, and what."""

    sink: str
    """The sink's name; empty for the reader that takes what no route takes."""
    patterns: Sequence[str]
    """The patterns of its topics; for the reader without a sink, the patterns of all routes."""
    start: str | None = None
    """Where it begins the first time: ``now``, ``beginning``, or None for what suits."""

    @property
    def takes_all(self) -> bool:
        """Whether no row needs to be looked at before it is taken."""
        return bool(self.sink) and "#" in self.patterns


ALL: Final = Reader("all", ("#",))
"""Takes every event of the log."""


class PageBytes:
    """How many bytes a page may have; it outlives sessions.

    A page that the way to the database does not carry without a pause of the answer's limit would be asked for again
    and again, so it halves each time that an answer does not come, down to single events, and grows back with pages
    that do.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.now = most

    def halve(self) -> None:
        """A page did not come."""
        self.now = max(1, self.now // 2)

    def grow(self) -> None:
        """A full page came."""
        self.now = min(self._most, 2 * self.now)


class Look(NamedTuple):
    """What one look into the log found."""

    events: list[Event]
    """The events that the reader takes, in order."""
    position: Position
    """Behind them."""
    xmin: int
    """Of the snapshot that looked; 0 unless it has looked at all there was to look at."""
    rows: int
    """The rows that were seen, taken or not."""


class LogReader:
    """The position of one reader in the log, and the statements that move it."""

    def __init__(
        self,
        connection: Connection,
        name: str,
        reader: Reader = ALL,
        *,
        page_size: int,
        page_bytes: int | PageBytes,
        pause: float | None = None,
    ) -> None:
        """A reader with a `pause` is in no hurry: it rests so many seconds when there is no full page to read."""
        self._connection = connection
        # A payload comes as the bytes that it is on the wire.
        connection.adapters.register_loader("varchar", ByteaBinaryLoader)
        # Events name where they come from: the database and the bridge.
        self._source = f"/{connection.info.dbname}/{name}"
        self._name = name
        self._sink = reader.sink
        self._patterns = None if reader.takes_all else array_text(reader.patterns)
        self._inverted = not reader.sink
        self._least = self._page_size = page_size
        self._page_bytes = page_bytes if isinstance(page_bytes, PageBytes) else PageBytes(page_bytes)
        self._mark = 0
        self._gaps = Gaps()
        self._stored_old: tuple[Ranges, ...] | None = None
        """The parts of the old gaps that are stored apart; None: not known."""
        self.store_seconds = 0.0
        """How long the last store took the server."""
        self._pause = pause
        self.rest = 0.0
        """Seconds to let pass before the next read while events are coming."""
        # A page and a store never overlap: a horizon must not cover a gap that was found after it was taken.
        self._turn = asyncio.Lock()

    def start(self, position: Position, horizon: int | None) -> None:
        """Goes on at a position; `horizon` is a transaction id taken after its gaps were found."""
        self._mark = position.mark
        self._gaps = Gaps(all_joined([position.gaps, *position.old_gaps]), horizon)
        self._stored_old = None

    async def read(self, most: int | None = None) -> Look:
        """Looks until there are rows, `most` of them at most, or nothing is left to look at."""
        while True:
            async with self._turn:
                look = await self._look(most)
            if look.rows or look.xmin:
                return look

    async def _look(self, most: int | None) -> Look:
        """One page, of one snapshot."""
        if self._gaps.many_fresh:
            self._gaps.set_horizon(await take_horizon(self._connection))
        began = time.monotonic()
        size = self._page_size if most is None else max(1, min(self._page_size, most))
        page_bytes = self._page_bytes.now
        due = self._gaps.due(_GAPS_AT_ONCE)
        suspects = "{" + ",".join(map(str, self._gaps.suspects)) + "}"
        place = (
            self._mark, multirange(due.ranges), due.whole, suspects, size, page_bytes, self._patterns, self._inverted,
        )  # fmt: skip
        try:
            rows = await fetch_all(
                self._connection, "select * from bridge.read_page($1, $2, $3, $4, $5, $6, $7, $8)", place
            )
        except NoAnswerError:
            self._page_bytes.halve()
            raise
        looked, text, *_, passed = rows.pop()
        snapshot = Snapshot.read(text)
        if looked == _SUSPECT_ENDED:
            self._gaps.ended(snapshot)
            return Look([], self._position, 0, 0)
        ids = [row[0] for row in rows]
        if passed:
            ids = sorted(ids + passed)
        events = self._events(rows)
        self._mark = self._gaps.saw(self._mark, ids)
        everywhere = looked == _LOOKED_EVERYWHERE
        if not everywhere:
            self._gaps.looked(snapshot, below=ids[-1] + 1)
        elif not due.whole:
            self._gaps.looked(snapshot, below=due.ranges[-1][1])
        else:
            self._gaps.looked(snapshot)
        full_of_rows = len(ids) >= size
        full_of_bytes = not full_of_rows and sum([event.weight for event in events]) >= page_bytes
        if full_of_bytes:
            self._page_bytes.grow()
        took = time.monotonic() - began
        self._page_size = self._next_size(full_of_rows, took)
        complete = everywhere and due.whole
        self.rest = self._next_rest(full_of_rows or full_of_bytes or not complete, took)
        return Look(events, self._position, snapshot.xmin if complete else 0, len(ids))

    @property
    def _position(self) -> Position:
        return Position(self._mark, self._gaps.recent, self._gaps.old)

    def _next_size(self, full: bool, seconds: float) -> int:
        """Over a long way each page costs two round trips, so while it is full and slow, the next one is larger."""
        if not full:
            return self._least
        return min(2 * self._page_size, _GROWTH * self._least) if seconds > _SLOW else self._page_size

    def _next_rest(self, full: bool, seconds: float) -> float:
        if self._pause is not None:
            return _LONG_REST * seconds if full else self._pause
        return 0.0 if full else min(max(_REST * seconds, _SHORTEST_REST), _LONGEST_REST)

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
            for sequence, event_id, topic, key, payload, content_type, headers, created_at, _ in rows
        ]

    async def store(self, position: Position, held: Collection[int] | None) -> None:
        """Stores a position that everything is settled up to, but for `held` (ids; None: those stored before). The
        caller's session must lead. Raises SchemaError when the position has been removed."""
        ids = None
        if held is not None:
            ids = [id_ for id_ in held if id_ <= position.mark]
        # Small parts come and go; the large ones are written only when they change.
        large = tuple([part for part in position.old_gaps if len(part) >= MANY])
        small = [part for part in position.old_gaps if len(part) < MANY]
        stored = self._stored_old
        unchanged = stored is not None and len(stored) == len(large) and all(map(operator.is_, stored, large))
        async with self._turn:
            rows = await fetch_all(
                self._connection,
                # Its time is the server's: here it may have waited for the session behind a page of megabytes.
                "select bridge.store_cursor($1, $2, $3, $4, $5, $6), "
                "extract(epoch from clock_timestamp() - now())::float8",
                (
                    self._name,
                    self._sink,
                    position.mark,
                    multirange(all_joined([position.gaps, *small])),
                    None if unchanged else multirange(all_joined(large)),
                    ids,
                ),
            )
            ((horizon, self.store_seconds),) = rows
            if horizon is None:
                raise SchemaError(
                    f"{DSN_KEY}: somebody removed the position of the sink {self._sink!r} of the bridge "
                    f"{self._name!r} from bridge.cursor while it was in use"
                )
            self._stored_old = large
            self._gaps.set_horizon(horizon)

    async def close_gaps(self) -> None:
        """Takes a horizon for gaps that have none, when nothing is stored that would bring one."""
        if self._gaps.wants_horizon:
            async with self._turn:
                self._gaps.set_horizon(await take_horizon(self._connection))


async def take_horizon(connection: Connection) -> int:
    """A new transaction id: every transaction that began before has a lower one, or none yet."""
    ((horizon,),) = await fetch_all(connection, "select bridge.take_horizon()", ())
    return int(horizon)


async def fetch_all(connection: Connection, query: str, values: tuple[Value, ...]) -> list[TupleRow]:
    """Runs one prepared statement. Raises DatabaseUnavailableError, PrivilegeError, SchemaError."""
    with answered(connection):
        try:
            return await connection.rows(query, *values)
        except psycopg.errors.IdleSessionTimeout as error:
            raise DatabaseUnavailableError("the session ended while this process was frozen") from error


def multirange(ranges: Ranges) -> str:
    """As the SQL functions take it: the text takes a tenth of the time of psycopg's Multirange."""
    return "{" + ",".join([f"[{low},{high})" for low, high in ranges]) + "}"


def read_multirange(text: str) -> Ranges:
    """From PostgreSQL's text of a multirange."""
    return tuple([(int(low), int(high)) for low, high in _RANGE.findall(text)])
