"""Publishing events again through the relay, marked as a replay, at a chosen rate.

`pgbridge replay` and `pgbridge dead replay` both do it with `republish`: they bring pages of events, and say what is
to become of each page once every sink has confirmed or refused its events.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

from bridge.brokers.contract import Sink
from bridge.brokers.registry import broker_of
from bridge.event import REPLAYED, Event
from bridge.process.tasks import one_error
from bridge.relay import Limits, Relay, Routes
from bridge.settings import RelaySettings, Settings
from bridge.sources import DeadLetter, Page

_REPLAYED: Final[Mapping[str, str]] = {REPLAYED: "true"}
"""What a replay adds to an event's headers."""
_LARGEST_CHUNK: Final = 500
"""Events."""


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


class _Pages:
    """The pages as a `bridge.sources.Source`. After the last one is settled it sets `stop`, which ends the relay."""

    def __init__(
        self, pages: AsyncIterator[Sequence[Event]], pace: Pace, settled: Settled, stop: asyncio.Event
    ) -> None:
        self._pages = pages
        self._pace = pace
        self._settled = settled
        self._stop = stop
        self._open: deque[Page] = deque()
        self._idle = asyncio.Event()
        self._idle.set()
        self._refused: list[DeadLetter] = []

    async def read(self) -> Page:
        events = [event async for event in _first(self._pages)]
        if not events:
            await self._idle.wait()
            self._stop.set()
            await asyncio.Event().wait()
        await self._pace.wait(len(events))
        page = Page([event._replace(headers={**event.headers, **_REPLAYED}) for event in events], None)
        self._open.append(page)
        self._idle.clear()
        return page

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        self._refused += letters

    async def settle(self, page: Page) -> None:
        events: list[Event] = []
        while self._open:
            done = self._open.popleft()
            events += done.events
            if done is page:
                break
        refused, self._refused = self._refused, []
        await self._settled(events, refused)
        if not self._open:
            self._idle.set()


async def _first(pages: AsyncIterator[Sequence[Event]]) -> AsyncIterator[Event]:
    """The events of the next page that has any; none at the end."""
    async for page in pages:
        if page:
            for event in page:
                yield event
            return


async def republish(
    settings: RelaySettings,
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

    async def stopped() -> None:
        await stop.wait()
        ended.set()

    watching = asyncio.create_task(stopped())
    limits = Limits(**settings.model_dump())
    try:
        with one_error():
            await Relay(_Pages(pages, pace, settled, ended), sinks, routes, limits=limits).run(ended)
    finally:
        watching.cancel()


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
