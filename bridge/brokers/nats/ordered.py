"""NATS JetStream as the queue of an ordered worker: a pinned consumer, and what one process has of it in order.

JetStream gives all messages of a pinned consumer to one of the processes that ask for them, until that one gives it up
or has asked for nothing for `ack_wait`; the others wait. A process that becomes pinned first collects whatever of the
consumer is unsettled (`succession`), and hands out nothing before. From then on messages come in the order of the
stream, and `InOrder` hands out one of a key after the other.

- The pin is renewed and proven by a request that no message can answer, since it asks for one byte. A process that has
  not proven it for `ack_wait`, as after a pause, hands out nothing until it has; one that has lost it ends its queue.
- A close gives the pin up, behind what it gives back, so that a successor begins at once.
- What is to be tried again, and what is given back before a stop, stays in hand: elsewhere it could be overtaken.
"""

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

import structlog
from nats.aio.msg import Msg

from bridge.brokers.nats.connection import REQUEST_TIMEOUT, Connection
from bridge.brokers.nats.queue import NANOSECONDS, NatsDelivery, NatsQueue
from bridge.brokers.nats.succession import Succession
from bridge.brokers.nats.topology import GROUP, MAX_UNSETTLED, consumer_state
from bridge.brokers.order import MOST_HELD, InOrder
from bridge.errors import PgbridgeError
from bridge.event import Event

log = structlog.get_logger()

PIN_HEADER: Final = "Nats-Pin-Id"

_PIN_LOST: Final = "423"
"""The status that ends a request in the name of a pin that is no more."""

_ROUND: Final = 0.5
"""Seconds, at most, after which a successor looks whether it has everything."""

_MOMENT: Final = 0.02
"""Seconds after which the server answers a request that renews the pin, where it has no message to measure."""


class OrderedDelivery(NatsDelivery):
    """See `bridge.brokers.contract.Delivery`. When the message comes again, this one stands for it."""

    _queue: "OrderedNatsQueue"

    def __init__(self, queue: "OrderedNatsQueue", message: Msg) -> None:
        super().__init__(queue, message)
        self.key = (self.event.key or "") if isinstance(self.event, Event) else ""
        self.sequence: int = sequence_of(message)

    async def retry(self, delay: float) -> None:
        """See `contract.Delivery.retry`. It stays in hand, and holds its key; after a stop it goes back at once."""
        self.attempt += 1
        await self._queue.put_back(self, delay)

    async def give_back(self) -> None:
        """See `contract.Delivery.give_back`. Before a stop it stays in hand, and comes again first of its key."""
        await self._queue.put_back(self, 0.0)


class OrderedNatsQueue(NatsQueue):
    """See `bridge.brokers.contract.Queue` and `Subscription.ordered`."""

    def _begin(self) -> None:
        super()._begin()
        self._pin = ""
        """What names us to the server as the process that gets everything; "" while another one does, or none."""
        self._proven = float("-inf")
        """Since when, by the loop's clock, the pin is ours for `ack_wait` at least."""
        self._order: InOrder[OrderedDelivery] = InOrder()
        self._deliveries: dict[int, OrderedDelivery] = {}
        """What is in hand and was, or may be, handed out: by its number in the stream."""
        self._resting: dict[int, asyncio.TimerHandle] = {}
        """Of these, what is to be tried again later."""
        self._handed_out: set[int] = set()
        self._succession: Succession[Msg] | None = None
        """What has come, until everything is in hand."""
        self._succeeding: asyncio.Task[None] | None = None
        self._quiet = asyncio.Event()
        """No request for messages is open."""

    # Asking

    async def _ask(self, request: dict[str, Any]) -> None:
        self._quiet.clear()
        await super()._ask({**request, **self._named()})

    def _named(self) -> dict[str, Any]:
        return {"group": GROUP, "id": self._pin} if self._pin else {"group": GROUP}

    def _room(self) -> int:
        if not self._pin:
            return 1
        if self._succession is not None:
            return 0
        held = len(self._in_hand)
        most = min(MOST_HELD * self._subscription.prefetch, MAX_UNSETTLED)
        return min(self._subscription.prefetch - (held - self._order.behind), most - held)

    async def _arrive(self, message: Msg) -> None:
        if not self._pin:
            self._pinned((message.headers or {}).get(PIN_HEADER, ""))
        sequence = sequence_of(message)
        if self._succession is not None:
            before = self._succession.add(sequence, message, first=message.metadata.num_delivered == 1)
            if before is not None:
                self._in_hand.discard(before.reply)
        elif (known := self._deliveries.get(sequence)) is not None:
            # Its lease ran out, or somebody who had it before us gave it back.
            self._in_hand.discard(known.message.reply)
            known.message = message
        else:
            await self._add([message])
        if not self._requested:
            self._quiet.set()

    async def _add(self, messages: Iterable[Msg]) -> None:
        """Takes what comes next in the order of the stream: all of it before anything else can happen."""
        others = []
        for message in messages:
            if self._subscribed(message):
                delivery = OrderedDelivery(self, message)
                self._deliveries[delivery.sequence] = delivery
                self._order.add(delivery)
            else:
                others.append(message)
        self._changed.set()
        for message in others:
            await self._pass_over(message)

    def _end_request(self, status: Mapping[str, str]) -> None:
        if status.get("Status") == _PIN_LOST:
            self._lose_pin()
        else:
            super()._end_request(status)
        if not self._requested:
            self._quiet.set()

    # The pin

    def _pinned(self, pin: str) -> None:
        connection = self._connection
        if not pin or connection is None:
            self._lose(self._unavailable("gave a message to a process that it has not pinned"))
            return
        self._pin = pin
        self._succession = Succession()
        self._succeeding = asyncio.create_task(self._succeed(connection, self._succession))
        self._succeeding.add_done_callback(self._succession_ended)

    async def _succeed(self, connection: Connection, succession: Succession[Msg]) -> None:
        """Collects what the predecessors left, puts it in order, and begins to hand out."""
        pause = min(_ROUND, self._subscription.ack_wait / 6)
        while self._lost is None and not self._stopped:
            await self._quiet.wait()
            unsettled = await self._unsettled(connection)
            verdict = succession.judge(unsettled)
            if verdict == "all":
                break
            if verdict == "unsure":
                given_back = [message.reply for message in succession.begin_again(unsettled)]
                await self._send(given_back, b"-NAK")
                self._in_hand.difference_update(given_back)
            elif len(self._in_hand) >= self._subscription.prefetch:
                # What is missing comes when its lease runs out; until then only more of what is new would come.
                await asyncio.sleep(pause)
            room = succession.room(self._subscription.prefetch)
            await self._ask({"batch": room, "expires": int(pause * NANOSECONDS)})
        await self._prove(connection)
        if self._lost is not None or self._stopped:
            return
        collected = succession.in_order()
        # What is in hand no more was settled by a predecessor.
        self._in_hand.intersection_update([message.reply for message in collected])
        self._succession = None
        log.debug("queue.succeeded", worker=self._subscription.worker, messages=len(collected))
        await self._add(collected)
        await self._request()

    def _succession_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._lose(error)

    async def _unsettled(self, connection: Connection) -> int:
        """How many messages of the consumer are unsettled, while we are pinned. Raises BrokerUnavailableError."""
        async with connection.asking():
            state = await consumer_state(connection.client, self._settings.stream, self._subscription.worker)
        if [group.get("pinned_client_id") for group in state.get("priority_groups") or []] != [self._pin]:
            self._lose_pin()
        return int(state["num_ack_pending"])

    async def _keep(self, connection: Connection) -> None:
        await super()._keep(connection)
        await self._prove(connection)

    async def _prove(self, connection: Connection) -> None:
        """Asks, in the name of the pin, for what no message fits into, which renews it; then looks whether it is ours:
        while nobody is pinned, the server takes a request in the name of an old pin, too."""
        if not self._pin:
            return
        now = asyncio.get_running_loop().time()
        request = {"batch": 1, "max_bytes": 1, "expires": int(_MOMENT * NANOSECONDS), **self._named()}
        try:
            async with connection.asking(), asyncio.timeout(REQUEST_TIMEOUT):
                await connection.client.request(
                    self._next_subject, json.dumps(request).encode(), timeout=REQUEST_TIMEOUT
                )
            await self._unsettled(connection)
        except PgbridgeError:
            return  # a lost or silent connection shows itself to the watcher
        if self._lost is None:
            self._proven = now
            self._changed.set()

    @property
    def _is_proven(self) -> bool:
        return asyncio.get_running_loop().time() - self._proven < self._subscription.ack_wait

    def _lose_pin(self) -> None:
        worker, seconds = self._subscription.worker, self._subscription.ack_wait
        self._lose(
            self._unavailable(
                f"gives its messages to another process of the worker {worker!r}: it heard nothing of this one for "
                f"{seconds:g} s, or somebody took the pin away"
            )
        )

    # Handing out

    def _next(self) -> NatsDelivery | None:
        if not self._order or not self._is_proven:
            return None
        delivery = self._order.hand_out()
        self._handed_out.add(delivery.sequence)
        return delivery

    def _settled(self, delivery: NatsDelivery) -> None:
        super()._settled(delivery)
        # One of a connection before this one may have come again.
        if isinstance(delivery, OrderedDelivery) and self._deliveries.get(delivery.sequence) is delivery:
            self._forget(delivery)
            self._order.settled(delivery)
            self._changed.set()

    def _forget(self, delivery: OrderedDelivery) -> None:
        del self._deliveries[delivery.sequence]
        self._handed_out.discard(delivery.sequence)
        self._in_hand.discard(delivery.message.reply)

    async def put_back(self, delivery: OrderedDelivery, delay: float) -> None:
        """Hands it out again after `delay`, before what is behind it in its key; after a stop it goes back to the
        server. Raises BrokerUnavailableError."""
        if self._deliveries.get(delivery.sequence) is not delivery:
            self._connected()
            return  # of a connection before this one: it comes again by itself
        if self._stopped:
            await self.settle(delivery, b"-NAK")
        elif delay > 0:
            loop = asyncio.get_running_loop()
            self._resting[delivery.sequence] = loop.call_later(delay, self._again, delivery)
        else:
            self._again(delivery)

    def _again(self, delivery: OrderedDelivery) -> None:
        self._resting.pop(delivery.sequence, None)
        self._handed_out.discard(delivery.sequence)
        self._order.again(delivery)
        self._changed.set()

    @property
    def in_hand(self) -> int:
        """See `contract.Queue.in_hand`."""
        known = len(self._deliveries) - self._order.behind if self._is_proven else len(self._handed_out)
        return known - len(self._resting)

    # Stopping

    def _take_back(self) -> list[str]:
        """All but what runs: a successor puts it in order, and begins once what runs is settled, too."""
        if self._succeeding is not None:
            self._succeeding.cancel()
        for timer in self._resting.values():
            timer.cancel()
        running = {self._deliveries[sequence].message.reply for sequence in self._handed_out - self._resting.keys()}
        self._deliveries = {
            sequence: delivery for sequence, delivery in self._deliveries.items() if delivery.message.reply in running
        }
        self._resting, self._order = {}, InOrder()
        for delivery in self._deliveries.values():
            self._order.add(delivery)
            self._order.hand_out()
        return [reply for reply in self._in_hand if reply not in running]

    async def _give_back(self, connection: Connection) -> None:
        await super()._give_back(connection)
        if not self._pin or not self._is_proven or self._lost is not None:
            return
        try:
            async with connection.asking(), asyncio.timeout(REQUEST_TIMEOUT):
                subject = f"$JS.API.CONSUMER.UNPIN.{self._settings.stream}.{self._subscription.worker}"
                await connection.client.request(subject, json.dumps({"group": GROUP}).encode(), timeout=REQUEST_TIMEOUT)
        except (PgbridgeError, TimeoutError) as error:
            log.debug("queue.pin_runs_out", seconds=self._subscription.ack_wait, reason=str(error))

    async def close(self) -> None:
        """See `contract.Queue.close`. A successor begins at once; where nothing answers, after `ack_wait`."""
        for timer in self._resting.values():
            timer.cancel()
        if self._succeeding is not None:
            self._succeeding.cancel()
            await asyncio.wait([self._succeeding])
            self._succeeding = None
        await super().close()
        self._deliveries, self._resting, self._handed_out, self._order = {}, {}, set(), InOrder()


def sequence_of(message: Msg) -> int:
    """Its number in the stream."""
    return int(message.metadata.sequence.stream)
