"""Looking through the log, as a person does: newest first, a page at a time, with a bound on what is looked at.

The log has no index but its primary key. So a search reads it from its end in parts of some milliseconds each, and says
how much of it that was when it stops without a full page; whoever wants more goes on from there.
"""

import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from psycopg.rows import class_row

from bridge.errors import UsageError
from bridge.postgres.connection import answered
from bridge.postgres.wire import Connection

PAGE: Final = 50
"""Events of one page."""

BOUND: Final = 20_000
"""Events that one search looks at, at most."""

BUDGET: Final = 1.0
"""Seconds after which a search begins no further part."""

_CHUNK: Final = 1000
"""Events of one part."""

_CHUNK_BYTES: Final = 4_000_000
"""Of payload, that are read in one part to find a text; or one event."""

_LONGEST_FILTER: Final = 1024
"""Characters of each filter."""

NEIGHBOURS: Final = 5
"""Events of a key, before another and behind it."""

NEIGHBOURHOOD: Final = 5000
"""Events before another that are looked at for those, and as many behind it."""

CONTENT: Final = 65_536
"""Characters of a payload that are shown."""

_END: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Search:
    """Which events are wanted; what is None or empty fits all."""

    topics: tuple[str, ...] = ()
    """Patterns."""
    key: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    """Before then."""
    header: str | None = None
    """A header's name; with `value`, whose value is that."""
    value: str | None = None
    text: str | None = None
    """Stands in the payload, letter by letter."""

    def __post_init__(self) -> None:
        """Raises UsageError for what can be no filter."""
        for name in ("key", "header", "value", "text"):
            given = getattr(self, name)
            if given is not None and (len(given) > _LONGEST_FILTER or "\0" in given):
                raise UsageError(f"{name}: at most {_LONGEST_FILTER:,} characters, none of them NUL")
        if sum(map(len, self.topics)) > _LONGEST_FILTER or any("\0" in topic for topic in self.topics):
            raise UsageError(f"topics: at most {_LONGEST_FILTER:,} characters, none of them NUL")
        if self.value is not None and self.header is None:
            raise UsageError("value: is that of a header, whose name is not given")

    @property
    def is_everything(self) -> bool:
        """Whether every event fits."""
        return self == Search()


@dataclass(frozen=True, slots=True)
class Listed:
    """An event of the log, with the beginning of its payload."""

    id: int
    """Its number."""
    event_id: str
    topic: str
    key: str | None
    content_type: str
    bytes: int
    """Of the payload."""
    recorded_at: datetime
    head: str
    """200 characters of the payload at most."""


@dataclass(frozen=True, slots=True)
class Page:
    """What a search has found, the newest first."""

    events: list[Listed]
    next_before: int | None
    """Where the next page, or the rest of the search, begins; None at the beginning of the log."""
    looked: int
    """Events that were looked at. With a full page some of them belong to the next one."""
    is_full: bool
    """Whether it ended with a full page; otherwise it has come to the log's beginning, or to its own bound."""


_SEARCH: Final = """
select looked, next_before, id, event_id::text, topic, key, content_type, bytes, recorded_at, head
from bridge.search_events(%s, %s, %s, %s, %s, %s::text[], %s::text, %s::timestamptz, %s::timestamptz, %s::text,
    %s::text, %s::text)
"""


async def search(
    connection: Connection, wanted: Search, before: int | None = None, *, page: int = PAGE, bound: int = BOUND
) -> Page:
    """Looks at no more than `bound` events with numbers below `before`; None: from the end of the log.

    Raises DatabaseUnavailableError, PrivilegeError, SchemaError.
    """
    began = time.monotonic()
    below, above = await _range(connection, wanted, before)
    found: list[Listed] = []
    looked = 0
    while True:
        # One more than is shown tells whether there is a next page.
        most = page + 1 - len(found)
        chunk = most if wanted.is_everything else min(_CHUNK, bound - looked)
        rows = await _part(connection, wanted, below, above, chunk, most)
        part, next_before = rows[0][:2]
        looked += part
        found += [Listed(*row[2:]) for row in rows if row[2] is not None]
        if len(found) > page:
            return Page(found[:page], found[page - 1].id, looked, is_full=True)
        if next_before is None:
            return Page(found, None, looked, is_full=False)
        below = next_before
        if not wanted.is_everything and (looked >= bound or time.monotonic() - began > BUDGET):
            return Page(found, below, looked, is_full=False)


async def _range(connection: Connection, wanted: Search, before: int | None) -> tuple[int, int]:
    """Numbers below the first and from the second on may have been recorded in the time that is asked for. Numbers
    rise with times, but not strictly: transactions run side by side, and clocks are set."""
    below, above = _END if before is None else before, 0
    if wanted.since is not None or wanted.until is not None:
        rows = await _all(
            connection,
            "select bridge.position_at(%s::timestamptz - interval '1 minute'), "
            "bridge.position_at(%s::timestamptz + interval '1 minute')",
            wanted.since,
            wanted.until,
        )
        [(since, until)] = rows
        if wanted.since is not None:
            above = since
        if wanted.until is not None:
            below = min(below, until)
    return below, above


async def _part(
    connection: Connection, wanted: Search, below: int, above: int, chunk: int, most: int
) -> list[tuple[Any, ...]]:
    return await _all(
        connection, _SEARCH, below, above, chunk, most, _CHUNK_BYTES, list(wanted.topics) or None, wanted.key,
        wanted.since, wanted.until, wanted.header, wanted.value, wanted.text,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Content:
    """What an event carries."""

    payload: str
    """65,536 characters of it at most."""
    is_whole: bool
    headers: dict[str, Any]
    """`traceparent` and `actor` among them, where the event has them. Texts, but in rows that were made by hand."""


async def content(connection: Connection, number: int) -> Content | None:
    """Of the event with this number; None where the log does not have it. Raises as `search`."""
    rows = await _all(
        connection, "select payload, is_whole, headers from bridge.event_content(%s, %s)", number, CONTENT
    )
    if not rows:
        return None
    [(payload, is_whole, headers)] = rows
    return Content(payload, is_whole, headers if isinstance(headers, dict) else {})


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another event of the same key."""

    id: int
    event_id: str
    topic: str
    bytes: int
    recorded_at: datetime


async def neighbours(connection: Connection, number: int, key: str) -> list[Neighbour]:
    """The nearest events of a key, in their order, before and behind the event with this number. Raises as `search`."""
    async with connection.cursor(row_factory=class_row(Neighbour)) as cursor:
        with answered(connection):
            await cursor.execute(
                "select id, event_id::text as event_id, topic, bytes, recorded_at "
                "from bridge.event_neighbours(%s, %s, %s, %s)",
                (number, key, NEIGHBOURS, NEIGHBOURHOOD),
            )
            return await cursor.fetchall()


async def _all(connection: Connection, query: str, *values: Any) -> list[tuple[Any, ...]]:
    with answered(connection):
        cursor = await connection.execute(query.encode(), values)
        return await cursor.fetchall()


async def newest(connection: Connection) -> int:
    """The number of the newest event; 0 where the log is empty. Raises as `search`."""
    [(number,)] = await _all(connection, "select coalesce(max(id), 0) from bridge.outbox")
    return int(number)
