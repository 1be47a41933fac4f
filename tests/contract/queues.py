"""What the contract suite needs of each broker: one harness per queue, registered in `HARNESSES`."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import aio_pika
import nats
from google.pubsub_v1 import types
from pydantic import SecretStr

from bridge.brokers.contract import CONFIRMED, DeadLetters, Queue, Sink, Subscription
from bridge.brokers.letters import PREFIX, letter_headers
from bridge.brokers.memory import MemoryBroker, MemoryQueue, MemorySettings, Message
from bridge.brokers.nats import BROKER as NATS
from bridge.brokers.nats.dead import NatsDeadLetters
from bridge.brokers.nats.message import unquote_headers
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.sink import NatsSink
from bridge.brokers.pubsub.connection import connect
from bridge.brokers.pubsub.dead import PubSubDeadLetters
from bridge.brokers.pubsub.queue import PubSubQueue
from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.brokers.pubsub.sink import PubSubSink
from bridge.brokers.rabbitmq.dead import RabbitMQDeadLetters
from bridge.brokers.rabbitmq.queue import RabbitMQQueue
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.sink import RabbitMQSink
from bridge.event import Event, Malformed
from tests.support.proxy import Proxy
from tests.support.pubsub import PROJECT, PubSubReader, pubsub_settings
from tests.support.servers import NatsServer, PubSubEmulator, RabbitMQServer
from tests.support.until import LIMIT, until

"""Seconds after which what a test waits for counts as never coming."""

ACK_WAIT = 3.0
"""Seconds after which a broker that cannot see a consumer go gives its deliveries to another."""

RETRY_DELAYS = (0.3, 1.0)


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, as its broker holds it."""

    payload: bytes
    headers: Mapping[str, str]
    """Those that begin with `PREFIX`, without it."""


class QueueHarness(Protocol):
    """One worker's queue on a target of its own, which exists and takes every topic below ``shop``."""

    @property
    def lacking(self) -> Queue | None:
        """A queue that is declared nowhere; None where nothing can be missing."""

    @property
    def ordered_by_key(self) -> bool:
        """Whether the broker keeps order only among events with one key."""

    @property
    def counts_given_back(self) -> bool:
        """Whether the broker counts a delivery that was given back as an attempt."""

    @property
    def lease(self) -> float:
        """Seconds after which what a process that vanished had in hand comes to another, at the latest."""

    def queue(self, prefetch: int = 10, proxy: Proxy | None = None) -> Queue:
        """A consumer of the worker's queue, not yet open; each call makes another. `proxy` is one of its own."""

    def proxy(self) -> Proxy | None:
        """Another way to the server, not yet open; None where there is no wire."""

    async def publish(self, *events: Event) -> None:
        """As the bridge would."""

    async def publish_strange(self, payload: bytes) -> None:
        """A message that is not a CloudEvent, on a topic that the worker subscribes to."""

    async def dead_letters(self, count: int) -> Sequence[Letter]:
        """Waits for this many dead letters, and takes them."""

    def desk(self) -> DeadLetters | None:
        """Where an operator looks at the dead letters; None where a queue has no such place."""

    async def break_connections(self) -> None:
        """Resets the connections of every queue."""


class Start(Protocol):
    def __call__(self, server: Any, name: str, *, ordered: bool = False) -> AbstractAsyncContextManager[QueueHarness]:
        """From the server that the fixture gave (None without one) and a unique name to a harness; `ordered` when the
        worker is."""


def subscription(worker: str, prefetch: int = 10, *, ordered: bool = False) -> Subscription:
    return Subscription(worker, ["shop.#"], prefetch, RETRY_DELAYS, max_attempts=3, ack_wait=ACK_WAIT, ordered=ordered)


class MemoryHarness:
    lacking = None
    ordered_by_key = False
    counts_given_back = False
    lease = 0.0

    def __init__(self, worker: str, ordered: bool) -> None:
        self._worker = worker
        self._ordered = ordered
        self._broker = MemoryBroker()

    def queue(self, prefetch: int = 10, proxy: Proxy | None = None) -> MemoryQueue:
        wanted = subscription(self._worker, prefetch, ordered=self._ordered)
        return MemoryQueue(MemorySettings(type="memory"), wanted, self._broker)

    def proxy(self) -> None:
        return None

    async def publish(self, *events: Event) -> None:
        for event in events:
            await self._broker.append(Message(event))

    async def publish_strange(self, payload: bytes) -> None:
        await self._broker.append(Message(Malformed(payload.decode())))

    async def dead_letters(self, count: int) -> Sequence[Letter]:
        assert len(self._broker.dead) == count
        return [
            Letter(
                letter.event.payload if isinstance(letter.event, Event) else str(letter.event).encode(),
                _ours(letter_headers(self._worker, letter.failure, letter.attempts)),
            )
            for letter in self._broker.dead
        ]

    def desk(self) -> None:
        return None

    async def break_connections(self) -> None:
        raise NotImplementedError


@asynccontextmanager
async def memory(server: None, name: str, *, ordered: bool = False) -> AsyncIterator[MemoryHarness]:
    yield MemoryHarness(name, ordered)


class RabbitMQHarness:
    ordered_by_key = False
    counts_given_back = True
    lease = 0.0

    def __init__(self, server: RabbitMQServer, proxy: Proxy, sink: Sink, name: str, ordered: bool) -> None:
        self._server = server
        self._proxy = proxy
        self._sink = sink
        self._name = name
        self._ordered = ordered
        self.lacking = RabbitMQQueue(self.settings(), subscription(f"{name}-missing", ordered=ordered))

    def settings(self, proxy: Proxy | None = None) -> RabbitMQSettings:
        url = SecretStr(f"amqp://guest:guest@127.0.0.1:{(proxy or self._proxy).port}/")
        # By its heartbeat the broker notices a process that stands still.
        heartbeat = 1.0 if self._ordered else 30.0
        return RabbitMQSettings(type="rabbitmq", url=url, exchange=self._name, heartbeat=heartbeat)

    def queue(self, prefetch: int = 10, proxy: Proxy | None = None) -> RabbitMQQueue:
        return RabbitMQQueue(self.settings(proxy), subscription(self._name, prefetch, ordered=self._ordered))

    def proxy(self) -> Proxy:
        return Proxy(self._server.host, self._server.port)

    async def publish(self, *events: Event) -> None:
        assert list(await self._sink.publish(events)) == [CONFIRMED] * len(events)

    async def publish_strange(self, payload: bytes) -> None:
        async with await aio_pika.connect(self._server.url) as connection:
            channel = await connection.channel()
            exchange = await channel.get_exchange(self._name, ensure=False)
            await exchange.publish(aio_pika.Message(payload), "shop.strange")

    async def dead_letters(self, count: int) -> Sequence[Letter]:
        async with await aio_pika.connect(self._server.url) as connection:
            channel = await connection.channel()
            queue = await channel.get_queue(f"{self._name}.dead", ensure=False)
            messages = [await queue.get(no_ack=True, timeout=LIMIT) for _ in range(count)]
            assert await queue.get(no_ack=True, fail=False) is None
        return [
            Letter(message.body, _ours({name: str(value) for name, value in message.headers.items()}))
            for message in messages
        ]

    def desk(self) -> RabbitMQDeadLetters:
        return RabbitMQDeadLetters(self.settings(), self._name)

    async def break_connections(self) -> None:
        self._proxy.cut()


@asynccontextmanager
async def rabbitmq(server: RabbitMQServer, name: str, *, ordered: bool = False) -> AsyncIterator[RabbitMQHarness]:
    direct = RabbitMQSettings(type="rabbitmq", url=SecretStr(server.url), exchange=name)
    sink = RabbitMQSink(direct)
    async with Proxy(server.host, server.port) as proxy:
        harness = RabbitMQHarness(server, proxy, sink, name, ordered)
        await RabbitMQQueue(direct, subscription(name, ordered=ordered)).topology(apply=True)
        await sink.open()
        yield harness
        await sink.close()


class NatsHarness:
    ordered_by_key = False
    counts_given_back = True
    lease = ACK_WAIT

    def __init__(self, server: NatsServer, proxy: Proxy, sink: Sink, name: str, ordered: bool) -> None:
        self._server = server
        self._proxy = proxy
        self._sink = sink
        self._name = name
        self._ordered = ordered
        self.lacking = NATS.queue(self.settings(), subscription(f"{name}-missing", ordered=ordered))

    def settings(self, proxy: Proxy | None = None) -> NatsSettings:
        url = SecretStr(f"nats://127.0.0.1:{(proxy or self._proxy).port}")
        return NatsSettings(type="nats", url=url, stream=self._name)

    def queue(self, prefetch: int = 10, proxy: Proxy | None = None) -> Queue:
        return NATS.queue(self.settings(proxy), subscription(self._name, prefetch, ordered=self._ordered))

    def proxy(self) -> Proxy:
        return Proxy(self._server.host, self._server.port)

    async def publish(self, *events: Event) -> None:
        assert list(await self._sink.publish(events)) == [CONFIRMED] * len(events)

    async def publish_strange(self, payload: bytes) -> None:
        async with await nats.connect(self._server.url) as client:
            await client.jetstream().publish(f"{self._name}.shop.strange", payload)

    async def dead_letters(self, count: int) -> Sequence[Letter]:
        stream = f"{self._name}_dead"
        async with await nats.connect(self._server.url) as client:
            jetstream = client.jetstream()
            assert (await jetstream.stream_info(stream)).state.messages == count
            reader = await jetstream.subscribe(f"{stream}.>", ordered_consumer=True)
            messages = [await reader.next_msg(LIMIT) for _ in range(count)]
        return [Letter(message.data, _ours(unquote_headers(message.headers or {}))) for message in messages]

    def desk(self) -> NatsDeadLetters:
        return NatsDeadLetters(self.settings(), self._name)

    async def break_connections(self) -> None:
        self._proxy.cut()


@asynccontextmanager
async def nats_jetstream(server: NatsServer, name: str, *, ordered: bool = False) -> AsyncIterator[NatsHarness]:
    direct = NatsSettings(type="nats", url=SecretStr(server.url), stream=name)
    sink = NatsSink(direct)
    async with Proxy(server.host, server.port) as proxy:
        harness = NatsHarness(server, proxy, sink, name, ordered)
        await NATS.queue(direct, subscription(name, ordered=ordered)).topology(apply=True)
        await sink.open()
        yield harness
        await sink.close()


class PubSubHarness:
    ordered_by_key = True
    counts_given_back = True
    lease = 10.0

    def __init__(self, server: PubSubEmulator, proxy: Proxy, sink: Sink, name: str, ordered: bool) -> None:
        self._server = server
        self._ordered = ordered
        self._direct = pubsub_settings(server.address, name)
        self._dead = PubSubReader(server.address, f"{name}.dead", subscription=f"{name}.dead")
        self._proxy = proxy
        self._sink = sink
        self._name = name
        self._queues: list[PubSubQueue] = []
        self.lacking = PubSubQueue(self.settings(), subscription(f"{name}-missing", ordered=ordered))

    def settings(self, proxy: Proxy | None = None) -> PubSubSettings:
        return pubsub_settings(f"127.0.0.1:{(proxy or self._proxy).port}", self._name)

    def proxy(self) -> Proxy:
        return Proxy(self._server.host, self._server.port)

    def queue(self, prefetch: int = 10, proxy: Proxy | None = None) -> PubSubQueue:
        queue = PubSubQueue(self.settings(proxy), subscription(self._name, prefetch, ordered=self._ordered))
        self._queues.append(queue)
        return queue

    async def publish(self, *events: Event) -> None:
        assert list(await self._sink.publish(events)) == [CONFIRMED] * len(events)

    async def publish_strange(self, payload: bytes) -> None:
        connection = await connect(self._direct)
        message = types.PubsubMessage.pb()(data=payload)
        request = types.PublishRequest.pb()(topic=f"projects/{PROJECT}/topics/{self._name}", messages=[message])
        await connection.call(connection.publish, request)
        await connection.close()

    async def dead_letters(self, count: int) -> Sequence[Letter]:
        messages = await self._dead.messages()
        assert len(messages) == count
        return [Letter(message.data, _ours(message.attributes)) for message in messages]

    def desk(self) -> PubSubDeadLetters:
        return PubSubDeadLetters(self.settings(), self._name)

    async def break_connections(self) -> None:
        # Refused for a while, since gRPC makes an idle connection anew, and leases outlive connections.
        self._proxy.refuse = True
        self._proxy.cut()
        await until(lambda: all(queue.lost for queue in self._queues), "the queues notice the loss")
        self._proxy.refuse = False


@asynccontextmanager
async def pubsub(server: PubSubEmulator, name: str, *, ordered: bool = False) -> AsyncIterator[PubSubHarness]:
    direct = pubsub_settings(server.address, name, max_message_bytes=9_800_000)
    sink = PubSubSink(direct)
    async with Proxy(server.host, server.port) as proxy:
        harness = PubSubHarness(server, proxy, sink, name, ordered)
        await PubSubQueue(direct, subscription(name, ordered=ordered)).topology(apply=True)
        await sink.open()
        yield harness
        await sink.close()


def _ours(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(PREFIX): value for name, value in headers.items() if name.startswith(PREFIX)}


HARNESSES: dict[str, tuple[str | None, Start]] = {
    "memory": (None, memory),
    "nats": ("nats_server", nats_jetstream),
    "pubsub": ("pubsub_emulator", pubsub),
    "rabbitmq": ("rabbitmq", rabbitmq),
}
"""By the type of the sink: the fixture of its server, and how a harness is made."""

ORDERED: tuple[str, ...] = ("memory", "rabbitmq", "nats", "pubsub")
"""Those whose queue takes `Subscription.ordered`."""
