"""Publishing events again through the relay, marked as a replay, at a chosen rate.

`pgbridge replay` and `pgbridge dead replay` both do it with `republish`: they bring pages of events, and say what is
to become of each page once every sink has confirmed or refused its events.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from bridge.brokers.contract import Sink
from bridge.brokers.registry import broker_of
from bridge.event import Event, replay_mark
from bridge.process.tasks import one_error, unless_stopped
from bridge.relay import Limits, Relay
from bridge.routes import Routes
from bridge.settings import Settings
from bridge.sources import DeadLetter, Page
from bridge.unrouted import no_route

_LARGEST_CHUNK: Final = 500
"""Events."""
_CHUNKS_IN_FLIGHT: Final = 16
"""Most chunks that are handed out and not settled."""


class Pace:
    """At most `rate` events a second, in chunks of a tenth of a second; None: as fast as it goes."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._next = time.monotonic()

    @property
    def chunk(self) -> int:
        """How many events to ask for at once."""
        return _LARGEST_CHUNK if self._rate is None else max(1, min(_LARGEST_CHUNK, math.ceil(self._rate / 10)))

    async def wait(self, count: int) -> None:
        """Waits until `count` more events may go."""
        if self._rate is not None:
            now = time.monotonic()
            # What was not used while somebody else was slow is not made up for.
            self._next = max(self._next, now)
            await asyncio.sleep(self._next - now)
            self._next += count / self._rate


Settled = Callable[[Sequence[Event], Sequence[DeadLetter]], Awaitable[None]]
"""Gets the events of each page in their order, once each is confirmed or refused, and those that were refused."""


@dataclass(slots=True, eq=False)
class _Chunk:
    """Events that are published together, to one sink or several."""

    events: Sequence[Event]
    unsettled: int
    """Sinks that have not settled it."""
    refused: list[DeadLetter]


class _SinkPages:
    """The chunks as one sink's `bridge.sources.Source`."""

    def __init__(self, republishing: "_Republishing") -> None:
        self._republishing = republishing
        self._waiting: asyncio.Queue[tuple[_Chunk, Sequence[Event]]] = asyncio.Queue()
        self._open: deque[tuple[int, _Chunk, Sequence[Event]]] = deque()
        self._number = 0

    def give(self, chunk: _Chunk, events: Sequence[Event]) -> None:
        """The chunk's events for this sink."""
        self._waiting.put_nowait((chunk, events))

    async def read(self, most: int) -> Page:
        """The next chunk, whole: it is small."""
        chunk, events = await self._waiting.get()
        self._number += 1
        self._open.append((self._number, chunk, events))
        return Page(events, self._number)

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        """Remembers them in their chunks, until the chunk is settled."""
        for letter in letters:
            for _, chunk, events in self._open:
                if any(letter.event is event for event in events):
                    chunk.refused.append(letter)

    async def settle(self, position: object, held: Collection[int]) -> None:
        """A chunk is settled once nothing of it is held."""
        if not isinstance(position, int):
            return
        left: deque[tuple[int, _Chunk, Sequence[Event]]] = deque()
        for number, chunk, events in self._open:
            if number <= position and not any(event.sequence in held for event in events):
                chunk.unsettled -= 1
            else:
                left.append((number, chunk, events))
        self._open = left
        await self._republishing.settle()


class _Republishing:
    """Hands chunks to the sinks of their events, and says when they are settled, in their order."""

    def __init__(self, routes: Routes, sinks: Iterable[str], settled: Settled) -> None:
        self.sources = {sink: _SinkPages(self) for sink in sinks}
        self._routes = routes
        self._settled = settled
        self._chunks: deque[_Chunk] = deque()
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()
        self._mark = replay_mark()

    async def publish(self, pages: AsyncIterator[Sequence[Event]], pace: Pace) -> None:
        """Hands out every page, and waits until all is settled."""
        async for events in pages:
            if not events:
                continue
            while len(self._chunks) >= _CHUNKS_IN_FLIGHT:
                await self._wait_for_room()
            await pace.wait(len(events))
            self._hand_out([event._replace(headers={**event.headers, **self._mark}) for event in events])
            await self.settle()
        while self._chunks:
            await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        self._room.clear()
        await self._room.wait()

    def _hand_out(self, events: Sequence[Event]) -> None:
        by_sink: dict[str, list[Event]] = {}
        refused = []
        for event in events:
            sinks = self._routes.sinks_of(event.topic)
            for sink in sinks:
                by_sink.setdefault(sink, []).append(event)
            if not sinks:
                refused.append(no_route(event))
        chunk = _Chunk(events, len(by_sink), refused)
        self._chunks.append(chunk)
        for sink, taken in by_sink.items():
            self.sources[sink].give(chunk, taken)

    async def settle(self) -> None:
        """Tells of the chunks at the front that every sink has settled."""
        async with self._turn:
            while self._chunks and not self._chunks[0].unsettled:
                await self._settled(self._chunks[0].events, self._chunks[0].refused)
                self._chunks.popleft()
                self._room.set()


async def republish(
    settings: Settings,
    sinks: Mapping[str, Sink],
    routes: Routes,
    pages: AsyncIterator[Sequence[Event]],
    pace: Pace,
    settled: Settled,
    stop: asyncio.Event,
) -> None:
    """Publishes every page, in order; returns when all is settled, or soon after `stop` is set.

    A sink that may take an event later is tried again without end. Raises what `pages` and `settled` raise.
    """
    ended = asyncio.Event()
    limits = Limits(**settings.relay.model_dump())
    republishing = _Republishing(routes, sinks, settled)

    async def publish() -> None:
        await unless_stopped(stop, republishing.publish(pages, pace))
        ended.set()

    with one_error():
        async with asyncio.TaskGroup() as tasks:
            for name, source in republishing.sources.items():
                pipelined = settings.sinks[name].pipelined
                tasks.create_task(Relay(source, name, sinks[name], limits=limits, pipelined=pipelined).run(ended))
            tasks.create_task(publish())


@asynccontextmanager
async def open_sinks(settings: Settings, names: Iterable[str]) -> AsyncIterator[Mapping[str, Sink]]:
    """These sinks, open while the body runs. Raises BrokerUnavailableError, RefusedError, SettingsError."""
    sinks = {name: broker_of(settings.sinks[name]).sink(settings.sinks[name]) for name in names}
    try:
        for sink in sinks.values():
            await sink.open()
        yield sinks
    finally:
        for sink in sinks.values():
            await sink.close()
