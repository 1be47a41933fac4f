"""RabbitMQ as a worker's queue: quorum queues, one for each delay between attempts, and one for dead letters.

``<worker>``                bound to the topic exchange, once for each pattern
``<worker>.retry.<delay>``  its messages expire back into ``<worker>``; one queue a delay, since a quorum queue
                            expires only at its head
``<worker>.dead``           dead letters, with ``x-pgbridge-...`` headers that say why

A retry or a dead letter is published, persistent and mandatory, over a connection of its own, and the original is
acknowledged only once the broker has confirmed the copy: a crash in between repeats a message, and none is lost.

`attempt` is 1, plus the retries that the message's own header counts, plus the ``x-delivery-count`` of the quorum queue
since it was last published. RabbitMQ counts there whatever was delivered and not acknowledged, so a delivery that was
given back counts too (the inbox, which decides when attempts are exhausted, does not count it). Nothing is given up for
its number of deliveries.

A binding outlives its pattern in the settings, since AMQP lists no bindings: events that only such a one still brings
are acknowledged, and not handed out.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Final, cast

from pamqp import commands

from bridge.brokers.contract import Declaration, Failure, Subscription
from bridge.brokers.letters import ATTEMPTS, PREFIX, letter_headers
from bridge.brokers.rabbitmq.acks import Acks
from bridge.brokers.rabbitmq.closure import ClosedError, Closure, rabbitmq_at
from bridge.brokers.rabbitmq.connection import Connection, answers, connect, connected
from bridge.brokers.rabbitmq.copies import Copies, copy_of
from bridge.brokers.rabbitmq.frames import CHANNEL
from bridge.brokers.rabbitmq.message import Message, count_of, event_of
from bridge.brokers.rabbitmq.reader import Delivered
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.topology import LOOK_LIMIT, WorkerTopology, declarations, message_count
from bridge.errors import BrokerUnavailableError
from bridge.event import Malformed, matches

_ANSWER_LIMIT: Final = 10.0
"""Seconds within which the broker must begin or end to deliver, or tell the length of its queues."""

ROUTED: Final = f"{PREFIX}routed"
"""The routing key with which a message first came: when it comes from a queue of retries, it has another one."""


class RabbitMQDelivery:
    """See `bridge.brokers.contract.Delivery`."""

    __slots__ = ("_message", "_session", "attempt", "event")

    def __init__(self, session: "Session", message: Message) -> None:
        self._session = session
        self._message = message
        self.event = event_of(message)
        """See `contract.Delivery.event`."""
        self.attempt = 1 + count_of(message, ATTEMPTS) + count_of(message, "x-delivery-count")
        """See `contract.Delivery.attempt`, and above for what was given back."""

    async def ack(self) -> None:
        """See `contract.Delivery.ack`; AMQP has no answer to it, see `acks`."""
        await self._session.ack(self._message)

    async def retry(self, delay: float) -> None:
        """See `contract.Delivery.retry`. Raises TopologyError where the queue of this delay is gone."""
        queue = self._session.topology.retry_queue(delay)
        topic = _routing_key(self._message)
        headers = {ATTEMPTS: str(self.attempt)} | ({} if topic is None else {ROUTED: topic})
        await self._session.copy(self._message, queue, headers)
        await self.ack()

    async def dead_letter(self, failure: Failure) -> None:
        """See `contract.Delivery.dead_letter`."""
        ours = self._session.topology
        await self._session.copy(self._message, ours.dead, letter_headers(ours.worker, failure, self.attempt))
        await self.ack()

    async def give_back(self) -> None:
        """See `contract.Delivery.give_back`; RabbitMQ counts it, and has no answer to it either."""
        await self._session.give_back(self._message)


class Session:
    """What one `open` has made: a connection that consumes and one that publishes copies. The end of either is the end
    of both, but what is finished can be acknowledged for as long as the one that consumes lives."""

    def __init__(self, settings: RabbitMQSettings, subscription: Subscription, topology: WorkerTopology) -> None:
        self.topology = topology
        self.lost: Closure | None = None
        self.stopped = False
        self.arrived: asyncio.Queue[RabbitMQDelivery | None] = asyncio.Queue()
        """Bounded by the prefetch; None wakes `deliveries` to look at what follows."""
        self.in_hand = 0
        """See `contract.Queue.in_hand`."""
        self._settings = settings
        self._subscription = subscription
        self._copies = Copies(settings, self._lose)
        self._connection: Connection | None = None
        self._acks: Acks
        self._consumer = ""

    async def open(self) -> None:
        """See `contract.Queue.open`."""
        await self._copies.open(self.topology.needed())
        await self._copies.probe()
        self._connection = connection = await connect(self._settings, f"pgbridge worker {self.topology.worker}")
        self._acks = Acks(connection, self._settings.publish_timeout)
        connection.consume(delivered=self._arrive, cancelled=self._cancelled, room=self._acks.has_room, lost=self._lose)
        async with answers(self._settings, _ANSWER_LIMIT):
            await connection.call(CHANNEL, commands.Channel.Open())
            await connection.call(CHANNEL, commands.Basic.Qos(prefetch_count=self._subscription.prefetch))
            begun = await connection.call(CHANNEL, commands.Basic.Consume(queue=self.topology.worker))
        self._consumer = cast(commands.Basic.ConsumeOk, begun).consumer_tag or ""

    def _arrive(self, delivered: Delivered) -> None:
        message = Message(*delivered)
        delivery = RabbitMQDelivery(self, message)
        if isinstance(delivery.event, Malformed) or self._subscribed(message):
            self.in_hand += 1
            self.arrived.put_nowait(delivery)
        else:
            self._acks.ack_soon(message.tag)

    def _subscribed(self, message: Message) -> bool:
        """False for what only the binding of an earlier pattern still brings. What somebody puts into the queue itself,
        past the exchange, is meant for it."""
        topic = _routing_key(message)
        return topic is None or any(matches(pattern, topic) for pattern in self._subscription.topics)

    def _cancelled(self) -> None:
        self._lose(Closure(f"it cancelled the consumer: queue {self.topology.worker} was deleted, or its leader moved"))

    def _lose(self, closure: Closure) -> None:
        if self.lost is None:
            self.lost = closure
            self.arrived.put_nowait(None)
            self._copies.leave(closure)
        if self._connection is not None:
            self._acks.has_room()  # or whoever waits for room would wait for the time-out

    async def ack(self, message: Message) -> None:
        """Settles a message. Raises BrokerUnavailableError."""
        try:
            await self._acks.ack(message.tag)
        except ClosedError as error:
            raise self.gone(error.closure) from error
        self.in_hand -= 1

    async def give_back(self, message: Message) -> None:
        """Lets a message come again. Raises BrokerUnavailableError."""
        try:
            await self._acks.give_back(message.tag)
        except ClosedError as error:
            raise self.gone(error.closure) from error
        self.in_hand -= 1

    async def copy(self, message: Message, queue: str, headers: dict[str, str]) -> None:
        """Copies a message to another queue, byte for byte, with headers beside its own; returns once confirmed.

        Raises what `Copies.publish` raises.
        """
        if self.lost is not None:
            raise self.gone(self.lost)
        await self._copies.publish(copy_of(message, queue, headers))

    async def depth(self) -> int:
        """See `contract.Queue.depth`. Over the connection that consumes, since an alarm does not block that one."""
        if self._connection is None or self.lost is not None:
            raise self.gone(self.lost or Closure("it is not open"))
        async with answers(self._settings, _ANSWER_LIMIT):
            return sum([await message_count(self._connection, name) for name in self.topology.waiting])

    async def stop(self) -> None:
        """See `contract.Queue.stop`."""
        if self._connection is None or self.lost is not None:
            raise self.gone(self.lost or Closure("it is not open"))
        async with answers(self._settings, _ANSWER_LIMIT):
            await self._connection.call(CHANNEL, commands.Basic.Cancel(self._consumer))
        self.stopped = True
        while not self.arrived.empty():
            delivery = self.arrived.get_nowait()
            if delivery is not None:
                await delivery.give_back()
        self.arrived.put_nowait(None)

    def gone(self, closure: Closure) -> BrokerUnavailableError:
        """Always the error that is waited out, whatever the broker said: if it will refuse, the next `open` says so."""
        return BrokerUnavailableError(f"{rabbitmq_at(self._settings)} ended the connection: {closure}")

    async def close(self) -> None:
        """Ends both connections; the broker then has back whatever is in hand."""
        self._lose(Closure("closed by this worker"))
        try:
            if self._connection is not None:
                self._acks.flush()
                await self._connection.close()
        finally:
            await self._copies.close()


def _routing_key(message: Message) -> str | None:
    """By which it came through an exchange; None for what was put into the queue itself."""
    if message.exchange:
        return message.routing_key
    routed = message.headers.get(ROUTED)
    return routed if isinstance(routed, str) else None


class RabbitMQQueue:
    """See `bridge.brokers.contract.Queue`."""

    def __init__(self, settings: RabbitMQSettings, subscription: Subscription) -> None:
        # A worker with one attempt has no ladder, and still asks again while another worker has its event.
        delays = subscription.retry_delays or [1.0]
        self._topology = WorkerTopology(settings.exchange, subscription.worker, subscription.topics, delays)
        self._settings = settings
        self._subscription = subscription
        self._session: Session | None = None

    async def open(self) -> None:
        """See `contract.Queue.open`.

        Raises SettingsError for certificates that cannot be used, BrokerUnavailableError, LoginError, RefusedError
        for the virtual host, PrivilegeError, TopologyError.
        """
        await self.close()
        session = Session(self._settings, self._subscription, self._topology)
        try:
            await session.open()
        except BaseException:
            await session.close()
            raise
        self._session = session

    async def deliveries(self) -> AsyncIterator[RabbitMQDelivery]:
        """See `contract.Queue.deliveries`."""
        session = self._session
        if session is None:
            raise BrokerUnavailableError(f"{rabbitmq_at(self._settings)} is not connected: the queue is not open")
        while True:
            delivery = await session.arrived.get()
            if session.lost is not None:
                raise session.gone(session.lost)
            if session.stopped:
                return
            if delivery is not None:
                yield delivery

    @property
    def in_hand(self) -> int:
        """See `contract.Queue.in_hand`."""
        return 0 if self._session is None else self._session.in_hand

    async def depth(self) -> int:
        """See `contract.Queue.depth`."""
        if self._session is None:
            raise BrokerUnavailableError(f"{rabbitmq_at(self._settings)} is not connected: the queue is not open")
        return await self._session.depth()

    async def stop(self) -> None:
        """See `contract.Queue.stop`. What has arrived and was not delivered goes back at once."""
        if self._session is not None and not self._session.stopped:
            await self._session.stop()

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """The exchange, the queues and their bindings. Raises what `open` raises, but for what is missing."""
        async with connected(self._settings, LOOK_LIMIT) as connection:
            return await declarations(connection, self._topology, apply=apply)

    async def close(self) -> None:
        """See `contract.Queue.close`."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
