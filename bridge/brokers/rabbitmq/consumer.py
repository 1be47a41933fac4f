"""One queue, consumed over a channel of its own: what it has delivered, and what settles that.

A worker has one of these, an ordered one with lanes one a lane. An ordered one's queue has a single active consumer,
and goes over to the next when this one's channel closes: what was in hand goes back in one step, in its order and
before all else. So an ordered consumer gives nothing back by itself, and is never cancelled with something in hand.
"""

import asyncio
from typing import Final, Generic, cast

from pamqp import commands

from bridge.brokers.order import D, InOrder
from bridge.brokers.rabbitmq.acks import Acks
from bridge.brokers.rabbitmq.connection import Connection

_UNDISTURBED: Final = 60.0
"""Seconds between two attempts to hand over a queue on which something runs for long, since meanwhile its keys wait."""


class Consumer(Generic[D]):
    """Its deliveries in order; not thread-safe, and of no use once its connection is lost."""

    def __init__(self, connection: Connection, channel: int, queue: str, prefetch: int, timeout: float) -> None:
        """`prefetch`: most messages in hand; `timeout`: seconds that an acknowledgement waits for room."""
        self.queue = queue
        self.channel = channel
        self.is_active = False
        """Whether it has delivered something: of the consumers of a queue with a single active one, it is that."""
        self._is_held = False
        """Whether it hands out nothing, since it is about to be handed over."""
        self.busy_until = 0.0
        """Until when, by the loop's clock, it is not asked to come to rest: it did not when it was."""
        self._connection = connection
        self._prefetch = prefetch
        self._timeout = timeout
        self._tag = ""
        self._fresh()

    def _fresh(self) -> None:
        self.acks = Acks(self._connection, self.channel, self._timeout)
        self._hand: InOrder[D] = InOrder()
        self._count = 0
        self._running = 0
        self._at_rest = asyncio.Event()
        self._at_rest.set()

    async def start(self) -> None:
        """Begins to consume. Raises ClosedError."""
        await self._connection.call(self.channel, commands.Channel.Open())
        await self._connection.call(self.channel, commands.Basic.Qos(prefetch_count=self._prefetch))
        begun = await self._connection.call(self.channel, commands.Basic.Consume(queue=self.queue))
        self._tag = cast(commands.Basic.ConsumeOk, begun).consumer_tag or ""

    async def cancel(self) -> None:
        """Ends to consume; what is in hand can still be settled. Raises ClosedError."""
        await self._connection.call(self.channel, commands.Basic.Cancel(self._tag))

    async def hand_over(self) -> None:
        """Lets the next consumer of the queue have it, with all that is in hand here and does not run, and waits behind
        it. Raises ClosedError."""
        self.acks.flush()
        await self._connection.call(self.channel, commands.Channel.Close(200, "", 0, 0))
        self._fresh()
        self.is_active = self._is_held = False
        await self.start()

    async def come_to_rest(self, limit: float) -> bool:
        """Hands out nothing more, and waits until nothing runs; whether that was so within `limit` seconds. If not, it
        goes on, undisturbed for some time."""
        self._is_held = True
        try:
            async with asyncio.timeout(limit):
                await self._at_rest.wait()
        except TimeoutError:
            self._is_held = False
            self.busy_until = asyncio.get_running_loop().time() + _UNDISTURBED
        return self._is_held

    def add(self, delivery: D) -> None:
        """Takes one that has come."""
        self._count += 1
        self._hand.add(delivery)

    @property
    def is_ready(self) -> bool:
        """Whether `hand_out` has one to give."""
        return bool(self._hand) and not self._is_held

    def hand_out(self) -> D:
        """The next that may run."""
        self._running += 1
        self._at_rest.clear()
        return self._hand.hand_out()

    def settled(self, delivery: D) -> None:
        """One that was handed out is done, or has gone back: the next of its key may run."""
        self._count -= 1
        self._running -= 1
        if not self._running:
            self._at_rest.set()
        self._hand.settled(delivery)

    def take_back(self) -> list[D]:
        """Removes what was not handed out."""
        taken = self._hand.take_back_ready()
        self._count -= len(taken)
        return taken

    @property
    def in_hand(self) -> int:
        """What runs or is ready; not what waits behind another of its key."""
        return self._count - self._hand.behind
