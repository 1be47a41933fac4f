"""The loop: read a page, route it, publish it, settle it. It knows sources and sinks only by their contracts.

Several pages are in flight at once. A page is settled when every event in it is confirmed by each of its sinks,
or is among the dead letters; the source hears of it only when all pages before are settled too.
What is in flight is bounded in pages and in bytes: while a broker blocks, reading stops.
"""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import takewhile
from typing import Final

import structlog

from bridge.brokers.contract import Never, Sink
from bridge.event import Event, matches
from bridge.lane import Lane, sink_outage
from bridge.process.metrics import BYTES_IN_FLIGHT, EVENTS_DEAD, EVENTS_READ, PAGES_IN_FLIGHT, SETTLE_SECONDS
from bridge.process.outage import Outage
from bridge.sources import DeadLetter, Page, Source

log = structlog.get_logger()

_CACHED_TOPICS: Final = 65_536
"""Most topics that the routing table remembers an answer for."""


class Routes:
    """The routing table; answers are kept per topic, since an application has few topics and many events."""

    def __init__(self, routes: Sequence[tuple[str, str]]) -> None:
        """`routes`: pairs of pattern and sink."""
        self._routes = tuple(routes)
        self._sinks_of: dict[str, tuple[str, ...]] = {}

    def sinks_of(self, topic: str) -> tuple[str, ...]:
        """The sinks of every route that matches, each once, in the order of the routes."""
        found = self._sinks_of.get(topic)
        if found is None:
            found = tuple(dict.fromkeys(sink for pattern, sink in self._routes if matches(pattern, topic)))
            if len(self._sinks_of) >= _CACHED_TOPICS:
                self._sinks_of.clear()
            self._sinks_of[topic] = found
        return found


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may be in flight, and how failures are tried again; times in seconds."""

    pages_in_flight: int = 8
    bytes_in_flight: int = 64_000_000
    retry_initial: float = 0.1
    retry_max: float = 10.0
    shutdown_limit: float = 20.0


@dataclass(slots=True, eq=False)
class _InFlight:
    """A page on its way."""

    number: int
    page: Page
    bytes: int
    progress: asyncio.Event
    unsettled: int = 0
    letters: list[DeadLetter] = field(default_factory=list)

    def settled(self, count: int) -> None:
        self.unsettled -= count
        if not self.unsettled:
            self.progress.set()

    def refused(self, event: Event, sink: str | None, failure: Never, attempts: int) -> None:
        self.letters.append(DeadLetter(event, sink, failure, attempts))
        self.settled(1)


class Relay:
    """Carries events from one source to its sinks until it is stopped."""

    def __init__(
        self,
        source: Source,
        sinks: Mapping[str, Sink],
        routes: Routes,
        *,
        drop_unrouted: bool = False,
        limits: Limits | None = None,
        outages: Mapping[str, Outage] | None = None,
    ) -> None:
        """`outages` of the sinks, by their names, for a caller that wants to know of them; each gets one otherwise."""
        self._source = source
        self._sinks = sinks
        self._routes = routes
        self._drop_unrouted = drop_unrouted
        self._limits = limits or Limits()
        self._outages = outages or {name: self._outage(name) for name in sinks}
        self._lanes: dict[str, Lane] = {}
        self._window: deque[_InFlight] = deque()
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
                self._lanes = {name: Lane(name, sink, tasks, self._outages[name]) for name, sink in self._sinks.items()}
                tasks.create_task(self._settle_pages())
                for lane in self._lanes.values():
                    tasks.create_task(lane.watch())
                reading = tasks.create_task(self._read_pages())
                await self._wind_up(stop, reading)
        except* _Stopped:
            log.debug("relay.stopped")
        finally:
            PAGES_IN_FLIGHT.set(0)
            BYTES_IN_FLIGHT.set(0)

    def _outage(self, sink: str) -> Outage:
        return sink_outage(sink, retry_initial=self._limits.retry_initial, retry_max=self._limits.retry_max)

    async def _wind_up(self, stop: asyncio.Event, reading: asyncio.Task[None]) -> None:
        await stop.wait()
        reading.cancel()
        await self._drain()
        raise _Stopped

    async def _drain(self) -> None:
        self._empty.clear()
        if not self._window:
            return
        try:
            async with asyncio.timeout(self._limits.shutdown_limit):
                await self._empty.wait()
        except TimeoutError:
            log.warning(
                "relay.stopped_with_pages_in_flight",
                pages=len(self._window),
                hint="they are published again at the next start",
            )

    async def _read_pages(self) -> None:
        number = 0
        while True:
            await self._wait_for_room()
            page = await self._source.read()
            number += 1
            self._dispatch(number, page)

    async def _wait_for_room(self) -> None:
        while self._window and (
            len(self._window) >= self._limits.pages_in_flight or self._bytes >= self._limits.bytes_in_flight
        ):
            self._room.clear()
            await self._room.wait()

    def _dispatch(self, number: int, page: Page) -> None:
        """Sends every event of a page to the lanes of its sinks."""
        size = sum([len(event.payload) for event in page.events])
        flight = _InFlight(number, page, size, self._progress)
        self._window.append(flight)
        self._bytes += size
        EVENTS_READ.inc(len(page.events))
        self._gauge()
        by_sink: dict[str, list[Event]] = {}
        unrouted: list[Event] = []
        sinks_of = self._routes.sinks_of
        for event in page.events:
            sinks = sinks_of(event.topic)
            for sink in sinks:
                try:
                    by_sink[sink].append(event)
                except KeyError:
                    by_sink[sink] = [event]
            if not sinks:
                unrouted.append(event)
        # Counted before anything is sent, so that no early outcome can settle the page too soon.
        flight.unsettled = sum(map(len, by_sink.values())) + len(unrouted)
        for sink, events in by_sink.items():
            self._lanes[sink].send(flight, events)
        for event in unrouted:
            self._refuse_unrouted(flight, event)
        if not page.events:
            self._progress.set()

    def _refuse_unrouted(self, flight: _InFlight, event: Event) -> None:
        if self._drop_unrouted:
            flight.settled(1)
            return
        reason = f"no route takes the topic {event.topic!r}; add one to [[routes]], or set unrouted = 'drop'"
        flight.refused(event, None, Never("no_route", reason), 0)

    async def _settle_pages(self) -> None:
        while True:
            await self._progress.wait()
            self._progress.clear()
            await self._settle_front()

    async def _settle_front(self) -> None:
        """Settles the pages at the front of the window that are done, with one store for all of them."""
        done = list(takewhile(lambda flight: not flight.unsettled, self._window))
        if not done:
            return
        if letters := [letter for flight in done for letter in flight.letters]:
            await self._source.dead_letter(letters)
            for letter in letters:
                EVENTS_DEAD.labels(letter.failure.code).inc()
                log.warning(
                    "event.dead_lettered",
                    event_id=letter.event.id,
                    topic=letter.event.topic,
                    sink=letter.sink,
                    code=letter.failure.code,
                    reason=letter.failure.reason,
                )
        await self._source.settle(done[-1].page)
        now = datetime.now(UTC)
        for flight in done:
            self._window.popleft()
            self._bytes -= flight.bytes
            if flight.page.events:
                SETTLE_SECONDS.observe(max(0.0, (now - flight.page.events[0].time).total_seconds()))
        self._gauge()
        self._room.set()
        if not self._window:
            self._empty.set()

    def _gauge(self) -> None:
        PAGES_IN_FLIGHT.set(len(self._window))
        BYTES_IN_FLIGHT.set(self._bytes)


class _Stopped(Exception):  # noqa: N818
    """Ends the task group of a relay that was asked to stop."""
