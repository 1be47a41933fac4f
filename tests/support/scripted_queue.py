"""A queue whose every message and failure the test decides, and which notes how each delivery was settled."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from bridge.brokers.contract import Declaration, Failure
from bridge.errors import BrokerUnavailableError, PgbridgeError
from bridge.event import Event, Malformed


@dataclass(eq=False)
class ScriptedDelivery:
    event: Event | Malformed
    queue: "ScriptedQueue"
    attempt: int = 1
    connected: bool = True

    async def ack(self) -> None:
        await self._settle("ack", None)

    async def retry(self, delay: float) -> None:
        await self._settle("retry", delay)

    async def dead_letter(self, failure: Failure) -> None:
        await self._settle("dead_letter", failure)

    async def give_back(self) -> None:
        await self._settle("give_back", None)

    async def _settle(self, verb: str, detail: object) -> None:
        if self.queue.failures.get(verb):
            raise self.queue.failures[verb].pop(0)
        if not self.connected:
            raise BrokerUnavailableError("the connection is lost")
        assert self not in [delivery for delivery, _, _ in self.queue.settled], "settled twice"
        self.queue.settled.append((self, verb, detail))
        self.queue.changed.set()


@dataclass(eq=False)
class ScriptedQueue:
    """Give it `add(event)`; `lose()` ends the connection, and the next `refusals` calls of `open` raise `refusal`.

    What is in `failures` is raised, one after the other, by the verb of that name.
    With `redelivers`, what was in hand at a `close` comes again.
    """

    settled: list[tuple[ScriptedDelivery, str, object]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    redelivers: bool = False
    stranded: int = 0
    """What it has in hand and, by a mistake of its own, never delivers; a `close` gives it back."""
    refusals: int = 0
    refusal: PgbridgeError = field(default_factory=lambda: BrokerUnavailableError("nobody listens on the port"))
    opened: int = 0
    stopped: int = 0
    closed: int = 0
    failures: dict[str, list[Exception]] = field(default_factory=dict)
    _waiting: asyncio.Queue[ScriptedDelivery | str] = field(default_factory=asyncio.Queue)
    _in_hand: list[ScriptedDelivery] = field(default_factory=list)

    def add(self, event: Event | Malformed, attempt: int = 1) -> ScriptedDelivery:
        delivery = ScriptedDelivery(event, self, attempt)
        self._waiting.put_nowait(delivery)
        return delivery

    def lose(self, refusals: int = 0, refusal: PgbridgeError | None = None) -> None:
        self.refusals, self.refusal = refusals, refusal or self.refusal
        for delivery in self._in_hand:
            delivery.connected = False
        self._waiting.put_nowait("lost")

    async def open(self) -> None:
        self.opened += 1
        self.changed.set()
        if self.refusals:
            self.refusals -= 1
            raise self.refusal

    async def deliveries(self) -> AsyncIterator[ScriptedDelivery]:
        while (item := await self._waiting.get()) != "stop":
            if not isinstance(item, ScriptedDelivery):
                raise BrokerUnavailableError("the connection is lost")
            self._in_hand.append(item)
            yield item

    @property
    def in_hand(self) -> int:
        settled = [delivery for delivery, _, _ in self.settled]
        return self.stranded + sum(delivery not in settled for delivery in self._in_hand)

    async def depth(self) -> int:
        return self._waiting.qsize()

    async def stop(self) -> None:
        self.stopped += 1
        self._waiting.put_nowait("stop")

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        return []

    async def close(self) -> None:
        self.closed += 1
        for delivery in self._in_hand:
            delivery.connected = False
        settled = [delivery for delivery, _, _ in self.settled]
        for delivery in self._in_hand:
            if delivery not in settled and self.redelivers:
                self.add(delivery.event, delivery.attempt + 1)
        self._in_hand.clear()
        self.stranded = 0
        # The next one to open it is a queue of its own, which nobody has stopped.
        waiting = [self._waiting.get_nowait() for _ in range(self._waiting.qsize())]
        for item in waiting:
            if item != "stop":
                self._waiting.put_nowait(item)

    async def outcomes(self, count: int) -> list[tuple[str, object]]:
        """The first `count` settlements, once they are there."""
        async with asyncio.timeout(15):
            while len(self.settled) < count:
                self.changed.clear()
                await self.changed.wait()
        return [(verb, detail) for _, verb, detail in self.settled[:count]]
