"""NATS JetStream as a worker's queue: a durable pull consumer, and a stream of dead letters.

``<worker>``       consumer on the sink's stream, filtered by the subscription's topics
``<worker>_dead``  stream of dead letters; the subject is ``<worker>_dead.<topic>``, ``x-pgbridge-...`` headers tell why

Messages that wait for another attempt stay with JetStream, so a retry takes any delay; they count as unsettled, hence
MAX_UNSETTLED. What is in hand is reported as in progress, so `ack_wait` passes only for a process that died.

`attempt` is how often JetStream has delivered the message, so a delivery that was given back counts too (the inbox,
which decides when attempts are exhausted, does not count it). Nothing is dropped for its number of deliveries.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import nats.aio.subscription
from nats.aio.msg import Msg

from bridge.brokers.contract import Declaration, Failure, Subscription
from bridge.brokers.letters import letter_headers
from bridge.brokers.nats.connection import REQUEST_TIMEOUT, Client, address_of, asking, connect, disconnect, until_lost
from bridge.brokers.nats.message import dead_headers, event_of, topic_of
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.topology import HEARTBEAT, NANOSECONDS, consumer, request_for, require, stream
from bridge.errors import BrokerUnavailableError
from bridge.event import matches

_SILENCE = 3 * HEARTBEAT
"""Seconds without a sign of the server, after which a request for messages counts as lost."""

_CLOSE_LIMIT = 3.0
"""Seconds that a close waits until what is in hand has gone back."""


class NatsDelivery:
    """See `bridge.brokers.contract.Delivery`."""

    def __init__(self, queue: "NatsQueue", message: Msg) -> None:
        self._queue = queue
        self._message = message
        self.event = event_of(message)
        # What was given back counts, see above.
        self.attempt = int(message.metadata.num_delivered)

    async def ack(self) -> None:
        """As `Delivery.ack`."""
        await self._queue.settle(self._message, b"+ACK")

    async def retry(self, delay: float) -> None:
        """As `Delivery.retry`, after exactly `delay`."""
        await self._queue.settle(self._message, b'-NAK {"delay": %d}' % max(1, round(delay * NANOSECONDS)))

    async def dead_letter(self, failure: Failure) -> None:
        """As `Delivery.dead_letter`. Repeated within two minutes, it is stored once."""
        await self._queue.publish_dead(self._message, failure, self.attempt)
        await self.ack()

    async def give_back(self) -> None:
        """As `Delivery.give_back`, but JetStream counts it."""
        await self._queue.settle(self._message, b"-NAK")


class NatsQueue:
    """See `bridge.brokers.contract.Queue`."""

    def __init__(self, settings: NatsSettings, subscription: Subscription) -> None:
        """Raises SettingsError when the URL is none."""
        self._settings = settings
        self._subscription = subscription
        self._address = address_of(settings)
        self._dead_stream = f"{subscription.worker}_dead"
        self._client: Client | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._arrived: asyncio.Queue[Msg | None] = asyncio.Queue()
        # Bounded by the prefetch; None wakes `deliveries` to look at what follows.
        self._stopped = False
        self._lost = ""
        self._inbox: nats.aio.subscription.Subscription | None = None
        self._in_hand: set[str] = set()
        """Reply subjects of what arrived and is not settled."""
        self._requested = 0
        """Messages that the server may still send for the request that stands; there is one at a time."""
        self._heard = 0.0  # when the server last gave a sign, by the loop's clock

    async def open(self) -> None:
        """As `Queue.open`."""
        await self.close()
        self._stopped, self._lost, self._arrived = False, "", asyncio.Queue()
        self._in_hand, self._requested = set(), 0
        client = await connect(self._settings)
        try:
            async with asking(self._address):
                require(await self._survey(client, apply=False), self._address)
                self._inbox = await client.subscribe(client.new_inbox(), cb=self._take)
        except BaseException:
            await disconnect(client)
            raise
        self._client = client
        self._watcher = asyncio.create_task(self._watch(client))
        await self._request()

    async def _request(self) -> None:
        """Asks for as many messages as fit into the prefetch, unless a request stands."""
        room = self._subscription.prefetch - len(self._in_hand)
        if self._stopped or self._lost or self._requested or room <= 0 or self._client is None or self._inbox is None:
            return
        self._requested = room
        self._heard = asyncio.get_running_loop().time()
        subject, request = request_for(self._settings.stream, self._subscription.worker, room)
        async with asking(self._address):
            await self._client.publish(subject, request, reply=self._inbox.subject)

    async def _take(self, message: Msg) -> None:
        """What arrives for the request: a message, or a status."""
        self._heard = asyncio.get_running_loop().time()
        status = (message.headers or {}).get("Status") if not message.data else None
        if status is None:
            self._requested -= 1
            if self._stopped:
                await self._answer(message, b"-NAK")
            elif not self._subscribed(message):
                await self._answer(message, b"+ACK")
            else:
                self._in_hand.add(message.reply)
                self._arrived.put_nowait(message)
        elif status in ("404", "408"):
            self._requested = 0
        elif status != "100":
            self._lose(f"it ended the request for messages: {(message.headers or {}).get('Description', status)}")
        await self._request()

    def _subscribed(self, message: Msg) -> bool:
        """False for what only the filters take, which cannot be as narrow as the patterns."""
        topic = topic_of(message.subject)
        return any(matches(pattern, topic) for pattern in self._subscription.topics)

    async def _watch(self, client: Client) -> None:
        lost = asyncio.create_task(until_lost(client))
        try:
            while not lost.done():
                await asyncio.wait([lost], timeout=min(HEARTBEAT, self._subscription.ack_wait / 3))
                await self._extend(client)
                if self._requested and asyncio.get_running_loop().time() - self._heard > _SILENCE:
                    break
        finally:
            lost.cancel()
        self._lose("it closed the connection" if lost.done() else f"nothing was heard for {_SILENCE:g} s")

    async def _extend(self, client: Client) -> None:
        """Tells the server that what is in hand is worked on, so that it waits for another `ack_wait`."""
        with contextlib.suppress(BrokerUnavailableError):  # A lost connection shows itself to the watcher.
            async with asking(self._address):
                for reply in tuple(self._in_hand):
                    await client.publish(reply, b"+WPI")

    def _lose(self, reason: str) -> None:
        self._lost = self._lost or reason
        self._arrived.put_nowait(None)

    async def deliveries(self) -> AsyncIterator[NatsDelivery]:
        """As `Queue.deliveries`."""
        while True:
            message = await self._arrived.get()
            if self._lost:
                raise BrokerUnavailableError(f"NATS at {self._address} gives no more messages: {self._lost}")
            if self._stopped:
                return
            if message is not None:
                yield NatsDelivery(self, message)

    async def settle(self, message: Msg, verb: bytes) -> None:
        """Answers for a message; returns once the server has taken it, and makes room for the next.

        A connection that was opened since will do. Raises BrokerUnavailableError.
        """
        async with asking(self._address):
            await self._answer(message, verb)
        self._in_hand.discard(message.reply)
        await self._request()

    async def _answer(self, message: Msg, verb: bytes) -> None:
        await self._connected().request(message.reply, verb, timeout=REQUEST_TIMEOUT)

    def _connected(self) -> Client:
        if self._client is None or not self._client.is_connected:
            raise BrokerUnavailableError(f"NATS at {self._address} is gone: {self._lost or 'the queue is not open'}")
        return self._client

    async def publish_dead(self, message: Msg, failure: Failure, attempts: int) -> None:
        """Copies a message to the stream of dead letters, byte for byte; returns once that is confirmed."""
        client = self._connected()
        letter = letter_headers(self._subscription.worker, failure, attempts)
        headers = dead_headers(message, letter, client.max_payload)
        subject = f"{self._dead_stream}.{message.subject.partition('.')[2]}"
        async with asking(self._address):
            await client.jetstream(timeout=REQUEST_TIMEOUT).publish(
                subject, message.data, stream=self._dead_stream, headers=headers
            )

    async def stop(self) -> None:
        """As `Queue.stop`. What has arrived and was not delivered goes back at once."""
        if self._stopped or self._client is None or self._inbox is None:
            return
        self._stopped = True
        async with asking(self._address):
            # Draining handles what is on its way; a plain unsubscribe would leave it unsettled until ack_wait.
            await self._inbox.drain()  # type: ignore[no-untyped-call]
            while not self._arrived.empty():
                message = self._arrived.get_nowait()
                if message is not None:
                    await self._answer(message, b"-NAK")
                    self._in_hand.discard(message.reply)
        self._arrived.put_nowait(None)

    async def _survey(self, client: Client, *, apply: bool) -> list[Declaration]:
        jetstream = client.jetstream(timeout=REQUEST_TIMEOUT)
        events = await stream(jetstream, self._settings.stream, apply=apply)
        dead = await stream(jetstream, self._dead_stream, apply=apply)
        return [events, await consumer(jetstream, self._settings.stream, self._subscription, apply=apply), dead]

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """As `Queue.topology`; a consumer that differs is changed too, since that loses nothing."""
        client = await connect(self._settings)
        try:
            async with asking(self._address):
                return await self._survey(client, apply=apply)
        finally:
            await disconnect(client)

    async def close(self) -> None:
        """As `Queue.close`. What is in hand goes back at once; after a lost connection, after `ack_wait`."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        if self._client is not None and self._client.is_connected:
            # First no more may come: what goes back would come to the request that stands.
            with contextlib.suppress(BrokerUnavailableError, TimeoutError):
                async with asyncio.timeout(_CLOSE_LIMIT), asking(self._address):
                    await self.stop()
                    for reply in self._in_hand:
                        await self._client.publish(reply, b"-NAK")
        client, self._client = self._client, None
        if client is None:
            return
        self._lose("closed by this worker")
        await disconnect(client)
