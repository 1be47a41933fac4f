"""The way to one sink: publishes in order, and tries again what did not arrive, without breaking any key's order.

- What the broker confirmed, or refused for ever, is told to its page.
- Anything else is *stuck*: its key takes no new events until it has been published. Other keys go on.
- After a lost connection nothing is sent before every publish of the old connection has reported: otherwise a
  later event of some key could arrive on the new connection before an earlier one is known to be missing.
"""

import asyncio
import time
from bisect import insort
from dataclasses import dataclass, field
from typing import Protocol

import structlog
from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential_jitter

from bridge.brokers.contract import CONFIRMED, Confirmed, Never, NotSent, Refused, Sink, Unknown
from bridge.errors import PgbridgeError
from bridge.event import Event
from bridge.process.metrics import EVENTS_CONFIRMED, EVENTS_RETRIED

log = structlog.get_logger()

_IDLE_LOOK = 1.0
"""Seconds between two looks whether a connection went while nothing was published."""


class Settles(Protocol):
    """The page that a published event belongs to."""

    number: int

    def settled(self, count: int) -> None:
        """So many more of its events are confirmed."""

    def refused(self, event: Event, sink: str, failure: Never, attempts: int) -> None:
        """One of its events can never be published."""


@dataclass(order=True, slots=True)
class _Stuck:
    order: tuple[int, int]
    event: Event = field(compare=False)
    page: Settles = field(compare=False)
    refused: bool = field(compare=False)
    """The broker said no (as opposed to: nothing is known), so a later event of its key must wait for it."""
    attempts: int = field(compare=False, default=1)


class _StillStuckError(Exception):
    pass


class Lane:
    """Publishes to one sink. Its tasks live in the caller's task group."""

    def __init__(
        self, name: str, sink: Sink, tasks: asyncio.TaskGroup, *, retry_initial: float, retry_max: float
    ) -> None:
        self.name = name
        self._sink = sink
        self._count_confirmed = EVENTS_CONFIRMED.labels(name).inc
        self._count_retried = EVENTS_RETRIED.labels(name).inc
        self._tasks = tasks
        self._wait = wait_exponential_jitter(multiplier=retry_initial, max=retry_max, jitter=retry_initial)
        self._publishing: set[asyncio.Task[None]] = set()
        self._stuck: dict[str, list[_Stuck]] = {}
        self._recovering = False
        self._open_error: type[PgbridgeError] | None = None

    def send(self, page: Settles, events: list[Event]) -> None:
        """Starts to publish these; calls leave in order, since tasks start in the order of their creation."""
        if self._stuck:
            events = self._hold(page, events)
        if events:
            task = self._tasks.create_task(self._publish(page, events))
            self._publishing.add(task)
            task.add_done_callback(self._publishing.discard)

    async def watch(self) -> None:
        """Opens the sink again when its connection goes while nothing is published; runs until it is cancelled."""
        while True:
            await asyncio.sleep(_IDLE_LOOK)
            if not self._sink.is_open:
                self._recover_from(NotSent("the connection was lost"))

    def _hold(self, page: Settles, events: list[Event]) -> list[Event]:
        """Puts events of stuck keys behind what they must not overtake; gives the others."""
        free = []
        for index, event in enumerate(events):
            waiting = self._stuck.get(_lane_key(event))
            if waiting is None:
                free.append(event)
            else:
                insort(waiting, _Stuck((page.number, index), event, page, refused=False, attempts=0))
        return free

    async def _publish(self, page: Settles, events: list[Event]) -> None:
        outcomes = await self._sink.publish(events)
        confirmed = list(outcomes).count(CONFIRMED)
        self._count_confirmed(confirmed)
        for index, (event, outcome) in enumerate(zip(events, outcomes, strict=True) if confirmed < len(events) else ()):
            match outcome:
                case Never():
                    page.refused(event, self.name, outcome, 1)
                case NotSent() | Refused() | Unknown():
                    stuck = _Stuck((page.number, index), event, page, refused=isinstance(outcome, Refused))
                    insort(self._stuck.setdefault(_lane_key(event), []), stuck)
                    self._recover_from(outcome)
        page.settled(confirmed)

    def _recover_from(self, outcome: NotSent | Refused | Unknown) -> None:
        if not self._recovering:
            self._recovering = True
            self._tasks.create_task(self._recover(outcome.reason))

    async def _recover(self, reason: str) -> None:
        """Reopens and publishes again, for ever, until nothing is stuck."""
        began = time.monotonic()
        log.warning("sink.failing", sink=self.name, reason=reason)
        while self._stuck or not self._sink.is_open:
            async for attempt in AsyncRetrying(
                wait=self._wait, retry=retry_if_exception_type((_StillStuckError, PgbridgeError))
            ):
                with attempt:
                    if not self._sink.is_open:
                        if self._publishing:
                            await asyncio.wait(self._publishing)
                        await self._reopen()
                    await self._publish_stuck()
        self._recovering = False
        log.info("sink.recovered", sink=self.name, seconds=round(time.monotonic() - began, 3))

    async def _reopen(self) -> None:
        try:
            await self._sink.open()
        except PgbridgeError as error:
            # Said when it changes: an outage that turns into a refused login is another matter, for a person.
            if type(error) is not self._open_error:
                self._open_error = type(error)
                log.warning("sink.unreachable", sink=self.name, reason=str(error))
            raise
        self._open_error = None

    async def _publish_stuck(self) -> None:
        """Publishes what is due. Raises _StillStuckError when the broker took so little of it that it needs a pause."""
        due: list[_Stuck] = []
        for waiting in self._stuck.values():
            due += waiting[:1] if waiting[0].refused else waiting
        due.sort()
        left = len(due)
        self._count_retried(len(due))
        outcomes = await self._sink.publish([stuck.event for stuck in due])
        for stuck, outcome in zip(due, outcomes, strict=True):
            stuck.attempts += 1
            match outcome:
                case Confirmed():
                    self._count_confirmed()
                    stuck.page.settled(1)
                    self._release(stuck)
                    left -= 1
                case Never():
                    stuck.page.refused(stuck.event, self.name, outcome, stuck.attempts)
                    self._release(stuck)
                    left -= 1
                case NotSent() | Refused() | Unknown():
                    stuck.refused = isinstance(outcome, Refused)
        # Of a key that was refused only the first event is due, so an outage comes off one by one, without pauses.
        if left * 2 > len(due):
            raise _StillStuckError

    def _release(self, stuck: _Stuck) -> None:
        key = _lane_key(stuck.event)
        waiting = self._stuck[key]
        waiting.remove(stuck)
        if not waiting:
            del self._stuck[key]


def _lane_key(event: Event) -> str:
    """What must stay in order: a key's events; an event without a key stands for itself."""
    return f"key {event.key}" if event.key is not None else f"id {event.id}"
