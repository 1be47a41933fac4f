"""Scheduled events, those of `emit(at => ...)`: moved from `bridge.scheduled` into the log when they are due.

The leader does it, on the session that it leads by. A move is one statement, so an event is in one table or the other,
whoever dies meanwhile. It looks when the next event is due; `emit()` wakes it for one that comes before. A look every
poll interval backs that, for clocks that are set and wakings that are lost.
"""

import asyncio
import contextlib
import time
from typing import Final, NamedTuple

from bridge.postgres.wire import Connection
from bridge.sources.log import fetch_all

_AT_ONCE: Final = 500
"""Events of one move: some ten milliseconds, in which the session reads nothing."""
_BYTES_AT_ONCE: Final = 8_000_000
"""Of payloads, one move."""
_SHORTEST_REST: Final = 0.02
"""Seconds between two rounds, however soon the next event is due."""
_BEGINNING_SHARE: Final = 10
"""A look from the beginning comes no sooner than after so many times what the last one took. While an old snapshot
lives, it walks through all rows that were moved since."""

_MOVE: Final = """
select moved, blocked, moved_until, last_at, last_id, next_in
from bridge.move_due($1::text::timestamptz, $2::text::timestamptz, $3, $4, $5)
"""


class _Place(NamedTuple):
    """Behind an event, in the order of their times."""

    at: str
    """As PostgreSQL writes it, to the microsecond."""
    id: int


_BEGINNING: Final = _Place("-infinity", 0)


class Schedule:
    """Moves what is due, for the bridge that leads on `session`."""

    def __init__(self, session: Connection, poll_interval: float) -> None:
        """`poll_interval`: the most seconds between two looks."""
        self._session = session
        self._poll_interval = poll_interval
        self._news = asyncio.Event()
        self._behind = _BEGINNING
        """What is visible up to here was moved. What commits later than its time may still appear."""
        self._look_from_beginning_at = time.monotonic()

    def wake(self) -> None:
        """An event was scheduled that is due before all others."""
        self._news.set()

    async def move_for_ever(self) -> None:
        """Moves events as they become due, until it is cancelled. Raises DatabaseUnavailableError, PrivilegeError."""
        while True:
            self._news.clear()
            next_in = await self._round()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._poll_interval, max(_SHORTEST_REST, next_in))):
                    await self._news.wait()

    async def _round(self) -> float:
        """Moves all that is due now. Gives the seconds until the next event is.

        Rests after each move for as long as it took, so that the session has half of its time for the log.
        """
        place = _BEGINNING if time.monotonic() >= self._look_from_beginning_at else self._behind
        until, blocked = None, 0
        while True:
            began = time.monotonic()
            [(moved, now_blocked, until, last_at, last_id, next_in)] = await fetch_all(
                self._session, _MOVE, (until, place.at, place.id, _AT_ONCE + blocked, _BYTES_AT_ONCE)
            )
            took = time.monotonic() - began
            if place is _BEGINNING:
                self._look_from_beginning_at = began + _BEGINNING_SHARE * took
            await asyncio.sleep(took)
            if not moved and now_blocked <= blocked:
                return self._poll_interval if next_in is None else next_in
            if now_blocked:
                # Whatever follows in a key of theirs must see them.
                place = _BEGINNING
            else:
                place = self._behind = _Place(last_at, last_id)
            blocked = now_blocked
