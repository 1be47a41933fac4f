"""RabbitMQ as a worker's queue: quorum queues, one for each delay between attempts, and one for dead letters.

``<worker>``                bound to the topic exchange, once for each pattern
``<worker>.retry.<delay>``  its messages expire back into ``<worker>``; one queue a delay, since a quorum queue
                            expires only at its head
``<worker>.dead``           dead letters, with ``x-pgbridge-...`` headers that say why

A retry or a dead letter is published, persistent and mandatory, and the original is acknowledged only once the broker
has confirmed the copy: a crash in between repeats a message, and none is lost.

`attempt` is 1, plus the retries that the message's own header counts, plus the ``x-delivery-count`` of the quorum queue
since it was last published. RabbitMQ counts there whatever was delivered and not acknowledged, so a delivery that was
given back counts too (the inbox, which decides when attempts are exhausted, does not count it).
Beyond DELIVERY_LIMIT of those RabbitMQ itself moves the message to ``<worker>.dead``, with ``x-death`` in place of our
headers.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from typing import Final

from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage
from aiormq.abc import AbstractChannel as UnderlayChannel

from bridge.brokers.contract import Declaration, Failure, Subscription
from bridge.brokers.letters import ATTEMPTS, letter_headers
from bridge.brokers.rabbitmq.client import LOST, closure_of, copy_to, open_client, refusals
from bridge.brokers.rabbitmq.closure import Closure, rabbitmq_at
from bridge.brokers.rabbitmq.connection import connected
from bridge.brokers.rabbitmq.message import copy_of, count_of, event_of
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.topology import LOOK_LIMIT, WorkerTopology, declarations, require
from bridge.errors import BrokerUnavailableError
from bridge.process.batching import Batcher

_TOGETHER: Final = 1000
"""Most acknowledgements that are sent at once."""

_CLOSE_LIMIT: Final = 10.0
"""Seconds that the broker may take to answer a goodbye."""


class Tags:
    """Which tags are settled: all up to one, and some above it."""

    def __init__(self) -> None:
        self._below = 0
        self._above: set[int] = set()

    def settle(self, tags: Iterable[int]) -> int:
        """Notes that these are settled. Gives the highest tag up to which all are; 0 for none."""
        self._above.update(tags)
        while self._below + 1 in self._above:
            self._below += 1
            self._above.discard(self._below)
        return self._below


class Acks:
    """The acknowledgements of one channel. Both methods raise what aio-pika raises when the channel is gone."""

    def __init__(self, channel: UnderlayChannel) -> None:
        self._channel = channel
        self._tags = Tags()
        self._batcher = Batcher(self._ack_together, _TOGETHER)

    async def ack(self, message: AbstractIncomingMessage) -> None:
        """Settles a message, which never comes again; returns when that is on its way."""
        await self._batcher.ask(_tag(message))

    async def give_back(self, message: AbstractIncomingMessage) -> None:
        """Lets a message come again at once."""
        tag = _tag(message)
        await self._channel.basic_nack(tag, requeue=True)
        self._tags.settle([tag])

    async def _ack_together(self, tags: Sequence[int]) -> Sequence[None]:
        below = self._tags.settle(tags)
        frames = [(tag, False) for tag in tags if tag > below]
        # RabbitMQ closes the channel for a tag that it has settled before, so the frame names one of these.
        if together := [tag for tag in tags if tag <= below]:
            frames.append((max(together), True))
        for number, (tag, multiple) in enumerate(frames, 1):
            await self._channel.basic_ack(tag, multiple=multiple, wait=number == len(frames))
        return [None] * len(tags)


def _tag(message: AbstractIncomingMessage) -> int:
    if message.delivery_tag is None:
        raise RuntimeError("a message that was not delivered cannot be settled")
    return message.delivery_tag


class RabbitMQDelivery:
    """See `bridge.brokers.contract.Delivery`."""

    def __init__(self, queue: "RabbitMQQueue", acks: Acks, message: AbstractIncomingMessage) -> None:
        self._queue = queue
        self._acks = acks
        self._message = message
        self._retries = count_of(message, ATTEMPTS)
        self.event = event_of(message)
        """See `contract.Delivery.event`."""
        self.attempt = 1 + self._retries + count_of(message, "x-delivery-count")
        """See `contract.Delivery.attempt`, and above for what was given back."""

    async def ack(self) -> None:
        """See `contract.Delivery.ack`."""
        with self._queue.refusals():
            await self._acks.ack(self._message)

    async def retry(self, delay: float) -> None:
        """See `contract.Delivery.retry`."""
        queue = self._queue.worker_topology.retry_queue(delay)
        await self._queue.publish(queue, self._message, {ATTEMPTS: str(self.attempt)})
        await self.ack()

    async def dead_letter(self, failure: Failure) -> None:
        """See `contract.Delivery.dead_letter`."""
        ours = self._queue.worker_topology
        await self._queue.publish(ours.dead, self._message, letter_headers(ours.worker, failure, self.attempt))
        await self.ack()

    async def give_back(self) -> None:
        """See `contract.Delivery.give_back`; but RabbitMQ counts it."""
        with self._queue.refusals():
            await self._acks.give_back(self._message)


class RabbitMQQueue:
    """See `bridge.brokers.contract.Queue`."""

    def __init__(self, settings: RabbitMQSettings, subscription: Subscription) -> None:
        # A worker with one attempt has no ladder, and still asks again while another worker has its event.
        delays = subscription.retry_delays or [1.0]
        self.worker_topology = WorkerTopology(settings.exchange, subscription.worker, subscription.topics, delays)
        self._settings = settings
        self._prefetch = subscription.prefetch
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._default: AbstractExchange | None = None
        self._consumer = ""
        self._arrived: asyncio.Queue[RabbitMQDelivery | None] = asyncio.Queue()
        """Bounded by the prefetch; None wakes `deliveries` to look at what follows."""
        self._stopped = False
        self._lost: Closure | None = None
        self._publishing = asyncio.Lock()

    async def open(self) -> None:
        """See `contract.Queue.open`.

        Raises SettingsError for certificates that cannot be used, BrokerUnavailableError, LoginError, RefusedError
        for the virtual host, PrivilegeError, TopologyError.
        """
        await self.close()
        self._stopped, self._lost, self._arrived = False, None, asyncio.Queue()
        async with connected(self._settings, LOOK_LIMIT) as connection:
            await require(self._settings, connection, self.worker_topology.needed())
        self._connection = await open_client(self._settings)
        with self.refusals():
            self._connection.close_callbacks.add(self._closed)
            self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
            self._channel.close_callbacks.add(self._closed)
            underlay = await self._channel.get_underlay_channel()
            underlay.on_consumer_cancel_callbacks.add(self._cancelled)
            acks = Acks(underlay)
            self._default = self._channel.default_exchange
            await self._channel.set_qos(prefetch_count=self._prefetch)
            queue = await self._channel.get_queue(self.worker_topology.worker, ensure=False)
            self._consumer = await queue.consume(partial(self._arrive, acks))

    async def _arrive(self, acks: Acks, message: AbstractIncomingMessage) -> None:
        self._arrived.put_nowait(RabbitMQDelivery(self, acks, message))

    def _closed(self, _: object, error: BaseException | None) -> None:
        self._lose(closure_of(error))

    def _cancelled(self, *_: object) -> None:
        name = self.worker_topology.worker
        self._lose(Closure(f"it cancelled the consumer: queue {name} was deleted, or its leader moved"))

    def _lose(self, closure: Closure) -> None:
        self._lost = self._lost or closure
        self._arrived.put_nowait(None)

    async def deliveries(self) -> AsyncIterator[RabbitMQDelivery]:
        """See `contract.Queue.deliveries`."""
        while True:
            delivery = await self._arrived.get()
            if self._lost:
                raise self._gone(self._lost)
            if self._stopped:
                return
            if delivery is not None:
                yield delivery

    async def stop(self) -> None:
        """See `contract.Queue.stop`. What has arrived and was not delivered goes back at once."""
        if self._stopped or self._channel is None:
            return
        with self.refusals():
            underlay = await self._channel.get_underlay_channel()
            await underlay.basic_cancel(self._consumer)
            self._stopped = True
            while not self._arrived.empty():
                delivery = self._arrived.get_nowait()
                if delivery is not None:
                    await delivery.give_back()
        self._arrived.put_nowait(None)

    async def publish(self, queue: str, message: AbstractIncomingMessage, headers: dict[str, str]) -> None:
        """Copies a message to another queue, byte for byte, with headers beside its own; returns once confirmed.

        Raises BrokerUnavailableError, PrivilegeError, or TopologyError when the queue is gone.
        """
        copy = copy_of(message, headers)
        # One at a time: aiormq tells returned messages apart by their message id, which two deliveries may share.
        async with self._publishing:
            if self._default is None:
                raise self._gone(self._lost or Closure("the queue is not open"))
            with self.refusals():
                await copy_to(self._settings, self._default, copy, queue)

    def refusals(self) -> contextlib.AbstractContextManager[None]:
        """Turns what aio-pika raises into our errors."""
        return refusals(self._settings, lambda: self._lost)

    def _gone(self, closure: Closure) -> BrokerUnavailableError:
        """Always the error that is waited out, whatever the broker said: if it will refuse, the next `open` says so."""
        return BrokerUnavailableError(f"{rabbitmq_at(self._settings)} ended the connection: {closure}")

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """The exchange, the queues and their bindings. Raises what `open` raises, but for what is missing."""
        async with connected(self._settings, LOOK_LIMIT) as connection:
            return await declarations(connection, self.worker_topology, apply=apply)

    async def close(self) -> None:
        """See `contract.Queue.close`."""
        connection, self._connection, self._channel, self._default = self._connection, None, None, None
        if connection is not None:
            self._lose(Closure("closed by this worker"))
            with contextlib.suppress(*LOST):
                async with asyncio.timeout(_CLOSE_LIMIT):
                    await connection.close()
