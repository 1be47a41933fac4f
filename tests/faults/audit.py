"""Takes every message from a queue, and notes repeats and order: of one sink, as a consumer would see it."""

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import aio_pika
import grpc
import nats
import nats.errors
from aio_pika.exceptions import AMQPError
from google.protobuf import empty_pb2
from google.pubsub_v1 import types
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig
from pamqp.common import FieldTable

from bridge.brokers.nats.message import unquote_headers
from tests.support.pubsub import PROJECT


class Audit:
    """What has arrived in one queue. A subclass for each broker consumes it."""

    def __init__(self, url: str, place: str, queue: str, sink: str, takes: Collection[str] | None = None) -> None:
        """`place`: the exchange or stream; `takes`: the topics that get here of all that the sink is given."""
        self.url = url
        self.place = place
        self.queue = queue
        self.sink = sink
        self.takes: Callable[[str], bool] = (lambda _: True) if takes is None else takes.__contains__
        self.first_at: dict[str, float] = {}
        """When each event was seen first, by the loop's clock."""
        self.repeats: Counter[str] = Counter()
        """Repeats of an event that the bridge published again; what the broker only delivered again is left out."""
        self.out_of_order: list[str] = []
        """What came behind a later event of its key, for people."""
        self.going = asyncio.Event()
        """Cleared, it takes nothing more, and the queue fills."""
        self.going.set()
        self.ready = asyncio.Event()
        self._last: defaultdict[str, int] = defaultdict(int)
        self._arrived = asyncio.Condition()

    async def run(self) -> None:
        """Consumes until it is cancelled; an outage of the broker is waited out."""
        while True:
            try:
                await self._consume()
            except (AMQPError, grpc.aio.AioRpcError, nats.errors.Error, OSError, RuntimeError, TimeoutError):
                # The clients raise any of these when the connection goes, by the moment in which it goes.
                await asyncio.sleep(0.1)

    async def _consume(self) -> None:
        """Sets `ready` once nothing can get past it. Returns or raises when the connection is lost."""
        raise NotImplementedError

    async def note(self, event_id: str, key: str, payload: bytes, *, delivered_again: bool) -> None:
        """One message has come."""
        if event_id in self.first_at:
            if not delivered_again:
                self.repeats[event_id] += 1
            return
        self.first_at[event_id] = asyncio.get_running_loop().time()
        number = int(json.loads(payload)["n"])
        # What a lost connection had in hand comes again behind newer messages, whatever its place in the queue was.
        # Whatever else came before this one was published before it, so the check still finds every overtaking.
        if number <= self._last[key] and not delivered_again:
            self.out_of_order.append(f"{key[:40]}: {number} behind {self._last[key]}")
        self._last[key] = max(number, self._last[key])
        async with self._arrived:
            self._arrived.notify_all()

    async def seen(self, event_ids: set[str], limit: float) -> set[str]:
        """Waits until these have arrived; gives those that have not within `limit` seconds."""
        try:
            async with asyncio.timeout(limit), self._arrived:
                await self._arrived.wait_for(lambda: event_ids <= self.first_at.keys())
        except TimeoutError:
            return event_ids - self.first_at.keys()
        return set()


class RabbitMQAudit(Audit):
    """A quorum queue of its own, bound to a topic exchange."""

    def __init__(
        self,
        url: str,
        place: str,
        queue: str,
        sink: str,
        takes: Collection[str] | None = None,
        *,
        room: int | None = None,
    ) -> None:
        """`room`: messages that the queue holds; it refuses what comes beyond them."""
        super().__init__(url, place, queue, sink, takes)
        self._keys = ["#"] if takes is None else list(takes)
        self._arguments: FieldTable = {"x-queue-type": "quorum"}
        self._prefetch = 100 if room is None else room
        if room is not None:
            self._arguments |= {"x-max-length": room, "x-overflow": "reject-publish"}

    async def _consume(self) -> None:
        connection = await aio_pika.connect(f"{self.url}?heartbeat=5", timeout=5)
        try:
            channel = await connection.channel()
            # Few, since the place of what is delivered again cannot be known, and what is in hand has left the room.
            await channel.set_qos(self._prefetch)
            exchange = await channel.declare_exchange(self.place, "topic", durable=True)
            queue = await channel.declare_queue(self.queue, durable=True, arguments=self._arguments)
            for key in self._keys:
                await queue.bind(exchange, key)
            self.ready.set()
            async with queue.iterator() as messages:
                async for message in messages:
                    await self.going.wait()
                    subject = str(message.headers.get("cloudEvents_subject"))
                    await self.note(
                        str(message.message_id), subject, message.body, delivered_again=bool(message.redelivered)
                    )
                    await message.ack()
        finally:
            await connection.close()


class NatsAudit(Audit):
    """A durable consumer of a stream."""

    _highest = 0
    """Place in the stream of the last message; one that is no higher was delivered again."""

    async def _consume(self) -> None:
        client = await nats.connect(self.url, connect_timeout=5, allow_reconnect=False, error_cb=_say_nothing)
        try:
            stream = client.jetstream()
            await stream.add_consumer(self.place, ConsumerConfig(durable_name=self.queue, max_ack_pending=1000))
            consumer = await stream.pull_subscribe_bind(self.queue, self.place)
            self.ready.set()
            while client.is_connected:
                try:
                    messages = await consumer.fetch(100, timeout=2)
                except TimeoutError:
                    continue
                for message in messages:
                    await self.going.wait()
                    await self._take(message)
        finally:
            await client.close()

    async def _take(self, message: Msg) -> None:
        headers = unquote_headers(message.headers or {})
        place = message.metadata.sequence.stream
        again = place <= self._highest
        self._highest = max(place, self._highest)
        await self.note(headers["ce-id"], headers.get("ce-subject", ""), message.data, delivered_again=again)
        await message.ack()


async def _say_nothing(_: Exception) -> None:
    """In place of nats-py's log line."""


class PubSubAudit(Audit):
    """A subscription of its own, in order. A pull waits as long as the emulator is frozen: what it was given for one
    that has ended would come again late."""

    _numbers: set[str]
    """The emulator's own, by which a message that it delivers again is known from one that was published again."""

    async def _consume(self) -> None:
        async with grpc.aio.insecure_channel(self.url) as channel:
            subscription = Subscriber(channel, self.queue)
            if not self.ready.is_set():
                self._numbers = set()
                await subscription.create(self.place)
                self.ready.set()
            while True:
                received = await subscription.pull()
                for each in received:
                    await self._take(each.message)
                await subscription.acknowledge(received)
                if not received:
                    await asyncio.sleep(0.05)

    async def _take(self, message: Any) -> None:
        flat = message.attributes
        again = message.message_id in self._numbers
        self._numbers.add(message.message_id)
        await self.note(flat["ce-id"], flat.get("ce-subject", ""), message.data, delivered_again=again)


class Subscriber:
    """A subscription on the emulator, without any time limit."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self._channel = channel
        self._name = f"projects/{PROJECT}/subscriptions/{name}"

    async def create(self, topic: str) -> None:
        """Makes it, of this topic."""
        wanted = types.Subscription.pb()(
            name=self._name,
            topic=f"projects/{PROJECT}/topics/{topic}",
            ack_deadline_seconds=600,
            enable_message_ordering=True,
        )
        await self._call("CreateSubscription", wanted, types.Subscription.pb())

    async def pull(self) -> Sequence[Any]:
        """What there is now. Never a pull that waits: the emulator gives messages to one that was cancelled, too."""
        request = types.PullRequest.pb()(subscription=self._name, max_messages=1000, return_immediately=True)
        response = await self._call("Pull", request, types.PullResponse.pb())
        received: Sequence[Any] = response.received_messages
        return received

    async def acknowledge(self, received: Sequence[Any]) -> None:
        """Settles what was pulled."""
        if received:
            ids = [each.ack_id for each in received]
            request = types.AcknowledgeRequest.pb()(subscription=self._name, ack_ids=ids)
            await self._call("Acknowledge", request, empty_pb2.Empty)

    async def _call(self, verb: str, request: Any, response: Any) -> Any:
        method = self._channel.unary_unary(
            f"/google.pubsub.v1.Subscriber/{verb}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        return await method(request)
