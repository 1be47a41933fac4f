"""A broker in this process, sink and queue: for dry runs, and for tests that need no broker."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from bridge.brokers.accounts import Accounts, Installation
from bridge.brokers.contract import (
    CONFIRMED,
    Broker,
    Declaration,
    Failure,
    NotSent,
    Outcome,
    Subscription,
)
from bridge.event import Event, Malformed
from bridge.settings import SinkSettings

_NOT_OPEN: Final = NotSent("the sink is not open")


class MemorySettings(SinkSettings):
    """Nothing but what every sink has."""


class MemorySink:
    """Confirms every event and keeps none, so that a dry run needs no more memory for a large log than for a small."""

    def __init__(self, settings: MemorySettings) -> None:
        self.settings = settings
        self._open = False

    @property
    def is_open(self) -> bool:
        """See `contract.Sink.is_open`."""
        return self._open

    @property
    def stalled(self) -> str | None:
        """Nothing ever waits."""
        return None

    @property
    def pipelines(self) -> bool:
        """Nothing is ever refused."""
        return True

    async def open(self) -> None:
        """Nothing can be missing."""
        self._open = True

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        """Confirmed at once, or not sent while it is closed."""
        return [CONFIRMED if self._open else _NOT_OPEN] * len(events)

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """Nothing is needed."""
        return []

    async def close(self) -> None:
        """See `contract.Sink.close`."""
        self._open = False


@dataclass(slots=True, eq=False)
class Message:
    """What the broker holds of one message."""

    event: Event | Malformed
    attempt: int = 1

    @property
    def key(self) -> str | None:
        """That of its event; None where it has none."""
        return self.event.key if isinstance(self.event, Event) else None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What became of a message that was given up."""

    event: Event | Malformed
    failure: Failure
    attempts: int


@dataclass(slots=True)
class MemoryBroker:
    """The messages of one worker's queue; queues that share a broker compete for them."""

    waiting: deque[Message] = field(default_factory=deque)
    busy: set[str] = field(default_factory=set)
    """Keys of which some queue for an ordered worker has a message in hand."""
    dead: list[DeadLetter] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    timers: set[asyncio.Task[None]] = field(default_factory=set)

    async def append(self, message: Message) -> None:
        """Behind all that waits."""
        async with self.changed:
            self.waiting.append(message)
            self.changed.notify_all()

    def append_later(self, message: Message, delay: float) -> None:
        """Behind all that waits once `delay` seconds have passed."""

        async def later() -> None:
            await asyncio.sleep(delay)
            await self.append(message)

        timer = asyncio.create_task(later())
        self.timers.add(timer)
        timer.add_done_callback(self.timers.discard)


class MemoryDelivery:
    """See `bridge.brokers.contract.Delivery`."""

    def __init__(self, queue: "MemoryQueue", message: Message) -> None:
        self._queue = queue
        self._message = message

    @property
    def event(self) -> Event | Malformed:
        """As `Delivery.event`."""
        return self._message.event

    @property
    def attempt(self) -> int:
        """As `Delivery.attempt`."""
        return self._message.attempt

    async def ack(self) -> None:
        """As `Delivery.ack`."""
        await self._queue.settled(self._message)

    async def retry(self, delay: float) -> None:
        """See `Delivery.retry`; the delay is exact."""
        await self._queue.settled(self._message)
        self._message.attempt += 1
        self._queue.broker.append_later(self._message, delay)

    async def dead_letter(self, failure: Failure) -> None:
        """Appends it to `MemoryBroker.dead`."""
        await self._queue.settled(self._message)
        self._queue.broker.dead.append(DeadLetter(self.event, failure, self.attempt))

    async def give_back(self) -> None:
        """As `Delivery.give_back`."""
        await self._queue.give_back([self._message])


class MemoryQueue:
    """See `contract.Queue`. Takes every message of its broker, whatever the topics of the subscription."""

    def __init__(self, settings: SinkSettings, subscription: Subscription, broker: MemoryBroker | None = None) -> None:
        """`broker` is one of its own unless given."""
        self.settings = settings
        self.broker = broker or MemoryBroker()
        self._prefetch = subscription.prefetch
        self._ordered = subscription.ordered
        self._in_hand: list[Message] = []
        self._stopped = True

    async def open(self) -> None:
        """Nothing can be missing."""
        self._stopped = False

    async def deliveries(self) -> AsyncIterator[MemoryDelivery]:
        """As `Queue.deliveries`."""
        while True:
            async with self.broker.changed:
                await self.broker.changed.wait_for(self._may_go_on)
                if self._stopped:
                    return
                message = next(self._takeable())
                self.broker.waiting.remove(message)
                self._in_hand.append(message)
                if self._ordered and message.key:
                    self.broker.busy.add(message.key)
            yield MemoryDelivery(self, message)

    def _may_go_on(self) -> bool:
        return self._stopped or (len(self._in_hand) < self._prefetch and any(self._takeable()))

    def _takeable(self) -> Iterator[Message]:
        """What waits; of an ordered worker's queue without the keys that have a message in hand."""
        return (each for each in self.broker.waiting if not self._ordered or each.key not in self.broker.busy)

    async def settled(self, message: Message) -> None:
        """Makes room for the next delivery. Raises ValueError when the message is not in hand."""
        async with self.broker.changed:
            self._in_hand.remove(message)
            self._free(message)
            self.broker.changed.notify_all()

    async def give_back(self, messages: Sequence[Message]) -> None:
        """Puts what is in hand before all that waits, in its order."""
        async with self.broker.changed:
            for message in messages:
                self._in_hand.remove(message)
                self._free(message)
            self.broker.waiting.extendleft(reversed(messages))
            self.broker.changed.notify_all()

    def _free(self, message: Message) -> None:
        if self._ordered and message.key:
            self.broker.busy.discard(message.key)

    @property
    def in_hand(self) -> int:
        """As `Queue.in_hand`."""
        return len(self._in_hand)

    async def depth(self) -> int:
        """As `Queue.depth`."""
        return len(self.broker.waiting) + len(self.broker.timers)

    async def stop(self) -> None:
        """As `Queue.stop`."""
        async with self.broker.changed:
            self._stopped = True
            self.broker.changed.notify_all()

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """Nothing is needed."""
        return []

    async def close(self) -> None:
        """Like a crash, it counts an attempt for what was in hand."""
        await self.stop()
        for message in self._in_hand:
            message.attempt += 1
        await self.give_back(list(self._in_hand))


class Memory:
    """See `contract.Broker`. Each queue has messages of its own, and nothing of them outlives the process."""

    settings = MemorySettings
    requires = None
    example = None

    def accounts(self, installation: Installation, /) -> Accounts:
        raise ValueError("is nowhere: it ends with its process")

    def sink(self, settings: MemorySettings, /) -> MemorySink:
        return MemorySink(settings)

    def queue(self, settings: MemorySettings, subscription: Subscription, /) -> MemoryQueue:
        return MemoryQueue(settings, subscription)

    def dead_letters(self, settings: MemorySettings, worker: str, /, *, lanes: int = 1) -> None:
        return None


BROKER: Final[Broker] = Memory()
