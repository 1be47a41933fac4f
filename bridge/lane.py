"""The way to one sink: publishes in order, and tries again what did not arrive, without breaking any key's order.

- A confirmed event, and one that can never be published, is done: its page counts it.
- Any other is *stuck*: no later event of its key is sent until it has been published. Other keys go on.
- Refused: the broker may have taken a later event of the key that was already on its way, so of the stuck events of
  this key only the first is due, and the next one when that has arrived.
- Not sent, or unknown: nothing overtook, so all stuck events of the key are due together.
- After a lost connection nothing is sent before every publish of the old connection has reported: otherwise a
  later event of some key could arrive on the new connection before an earlier one is known to be missing.
"""

import asyncio
from bisect import insort
from dataclasses import dataclass, field
from typing import Final, Protocol

from tenacity import wait_exponential_jitter

from bridge.brokers.contract import CONFIRMED, Confirmed, Never, NotSent, Refused, Sink, Unknown
from bridge.errors import BrokerUnavailableError, PgbridgeError, RefusedError
from bridge.event import Event
from bridge.process.metrics import EVENTS_CONFIRMED, EVENTS_RETRIED
from bridge.process.outage import Outage

_IDLE_LOOK: Final = 1.0
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
    """The last outcome was a refusal."""
    attempts: int = field(compare=False, default=1)


def sink_outage(name: str, *, retry_initial: float, retry_max: float) -> Outage:
    """The outages of the sink `name`; the delays between attempts grow from `retry_initial` to `retry_max` seconds."""
    backoff = wait_exponential_jitter(multiplier=retry_initial, max=retry_max, jitter=retry_initial)
    return Outage("sink", backoff, sink=name)


class Lane:
    """Publishes to one sink. Its tasks live in the caller's task group."""

    def __init__(self, name: str, sink: Sink, tasks: asyncio.TaskGroup, outage: Outage) -> None:
        self.name = name
        self._sink = sink
        self._count_confirmed = EVENTS_CONFIRMED.labels(name).inc
        self._count_retried = EVENTS_RETRIED.labels(name).inc
        self._tasks = tasks
        self._outage = outage
        self._publishing: set[asyncio.Task[None]] = set()
        self._stuck: dict[str, list[_Stuck]] = {}
        self._recovering = False

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
        if self._sink.is_open:
            # An earlier lane may have ended in the middle of an outage, and nothing is stuck in this one.
            self._outage.restored()
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
            self._tasks.create_task(self._recover(outcome))

    async def _recover(self, outcome: NotSent | Refused | Unknown) -> None:
        """Opens the sink and publishes what is stuck, again and again, until nothing is."""
        self._outage.lost(_error(outcome))
        while self._stuck or not self._sink.is_open:
            try:
                if not self._sink.is_open:
                    await self._reopen()
                await self._publish_stuck()
            except PgbridgeError as error:
                self._outage.lost(error)
                await self._outage.wait()
            else:
                self._outage.failures = 0
        self._recovering = False
        self._outage.restored()

    async def _reopen(self) -> None:
        if self._publishing:
            await asyncio.wait(self._publishing)
        await self._sink.open()

    async def _publish_stuck(self) -> None:
        """Publishes what is due. Raises PgbridgeError when the broker took so little of it that it needs a pause."""
        due = self._due()
        left: list[NotSent | Refused | Unknown] = []
        self._count_retried(len(due))
        outcomes = await self._sink.publish([stuck.event for stuck in due])
        for stuck, outcome in zip(due, outcomes, strict=True):
            stuck.attempts += 1
            match outcome:
                case Confirmed():
                    self._count_confirmed()
                    stuck.page.settled(1)
                    self._release(stuck)
                case Never():
                    stuck.page.refused(stuck.event, self.name, outcome, stuck.attempts)
                    self._release(stuck)
                case NotSent() | Refused() | Unknown():
                    stuck.refused = isinstance(outcome, Refused)
                    left.append(outcome)
        # Of a key that was refused only the first event is due, so an outage comes off one by one, without pauses.
        if len(left) * 2 > len(due):
            raise _error(left[-1])

    def _due(self) -> list[_Stuck]:
        """In the order in which they were read."""
        due: list[_Stuck] = []
        for waiting in self._stuck.values():
            due += waiting[:1] if waiting[0].refused else waiting
        return sorted(due)

    def _release(self, stuck: _Stuck) -> None:
        key = _lane_key(stuck.event)
        waiting = self._stuck[key]
        waiting.remove(stuck)
        if not waiting:
            del self._stuck[key]


def _error(outcome: NotSent | Refused | Unknown) -> PgbridgeError:
    """For the outage: whether the broker says no, or nothing."""
    return (RefusedError if isinstance(outcome, Refused) else BrokerUnavailableError)(outcome.reason)


def _lane_key(event: Event) -> str:
    """What must stay in order: a key's events; an event without a key has no other to wait for."""
    return f"key {event.key}" if event.key is not None else f"id {event.id}"
