"""The way to one sink: publishes in order, and tries again what did not arrive, without breaking any key's order.

Calm: events go to the sink as they come, many of a key together, and cost nothing here but their count.

Lost (`NotSent`, `Unknown`: the connection went): nothing new goes until all that was in flight has reported and what
did not arrive has been published again, in order: first one event, and more with every success, as TCP begins anew. An
event over which the broker ends the connection (`Unknown.poisoned`) is found in this way: alone it ends it once more,
and becomes a dead letter with the broker's words.

Refused (`Refused`: the broker said no for now, and may have taken a later event of the key): the event is *held*, and
with it all that follows in its key, while other keys go on. From now on the topic is treated with *care*: of a key with
such events one is on the way at a time, until none of the topic has been refused for a while. A topic's held events are
tried again after a pause, one first and more with every success, so that a full queue is not flooded, and one that has
room again is soon even.
"""

import asyncio
import time
from bisect import insort
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from heapq import nsmallest
from itertools import takewhile
from typing import Any, Final, Protocol

from tenacity import wait_exponential_jitter

from bridge.brokers.contract import Confirmed, Never, NotSent, Outcome, Refused, Sink, Unknown
from bridge.errors import BrokerUnavailableError, PgbridgeError, RefusedError
from bridge.event import Event
from bridge.process.metrics import EVENTS_CONFIRMED, EVENTS_RETRIED
from bridge.process.outage import Outage
from bridge.process.tasks import raise_if_cancelled

_LOOK: Final = 1.0
"""Seconds between two looks whether a connection went, or stalls, while nothing was published."""
_CARE: Final = 60.0
"""Seconds without a refusal after which events of a topic go together again."""
_GROWTH: Final = 4
"""A success lets so many times as many events go at once."""
_LARGEST_BURST: Final = 2000
"""Events that go at once while a loss or a refusal is made up for."""
_BLAMED: Final = 2
"""An event that was on the way at so many endings of the connection over a message, alone at the last, is poison."""


_KeyName = str | tuple[str]
"""A key, or the id of an event without one, which is told apart by being in a tuple."""


class Settles(Protocol):
    """The page that a published event belongs to."""

    number: int

    def confirmed(self, count: int) -> None:
        """So many of its events are confirmed that were not held."""

    def held(self, count: int) -> None:
        """So many of its events are held: the page need not wait for them."""

    def refused(self, event: Event, failure: Never, attempts: int, *, was_held: bool) -> None:
        """One of its events can never be published."""


@dataclass(order=True, slots=True)
class _Item:
    """An event that does not simply go on its way."""

    order: tuple[int, int]
    """Its page and its place there."""
    event: Event = field(compare=False)
    page: Settles = field(compare=False)
    attempts: int = field(compare=False, default=0)
    blamed: int = field(compare=False, default=0)
    """How often the broker ended the connection over a message while this one was on its way."""
    held: bool = field(compare=False, default=False)
    probes: "_Gate | None" = field(compare=False, default=None)
    """The topic that this event tries again."""


@dataclass(slots=True)
class _Key:
    """A key's events that wait or are on their way, in order."""

    items: list[_Item] = field(default_factory=list)
    flying: int = 0
    """So many of them, from the first, are on their way."""
    gate: "_Gate | None" = None
    """What its first event waits for."""
    held: bool = False
    """Its first event was refused."""


@dataclass(slots=True, eq=False)
class _Gate:
    """A topic of which events were refused: when they are tried again, and how many at once."""

    topic: str
    reason: str
    since: datetime
    keys: dict[_KeyName, None] = field(default_factory=dict)
    """The keys that wait here, in the order of their refusals."""
    burst: int = 1
    probing: int = 0
    """Events that were let through and have not reported."""
    let_through: int = 0
    taken: int = 0
    """So many of these were published."""
    failures: int = 0
    timer: asyncio.TimerHandle | None = None


def sink_outage(name: str, *, retry_initial: float, retry_max: float) -> Outage:
    """The outages of the sink `name`; the delays between attempts grow from `retry_initial` to `retry_max` seconds."""
    backoff = wait_exponential_jitter(multiplier=retry_initial, max=retry_max, jitter=retry_initial)
    return Outage("sink", backoff, sink=name)


class Lane:
    """Publishes to one sink. Its tasks live in the caller's task group."""

    def __init__(
        self,
        name: str,
        sink: Sink,
        tasks: asyncio.TaskGroup,
        outage: Outage,
        *,
        changed: Callable[[], None],
        pipelined: bool = True,
        careful: bool = False,
    ) -> None:
        """`changed` is called when what is held has changed. `pipelined`: a key's events may go together while nothing
        is refused. `careful`: the sink has refused something lately."""
        self.name = name
        self.held_bytes = 0
        self._held: set[int] = set()
        self._held_copy: frozenset[int] | None = frozenset()
        self._sink = sink
        self._pipelined = pipelined
        self._count_confirmed = EVENTS_CONFIRMED.labels(name).inc
        self._count_retried = EVENTS_RETRIED.labels(name).inc
        self._tasks = tasks
        self._outage = outage
        self._changed = changed
        self._publishing: set[asyncio.Task[None]] = set()
        self._calm: set[asyncio.Task[None]] = set()
        """Calls under way of whose keys nobody keeps account."""
        self._barrier: set[asyncio.Task[None]] = set()
        """Those of them that may hold events of a topic that was refused since: nothing goes one by one before they
        have reported."""
        self._keys: dict[_KeyName, _Key] = {}
        """Keys with events that wait, or are on their way one by one."""
        self._ready: dict[_KeyName, None] = {}
        """Keys whose first event may go."""
        self._gates: dict[str, _Gate] = {}
        self._care: dict[str, float] = {}
        """Topics that were refused lately, and when."""
        self._care_for_all_until = time.monotonic() + _CARE if careful else float("-inf")
        self._recovering = False

    # Going

    def send(self, page: Settles, events: Sequence[Event]) -> None:
        """Starts to publish these; calls leave in order, since tasks start in the order of their creation."""
        if not (self._keys or self._care or self._recovering or self._cares_for_all):
            self._start_calm(page, range(len(events)), events)
            return
        for_all = self._recovering or self._cares_for_all
        places: list[int] = []
        for place, event in enumerate(events):
            if for_all or event.topic in self._care or _key_name(event) in self._keys:
                self._wait(_Item((page.number, place), event, page))
            else:
                places.append(place)
        if places:
            self._start_calm(page, places, [events[place] for place in places])
        self._go()

    @property
    def _cares_for_all(self) -> bool:
        """Whether every key's events go one at a time."""
        return not (self._pipelined and self._sink.pipelines) or time.monotonic() < self._care_for_all_until

    def _start_calm(self, page: Settles, places: Sequence[int], events: Sequence[Event]) -> None:
        task = self._start(self._publish(page, places, events))
        self._calm.add(task)
        task.add_done_callback(self._calm.discard)

    def _start(self, publishing: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = self._tasks.create_task(publishing)
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)
        return task

    async def _publish(self, page: Settles, places: Sequence[int], events: Sequence[Event]) -> None:
        """The calm way, for events at these places of a page."""
        outcomes = await self._sink.publish(events)
        confirmed = sum([isinstance(outcome, Confirmed) for outcome in outcomes])
        failed = None
        if confirmed < len(events):
            for place, event, outcome in zip(places, events, outcomes, strict=True):
                if isinstance(outcome, Confirmed):
                    continue
                if isinstance(outcome, Never):
                    page.refused(event, outcome, 1, was_held=False)
                    continue
                item = _Item((page.number, place), event, page, attempts=int(not isinstance(outcome, NotSent)))
                failed = self._failed(self._wait(item), item, outcome) or failed
        if confirmed:
            self._count_confirmed(confirmed)
            page.confirmed(confirmed)
        if (task := asyncio.current_task()) is not None:
            self._calm.discard(task)
            self._barrier.discard(task)
        self._next(failed)

    def _wait(self, item: _Item) -> _KeyName:
        """Puts an event behind what it must not overtake; gives its key."""
        name = _key_name(item.event)
        key = self._keys.get(name)
        if key is None:
            key = self._keys[name] = _Key()
        if key.items and item < key.items[-1]:
            # Calls may report out of order; what is behind has not been sent since.
            insort(key.items, item, lo=key.flying)
        else:
            key.items.append(item)
        if key.held:
            self._hold(item)
        if not key.flying and key.gate is None:
            self._ready[name] = None
        return name

    def _go(self) -> None:
        """Starts what may go now."""
        if self._recovering or self._barrier or not self._ready:
            return
        ready, self._ready = self._ready, {}
        going: list[_Item] = []
        for name in ready:
            key = self._keys.get(name)
            if key is not None and not key.flying and key.gate is None:
                key.flying = self._together(key)
                going += key.items[: key.flying]
        if going:
            going.sort()
            self._start(self._publish_items(going))

    def _together(self, key: _Key) -> int:
        """How many of a key's events may go at once: of a topic that needs care, one."""
        if key.held or self._cares_for_all:
            return 1
        if not self._care:
            return len(key.items)
        free = sum(1 for _ in takewhile(lambda item: item.event.topic not in self._care, key.items))
        return max(1, free)

    async def _publish_items(self, items: list[_Item]) -> None:
        """The way on which keys are accounted for."""
        outcomes = await self._sink.publish([item.event for item in items])
        self._next(self._report(items, outcomes))

    def _next(self, failed: NotSent | Unknown | None) -> None:
        """Goes on after a call has reported; `failed` if it found the connection gone."""
        if failed is not None:
            self._lose(failed)
        else:
            self._go()
        if self._gates:
            self._tell()

    # Coming back

    def _report(self, items: Sequence[_Item], outcomes: Sequence[Outcome]) -> NotSent | Unknown | None:
        """Takes the outcomes of accounted events; gives one that says that the connection is gone."""
        failed = None
        retried = confirmed = 0
        for item, outcome in zip(items, outcomes, strict=True):
            name = _key_name(item.event)
            key = self._keys[name]
            # What never left us was no attempt.
            if not isinstance(outcome, NotSent):
                retried += bool(item.attempts)
                item.attempts += 1
            key.flying -= 1
            match outcome:
                case Confirmed():
                    confirmed += 1
                    self._release(key, item)
                    if not item.held:
                        item.page.confirmed(1)
                case Never():
                    self._release(key, item)
                    item.page.refused(item.event, outcome, item.attempts, was_held=item.held)
                case NotSent() | Refused() | Unknown():
                    failed = self._failed(name, item, outcome) or failed
            if item.probes is not None:
                gate, item.probes = item.probes, None
                self._tell_gate(gate, taken=isinstance(outcome, Confirmed | Never))
            if not key.items:
                del self._keys[name]
                self._ready.pop(name, None)
            elif not key.flying and key.gate is None:
                self._ready[name] = None
        self._count_retried(retried)
        self._count_confirmed(confirmed)
        return failed

    def _failed(self, name: _KeyName, item: _Item, outcome: NotSent | Refused | Unknown) -> NotSent | Unknown | None:
        """An event of this key waits for another try."""
        if isinstance(outcome, NotSent) and self._sink.is_open:
            # It waits behind one of its key that was refused, in a sink that keeps the order itself.
            outcome = Refused(outcome.reason, in_order=True)
        match outcome:
            case Refused():
                if not outcome.in_order:
                    if item.event.topic not in self._care:
                        self._barrier |= self._calm
                    self._care[item.event.topic] = time.monotonic()
                self._close_gate(name, item, outcome)
                return None
            case Unknown(poisoned=True):
                item.blamed += 1
        return outcome

    def _release(self, key: _Key, item: _Item) -> None:
        if item is key.items[0]:
            key.held = False
        key.items.remove(item)
        if item.held:
            self._held.discard(item.event.sequence)
            self._held_copy = None
            self.held_bytes -= item.event.weight
            self._changed()

    def _hold(self, item: _Item) -> None:
        if not item.held:
            item.held = True
            self._held.add(item.event.sequence)
            self._held_copy = None
            self.held_bytes += item.event.weight
            item.page.held(1)

    # Refused

    def _close_gate(self, name: _KeyName, item: _Item, refused: Refused) -> None:
        """Holds a key whose first event was refused, until its topic is tried again."""
        key = self._keys[name]
        key.held = True
        for behind in key.items:
            self._hold(behind)
        if key.gate is not None:
            # An earlier event of the key waits already, perhaps of another topic.
            return
        topic = item.event.topic
        gate = self._gates.get(topic)
        if gate is None:
            gate = self._gates[topic] = _Gate(topic, refused.reason, datetime.now(UTC))
        gate.reason = refused.reason
        gate.keys[name] = None
        key.gate = gate
        self._ready.pop(name, None)
        for behind in key.items:
            # It was chosen to try its topic again before one that it must not overtake came back.
            if behind is not item and behind.probes is not None:
                waiting, behind.probes = behind.probes, None
                self._tell_gate(waiting, taken=False)
        if gate.timer is None and not gate.probing:
            self._schedule(gate)

    def _schedule(self, gate: _Gate) -> None:
        delay = self._outage.delay(max(1, gate.failures))
        gate.timer = asyncio.get_running_loop().call_later(delay, self._open_gate, gate)

    def _open_gate(self, gate: _Gate) -> None:
        """Lets some of a topic's held events through."""
        gate.timer = None
        names = list(gate.keys)[: gate.burst]
        gate.probing = gate.let_through = len(names)
        gate.taken = 0
        for name in names:
            del gate.keys[name]
            key = self._keys[name]
            key.gate = None
            key.items[0].probes = gate
            self._ready[name] = None
        self._go()

    def _tell_gate(self, gate: _Gate, *, taken: bool) -> None:
        """One of the events that were let through has reported; after the last of them, the next are chosen."""
        gate.probing -= 1
        gate.taken += taken
        if gate.probing:
            return
        if gate.taken * 2 >= gate.let_through:
            gate.failures = 0
            gate.burst = min(_GROWTH * gate.burst, _LARGEST_BURST)
        else:
            gate.failures += 1
            gate.burst = 1
        if not gate.keys:
            del self._gates[gate.topic]
            self._tell()
        elif gate.failures:
            self._schedule(gate)
        else:
            gate.timer = asyncio.get_running_loop().call_later(0, self._open_gate, gate)

    # Lost

    def _lose(self, outcome: NotSent | Unknown) -> None:
        if not self._recovering:
            self._recovering = True
            self._tasks.create_task(self._recover(outcome))

    async def _recover(self, outcome: NotSent | Unknown) -> None:
        """Opens the sink and publishes again what did not arrive, until all of it has."""
        if not self._outage.lasts:
            self._outage.lost(BrokerUnavailableError(outcome.reason))
        burst = 1
        # A burst of full size has shown that the sink works: what is left goes as ever.
        while not self._sink.is_open or burst < _LARGEST_BURST:
            try:
                # What follows must not arrive before it is known what is missing.
                if self._publishing:
                    await asyncio.wait(self._publishing)
                if not self._sink.is_open:
                    await self._sink.open()
                    raise_if_cancelled()
                due = self._due(burst)
                if not due:
                    break
                await self._publish_again(due)
            except PgbridgeError as error:
                burst = 1
                self._outage.lost(error)
                await self._outage.wait()
            else:
                burst = min(_GROWTH * burst, _LARGEST_BURST)
                self._outage.failures = 0
        self._recovering = False
        self._tell()
        self._go()

    def _due(self, burst: int) -> list[_Item]:
        """The first events that are not held back by a refusal, in the order in which they were read."""
        waiting: list[_Item] = []
        for key in self._keys.values():
            if key.gate is None:
                waiting += key.items[: self._together(key)]
        return nsmallest(burst, waiting)

    async def _publish_again(self, due: list[_Item]) -> None:
        """Raises BrokerUnavailableError when the connection is gone once more."""
        for item in due:
            self._keys[_key_name(item.event)].flying += 1
        outcomes = list(await self._sink.publish([item.event for item in due]))
        if len(due) == 1 and due[0].blamed + 1 >= _BLAMED and (words := _poison(outcomes[0])):
            reason = f"the broker ended the connection over this event, each time that it was sent: {words}"
            outcomes[0] = Never("ends_connection", reason)
        failed = self._report(due, outcomes)
        if failed is not None:
            raise BrokerUnavailableError(failed.reason)

    async def watch(self) -> None:
        """Opens the sink when it is not open though nothing is published; runs until it is cancelled."""
        try:
            while True:
                if not self._sink.is_open:
                    self._lose(NotSent(self._sink.stalled or "is not connected"))
                oldest = time.monotonic() - _CARE
                self._care = {topic: at for topic, at in self._care.items() if at > oldest}
                self._tell()
                self._go()
                await asyncio.sleep(_LOOK)
        finally:
            for gate in self._gates.values():
                if gate.timer is not None:
                    gate.timer.cancel()

    # What others see

    @property
    def held(self) -> frozenset[int]:
        """The places in the log of what is held; the same object until that changes, since pages settle far more often
        than thousands of held events change."""
        if self._held_copy is None:
            self._held_copy = frozenset(self._held)
        return self._held_copy

    @property
    def held_count(self) -> int:
        """How many events are held."""
        return len(self._held)

    def _tell(self) -> None:
        """Tells the outage how things are, unless the connection is lost: then whoever recovers does."""
        if self._recovering:
            return
        stalled = self._sink.stalled
        if self._gates:
            self._outage.lost(RefusedError(self._refusals()))
        elif stalled is not None:
            self._outage.lost(BrokerUnavailableError(stalled))
        else:
            self._outage.restored()

    def _refusals(self) -> str:
        oldest = min(self._gates.values(), key=lambda gate: gate.since)
        others = f" and of {len(self._gates) - 1} more topics" if len(self._gates) > 1 else ""
        events = "1 event is held" if self.held_count == 1 else f"{self.held_count} events are held"
        return (
            f"{events}, of the topic {oldest.topic!r}{others}, "
            f"since {oldest.since:%Y-%m-%d %H:%M:%S} UTC: {oldest.reason}"
        )


def _poison(outcome: Outcome) -> str:
    """What the broker said when it ended the connection over a message; empty if it did not."""
    return outcome.reason if isinstance(outcome, Unknown) and outcome.poisoned else ""


def _key_name(event: Event) -> _KeyName:
    """What must stay in order: a key's events; an event without a key has no other to wait for."""
    return event.key if event.key is not None else (event.id,)
