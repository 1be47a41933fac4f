"""The loop: read a page, publish it, settle it; one relay for each sink, so that none waits for another's trouble.

A page is settled when each of its events is confirmed, among the dead letters, or *held*: the broker said no for now,
and the event waits with all that follows in its key (`lane.py`). The source hears of a page only when all pages before
are settled too, and of what is held with it. So one full queue stops its keys, and nothing else.

Everything is bounded. Events in flight follow the confirms, as TCP's window does: about what comes back in two seconds.
Bytes in flight and held, and the number of held events, have limits; beyond them this relay reads no more until there
is room.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from typing import Final

import structlog

from bridge.brokers.contract import Never, Sink
from bridge.event import Event, trace_fields
from bridge.lane import Lane, sink_outage
from bridge.process.metrics import (
    BYTES_IN_FLIGHT,
    EVENTS_DEAD,
    EVENTS_HELD,
    EVENTS_IN_FLIGHT,
    EVENTS_READ,
    SETTLE_SECONDS,
)
from bridge.process.outage import Outage
from bridge.sources import DeadLetter, Page, Source

log = structlog.get_logger()

_WINDOW_HORIZON: Final = 1.0
"""Seconds whose confirms say how large the window is."""
_WINDOW_FACTOR: Final = 2
"""So many times the confirms of that time may be in flight, so that the window can grow."""
_FIRST_WINDOW: Final = 2000
"""Events that may be in flight while it is not known how fast confirms come."""
_SMALLEST_WINDOW: Final = 500
"""Events that may be in flight however slowly they come."""
_PARTS_READ: Final = 4
"""A page is read once one of so many parts of the window is free: small pages cost as much as large ones."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may be in flight and held, and how failures are tried again; times in seconds."""

    events_in_flight: int = 16_000
    bytes_in_flight: int = 64_000_000
    held_events: int = 10_000
    retry_initial: float = 0.1
    retry_max: float = 10.0
    shutdown_limit: float = 20.0


class Window:
    """How many events may be in flight, by what was confirmed lately.

    It shrinks only after it was full for a while: of one with room, confirms say how much was sent, not how much comes
    back.
    """

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._size = self._first = min(largest, _FIRST_WINDOW)
        self._confirms: deque[tuple[float, int]] = deque()
        self._recent = 0
        self._full_since: float | None = None

    def confirmed(self, count: int) -> None:
        """So many more were confirmed."""
        self._confirms.append((time.monotonic(), count))
        self._recent += count

    def room(self, in_flight: int) -> int:
        """How many more events may go now, beside those in flight; 0 until it is worth a page."""
        now = time.monotonic()
        while self._confirms and self._confirms[0][0] < now - _WINDOW_HORIZON:
            self._recent -= self._confirms.popleft()[1]
        earned = min(self._largest, max(_SMALLEST_WINDOW, _WINDOW_FACTOR * self._recent))
        if not in_flight:
            self._size, self._full_since = max(earned, self._first), None
        elif earned >= self._size or (self._full_since is not None and now - self._full_since >= _WINDOW_HORIZON):
            self._size = earned
        room = self._size - in_flight
        if room >= max(1, self._size // _PARTS_READ):
            self._full_since = None
            return room
        if self._full_since is None:
            self._full_since = now
        return 0


@dataclass(slots=True, eq=False)
class _InFlight:
    """A page on its way. Implements `bridge.lane.Settles`."""

    relay: "Relay"
    number: int
    position: object
    first: datetime | None
    """When its first event was recorded."""
    bytes: int
    unsettled: int

    def confirmed(self, count: int) -> None:
        self.relay.window.confirmed(count)
        self._settled(count)

    def held(self, count: int) -> None:
        self._settled(count)

    def refused(self, event: Event, failure: Never, attempts: int, *, was_held: bool) -> None:
        self.relay.refused(event, failure, attempts)
        if not was_held:
            self._settled(1)

    def _settled(self, count: int) -> None:
        self.unsettled -= count
        self.relay.settled(count, done=not self.unsettled)


class Relay:
    """Carries events from one source to one sink until it is stopped."""

    def __init__(
        self,
        source: Source,
        name: str,
        sink: Sink,
        *,
        limits: Limits | None = None,
        outage: Outage | None = None,
        pipelined: bool = True,
        careful: bool = False,
    ) -> None:
        """`outage` of the sink, for a caller that wants to know of it; the relay makes one otherwise.

        `pipelined`: a key's events may go together while nothing is refused. `careful`: the sink has refused something
        lately.
        """
        self.name = name
        self.window = Window((limits or Limits()).events_in_flight)
        self._source = source
        self._sink = sink
        self._limits = limits or Limits()
        self._outage = outage or sink_outage(
            name, retry_initial=self._limits.retry_initial, retry_max=self._limits.retry_max
        )
        self._pipelined = pipelined
        self._careful = careful
        self._observe = SETTLE_SECONDS.labels(name).observe
        self._count_read = EVENTS_READ.labels(name).inc
        self._events_in_flight = EVENTS_IN_FLIGHT.labels(name)
        self._bytes_in_flight = BYTES_IN_FLIGHT.labels(name)
        self._events_held = EVENTS_HELD.labels(name)
        self._lane: Lane | None = None
        self._pages: deque[_InFlight] = deque()
        self._position: object = None
        """Behind the last page that is settled."""
        self._letters: list[DeadLetter] = []
        self._unsettled = 0
        self._bytes = 0
        self._progress = asyncio.Event()
        self._room = asyncio.Event()
        self._empty = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until `stop` is set and what is in flight is settled, or the limit for that has passed.

        Raises what the source raises, as an ExceptionGroup; then what was in flight is read again by whoever
        leads next.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                self._lane = Lane(
                    self.name,
                    self._sink,
                    tasks,
                    self._outage,
                    changed=self._progress.set,
                    pipelined=self._pipelined,
                    careful=self._careful,
                )
                tasks.create_task(self._settle_pages())
                tasks.create_task(self._lane.watch())
                reading = tasks.create_task(self._read_pages(self._lane))
                await self._wind_up(stop, reading)
        except* _Stopped:
            log.debug("relay.stopped", sink=self.name)
        finally:
            for gauge in (self._events_in_flight, self._bytes_in_flight, self._events_held):
                gauge.set(0)

    # Stopping

    async def _wind_up(self, stop: asyncio.Event, reading: asyncio.Task[None]) -> None:
        await stop.wait()
        reading.cancel()
        await self._drain()
        # The end of the task group would ask a read that is still being called off once more, and a statement that is
        # asked twice gives up the session, which other relays use and the positions are stored on.
        await asyncio.wait((reading,))
        raise _Stopped

    async def _drain(self) -> None:
        self._empty.clear()
        if not self._pages:
            return
        try:
            async with asyncio.timeout(self._limits.shutdown_limit):
                await self._empty.wait()
        except TimeoutError:
            log.warning(
                "relay.stopped_with_events_in_flight",
                sink=self.name,
                events=self._unsettled,
                hint="they are published again at the next start",
            )

    # Reading

    async def _read_pages(self, lane: Lane) -> None:
        number = 0
        while True:
            page = await self._source.read(await self._wait_for_room(lane))
            number += 1
            self._dispatch(lane, number, page)

    async def _wait_for_room(self, lane: Lane) -> int:
        """How many events the next page may have."""
        while True:
            room = self.window.room(self._unsettled)
            fits = self._bytes + lane.held_bytes < self._limits.bytes_in_flight
            if room and fits and lane.held_count < self._limits.held_events:
                return room
            self._room.clear()
            await self._room.wait()

    def _dispatch(self, lane: Lane, number: int, page: Page) -> None:
        events = page.events
        size = sum([event.weight for event in events])
        flight = _InFlight(self, number, page.position, events[0].time if events else None, size, len(events))
        self._pages.append(flight)
        self._bytes += size
        self._unsettled += len(events)
        if events:
            self._count_read(len(events))
            self._gauge(lane)
            lane.send(flight, events)
        else:
            self._progress.set()

    # Settling

    def settled(self, count: int, *, done: bool) -> None:
        """So many events of a page are settled; `done`: it was the last of them."""
        self._unsettled -= count
        if done:
            self._progress.set()
        self._room.set()

    def refused(self, event: Event, failure: Never, attempts: int) -> None:
        """An event can never be published."""
        self._letters.append(DeadLetter(event, self.name, failure, attempts))
        self._progress.set()

    async def _settle_pages(self) -> None:
        while True:
            await self._progress.wait()
            self._progress.clear()
            await self._settle()

    async def _settle(self) -> None:
        """Settles the pages at the front that are done, and what has become of held events since."""
        lane = self._lane
        if lane is None:
            return
        # All of one moment: a letter that comes while these are stored was still held, or its page was not done.
        letters, self._letters = self._letters, []
        done = list(takewhile(lambda flight: not flight.unsettled, self._pages))
        held = lane.held
        if letters:
            await self._source.dead_letter(letters)
            tell_dead_letters(letters)
        if done:
            self._position = done[-1].position
        if self._position is not None:
            await self._source.settle(self._position, held)
        now = datetime.now(UTC)
        for flight in done:
            self._pages.popleft()
            self._bytes -= flight.bytes
            if flight.first is not None:
                self._observe(max(0.0, (now - flight.first).total_seconds()))
        self._gauge(lane)
        self._room.set()
        if not self._pages:
            self._empty.set()

    def _gauge(self, lane: Lane) -> None:
        self._events_in_flight.set(self._unsettled)
        self._bytes_in_flight.set(self._bytes + lane.held_bytes)
        self._events_held.set(lane.held_count)


def tell_dead_letters(letters: Sequence[DeadLetter]) -> None:
    """Counts and logs events that became dead letters."""
    for letter in letters:
        EVENTS_DEAD.labels(letter.sink or "", letter.failure.code).inc()
        log.warning(
            "event.dead_lettered",
            event_id=letter.event.id,
            topic=letter.event.topic,
            sink=letter.sink,
            code=letter.failure.code,
            reason=letter.failure.reason,
            **trace_fields(letter.event),
        )


class _Stopped(Exception):  # noqa: N818
    """Ends the task group of a relay that was asked to stop."""
