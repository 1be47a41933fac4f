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
from typing import Final
from uuid import uuid4

import structlog
from pamqp import commands

from bridge.brokers.contract import Declaration, Failure, Subscription
from bridge.brokers.letters import ATTEMPTS, PREFIX, letter_headers
from bridge.brokers.order import MOST_HELD
from bridge.brokers.rabbitmq.closure import ClosedError, Closure, rabbitmq_at
from bridge.brokers.rabbitmq.connection import Connection, answers, connect, connected
from bridge.brokers.rabbitmq.consumer import Consumer
from bridge.brokers.rabbitmq.copies import Copies, copy_of
from bridge.brokers.rabbitmq.frames import CHANNEL
from bridge.brokers.rabbitmq.message import Message, count_of, event_of
from bridge.brokers.rabbitmq.permissions import may_consume, may_publish
from bridge.brokers.rabbitmq.reader import Delivered
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.topology import LOOK_LIMIT, WorkerTopology, counts_of, declarations, require
from bridge.errors import BrokerUnavailableError
from bridge.event import Event, Malformed, matches

log = structlog.get_logger()

SHARE_INTERVAL: Final = 5.0
"""Seconds between two looks at how many processes share the lanes."""

_REST_LIMIT: Final = 2.0
"""Seconds that handlers may take to come to rest before a lane is handed over; what waits for another attempt does not,
and keeps its lane here."""

_MOST_PREFETCH: Final = 65_535
"""AMQP counts it in two bytes."""

_PRESENCE: Final = 3
"""The channel that shows other processes that this one is there; those of further lanes lie above it."""

_ANSWER_LIMIT: Final = 10.0
"""Seconds within which the broker must begin or end to deliver, or tell the length of its queues."""

ROUTED: Final = f"{PREFIX}routed"
"""The routing key with which a message first came: when it comes from a queue of retries, it has another one."""


class RabbitMQDelivery:
    """See `bridge.brokers.contract.Delivery`."""

    __slots__ = ("_session", "attempt", "consumer", "event", "key", "message")

    def __init__(
        self, session: "Session", consumer: "Consumer[RabbitMQDelivery]", message: Message, wanted: Subscription
    ) -> None:
        self._session = session
        self.consumer = consumer
        self.message = message
        self.event = event_of(message)
        """See `contract.Delivery.event`."""
        self.attempt = 1 + count_of(message, ATTEMPTS) + count_of(message, "x-delivery-count")
        """See `contract.Delivery.attempt`, and above for what was given back."""
        self.key = ""
        """In whose line it stands; empty for none."""
        # A replay comes late, and must not wait behind what it may hold up; where dead letters hold their key, there is
        # nothing of the kind.
        if wanted.ordered and isinstance(self.event, Event) and (wanted.holds or self.event.replay is None):
            self.key = self.event.key or ""

    async def ack(self) -> None:
        """See `contract.Delivery.ack`; AMQP has no answer to it, see `acks`."""
        await self._session.ack(self)

    async def retry(self, delay: float) -> None:
        """See `contract.Delivery.retry`. Raises TopologyError where the queue of this delay is gone."""
        queue = self._session.topology.retry_queue(delay)
        topic = _routing_key(self.message)
        headers = {ATTEMPTS: str(self.attempt)} | ({} if topic is None else {ROUTED: topic})
        await self._session.copy(self.message, queue, headers)
        await self.ack()

    async def dead_letter(self, failure: Failure) -> None:
        """See `contract.Delivery.dead_letter`."""
        ours = self._session.topology
        await self._session.copy(self.message, ours.dead, letter_headers(ours.worker, failure, self.attempt))
        await self.ack()

    async def give_back(self) -> None:
        """See `contract.Delivery.give_back`; RabbitMQ counts it, and has no answer to it either."""
        await self._session.give_back(self)


class Session:
    """What one `open` has made: a connection that consumes and one that publishes copies. The end of either is the end
    of both, but what is finished can be acknowledged for as long as the one that consumes lives."""

    def __init__(self, settings: RabbitMQSettings, subscription: Subscription, topology: WorkerTopology) -> None:
        self.topology = topology
        self.lost: Closure | None = None
        self.stopped = False
        self._settings = settings
        self._subscription = subscription
        self._copies = Copies(settings, self._lose)
        self._connection: Connection | None = None
        self._consumers: dict[int, Consumer[RabbitMQDelivery]] = {}
        """By channel."""
        self._changed = asyncio.Event()
        """Wakes `deliveries` to look at what follows."""
        self._sharing: asyncio.Task[None] | None = None
        self._asking = asyncio.Lock()
        """Questions share a channel."""

    async def open(self) -> None:
        """See `contract.Queue.open`."""
        await self._copies.open(self.topology.needed())
        await self._copies.probe()
        name = f"pgbridge worker {self.topology.worker}"
        self._connection = connection = await connect(self._settings, name)
        connection.consume(delivered=self._arrive, cancelled=self._cancelled, room=self._has_room, lost=self._lose)
        queues = self.topology.queues
        # What waits behind another of its key is in hand, too, and must leave room for other keys.
        most = self._subscription.prefetch * (MOST_HELD if self._subscription.ordered else 1)
        prefetch = min(-(-most // len(queues)), _MOST_PREFETCH)
        async with answers(self._settings, _ANSWER_LIMIT):
            for number, queue in enumerate(queues):
                channel = CHANNEL if number == 0 else _PRESENCE + number
                consumer: Consumer[RabbitMQDelivery] = Consumer(
                    connection, channel, queue, prefetch, self._settings.publish_timeout
                )
                self._consumers[channel] = consumer
                await consumer.start()
        if len(queues) > 1:
            async with answers(self._settings, _ANSWER_LIMIT):
                await connection.call(_PRESENCE, commands.Channel.Open())
                await connection.call(_PRESENCE, commands.Basic.Consume(queue=self.topology.presence))
            self._sharing = asyncio.create_task(self._share(connection))
            self._sharing.add_done_callback(self._sharing_ended)

    def _arrive(self, delivered: Delivered) -> None:
        channel, tag, exchange, routing_key, header, body = delivered
        message = Message(tag, exchange, routing_key, header, body)
        consumer = self._consumers[channel]
        consumer.is_active = True
        delivery = RabbitMQDelivery(self, consumer, message, self._subscription)
        if isinstance(delivery.event, Malformed) or self._subscribed(message):
            consumer.add(delivery)
            self._changed.set()
        else:
            consumer.acks.ack_soon(message.tag)

    def _subscribed(self, message: Message) -> bool:
        """False for what only the binding of an earlier pattern still brings. What somebody puts into the queue itself,
        past the exchange, is meant for it."""
        topic = _routing_key(message)
        return topic is None or any(matches(pattern, topic) for pattern in self._subscription.topics)

    async def deliveries(self) -> AsyncIterator[RabbitMQDelivery]:
        """See `contract.Queue.deliveries`."""
        connection = self._living()
        while True:
            for consumer in self._consumers.values():
                if self._subscription.ordered and connection.stood_still:
                    # Another process may have been given all of this.
                    self._lose(Closure("this process stood still for longer than its heartbeat allows"))
                if self.lost is not None:
                    raise self.gone(self.lost)
                if self.stopped:
                    return
                if consumer.is_ready:
                    yield consumer.hand_out()
            if not any(consumer.is_ready for consumer in self._consumers.values()):
                self._changed.clear()
                if self.lost is None and not self.stopped:
                    await self._changed.wait()

    @property
    def in_hand(self) -> int:
        """See `contract.Queue.in_hand`."""
        return sum(consumer.in_hand for consumer in self._consumers.values())

    def _cancelled(self) -> None:
        self._lose(Closure(f"it cancelled the consumer: queue {self.topology.worker} was deleted, or its leader moved"))

    def _lose(self, closure: Closure) -> None:
        if self.lost is None:
            self.lost = closure
            self._changed.set()
            self._copies.leave(closure)
        self._has_room()  # or whoever waits for room would wait for the time-out

    def _has_room(self) -> None:
        for consumer in self._consumers.values():
            consumer.acks.has_room()

    async def ack(self, delivery: RabbitMQDelivery) -> None:
        """Settles a message. Raises BrokerUnavailableError."""
        try:
            await delivery.consumer.acks.ack(delivery.message.tag)
        except ClosedError as error:
            raise self.gone(error.closure) from error
        delivery.consumer.settled(delivery)
        self._changed.set()

    async def give_back(self, delivery: RabbitMQDelivery) -> None:
        """Lets a message come again. Raises BrokerUnavailableError."""
        if self._subscription.ordered:
            return  # the end of the channel gives it back, in its order
        try:
            await delivery.consumer.acks.give_back(delivery.message.tag)
        except ClosedError as error:
            raise self.gone(error.closure) from error
        delivery.consumer.settled(delivery)

    async def copy(self, message: Message, queue: str, headers: dict[str, str]) -> None:
        """Copies a message to another queue, byte for byte, with headers beside its own; returns once confirmed.

        Raises what `Copies.publish` raises.
        """
        if self.lost is not None:
            raise self.gone(self.lost)
        await self._copies.publish(copy_of(message, queue, headers))

    def _living(self) -> Connection:
        if self._connection is None or self.lost is not None:
            raise self.gone(self.lost or Closure("it is not open"))
        return self._connection

    async def depth(self) -> int:
        """See `contract.Queue.depth`. Over the connection that consumes, since an alarm does not block that one."""
        connection = self._living()
        async with answers(self._settings, _ANSWER_LIMIT), self._asking:
            return sum([(await counts_of(connection, name))[0] for name in self.topology.waiting])

    async def _share(self, connection: Connection) -> None:
        """Hands lanes over to other processes of the worker, where this one has more than its share. Each process
        consumes every lane, and a lane is with the one that has consumed it for longest. Of a queue with a single
        active consumer RabbitMQ counts only that one, so all consume one more queue, which is always empty."""
        while self.lost is None:
            await asyncio.sleep(SHARE_INTERVAL)
            async with answers(self._settings, _ANSWER_LIMIT), self._asking:
                _, processes = await counts_of(connection, self.topology.presence)
            active = [consumer for consumer in self._consumers.values() if consumer.is_active]
            surplus = len(active) - -(-len(self._consumers) // max(1, processes))
            now = asyncio.get_running_loop().time()
            ready = sorted((each for each in active if each.busy_until <= now), key=lambda each: each.in_hand)
            for consumer in ready[: max(0, surplus)]:
                if self.stopped:
                    return
                if await consumer.come_to_rest(_REST_LIMIT):
                    async with answers(self._settings, _ANSWER_LIMIT):
                        await consumer.hand_over()
                    log.info("queue.lane_handed_over", queue=consumer.queue, processes=processes)
                else:
                    self._changed.set()  # what it held back meanwhile may go on

    def _sharing_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._lose(Closure(f"handing lanes over failed: {type(error).__name__}: {error}"))

    async def stop(self) -> None:
        """See `contract.Queue.stop`. An ordered one stops to hand out: ended now, its consumers would let others go on
        with what comes behind that which is in hand here."""
        self._living()
        if not self._subscription.ordered:
            async with answers(self._settings, _ANSWER_LIMIT):
                for consumer in self._consumers.values():
                    await consumer.cancel()
        self.stopped = True
        self._changed.set()
        if not self._subscription.ordered:
            for consumer in self._consumers.values():
                for delivery in consumer.take_back():
                    await consumer.acks.give_back(delivery.message.tag)

    def gone(self, closure: Closure) -> BrokerUnavailableError:
        """Always the error that is waited out, whatever the broker said: if it will refuse, the next `open` says so."""
        return BrokerUnavailableError(f"{rabbitmq_at(self._settings)} ended the connection: {closure}")

    async def close(self) -> None:
        """Ends both connections; the broker then has back whatever is in hand."""
        self._lose(Closure("closed by this worker"))
        if self._sharing is not None:
            self._sharing.cancel()
            await asyncio.wait([self._sharing])
        try:
            if self._connection is not None:
                for consumer in self._consumers.values():
                    consumer.acks.flush()
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
        self._topology = WorkerTopology(
            settings.exchange,
            subscription.worker,
            subscription.topics,
            delays,
            subscription.ordered,
            subscription.lanes,
        )
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

    def deliveries(self) -> AsyncIterator[RabbitMQDelivery]:
        """See `contract.Queue.deliveries`."""
        if self._session is None:
            raise BrokerUnavailableError(f"{rabbitmq_at(self._settings)} is not connected: the queue is not open")
        return self._session.deliveries()

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

    async def inspect(self) -> Sequence[str]:
        """See `contract.InspectableQueue.inspect`: the queues that are consumed, and the default exchange, over which
        retries and dead letters go."""
        topology = self._topology
        async with connected(self._settings, LOOK_LIMIT) as connection:
            await require(self._settings, connection, topology.needed())
            consumed = topology.queues if topology.lanes == 1 else [*topology.queues, topology.presence]
            said = await may_consume(self._settings, connection, consumed)
            return [*said, *await may_publish(self._settings, connection, "", [f"pgbridge.probe.{uuid4()}"])]

    async def close(self) -> None:
        """See `contract.Queue.close`."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
