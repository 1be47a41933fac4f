"""What the contract suite needs of each broker: one harness per sink, registered in `HARNESSES`."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import aio_pika
import nats
from pydantic import SecretStr

from bridge.brokers.contract import CONFIRMED, Outcome, Sink
from bridge.brokers.memory import MemorySettings, MemorySink
from bridge.brokers.nats.message import CONTENT_TYPE, unquote_headers
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.sink import NatsSink
from bridge.brokers.pubsub.sink import PubSubSink
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.sink import RabbitMQSink
from bridge.event import Event, from_attributes
from tests.support.messages import drain
from tests.support.proxy import Proxy
from tests.support.pubsub import PubSubReader, pubsub_settings
from tests.support.servers import NatsServer, PubSubEmulator, RabbitMQServer
from tests.support.until import LIMIT, until

MAX_MESSAGE_BYTES = 100_000
"""`max_message_bytes` of every harness's sink that has such a setting."""


IMPATIENCE = 2.0
"""Seconds; `publish_timeout` of every harness's impatient sink."""


class SinkHarness(Protocol):
    """A sink on a target of its own (exchange and queue, stream), which exists and takes every topic."""

    @property
    def sink(self) -> Sink:
        """Not yet open."""

    @property
    def impatient(self) -> Sink | None:
        """Another on the same target, with a `publish_timeout` of IMPATIENCE; None where nothing is ever in flight."""

    @property
    def lacking(self) -> Sink | None:
        """A sink whose target is missing; None where nothing can be missing."""

    @property
    def unreachable(self) -> Sink | None:
        """A sink on 127.0.0.1:1, where nobody listens, with the password ``hunter2``; None where there is no broker."""

    @property
    def size_limit(self) -> int | None:
        """Bytes beyond which the sink refuses a payload; None where it takes any size."""

    @property
    def ordered_by_key(self) -> bool:
        """Whether the broker keeps order only among events with one key."""

    async def arrived(self) -> Sequence[Event]:
        """What the target holds, in order; repetitions included. Leaves it there or not; called once in a test."""

    async def break_connection(self) -> None:
        """Resets the sink's connection; returns when the sink has noticed."""

    def stall(self, on: bool) -> None:
        """Holds back the bytes between sinks and broker, as a frozen broker does; what is in flight stays there."""


Start = Callable[[Any, str], AbstractAsyncContextManager[SinkHarness]]
"""From the server that the fixture gave (None without one) and a unique name to a harness."""


class RecordingSink(MemorySink):
    """Notes what it confirmed."""

    def __init__(self) -> None:
        super().__init__(MemorySettings(type="memory"))
        self.confirmed: list[Event] = []

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        outcomes = await super().publish(events)
        self.confirmed += [event for event, outcome in zip(events, outcomes, strict=True) if outcome is CONFIRMED]
        return outcomes


class MemoryHarness:
    impatient = None
    lacking = None
    unreachable = None
    size_limit = None
    ordered_by_key = False

    def __init__(self) -> None:
        self.sink = RecordingSink()

    async def arrived(self) -> Sequence[Event]:
        return self.sink.confirmed

    async def break_connection(self) -> None:
        await self.sink.close()

    def stall(self, on: bool) -> None:
        """Nothing is ever in flight."""


@asynccontextmanager
async def memory(server: None, name: str) -> AsyncIterator[MemoryHarness]:
    yield MemoryHarness()


class RabbitMQHarness:
    size_limit = MAX_MESSAGE_BYTES
    ordered_by_key = False

    def __init__(self, proxy: Proxy, queue: aio_pika.abc.AbstractQueue, name: str) -> None:
        self._proxy = proxy
        self._queue = queue
        self.sink = self._make(name, proxy.port)
        self.impatient = self._make(name, proxy.port, publish_timeout=IMPATIENCE)
        self.lacking = self._make(f"{name}-missing", proxy.port)
        self.unreachable = self._make(name, 1, user="guest:hunter2")

    def _make(self, exchange: str, port: int, user: str = "guest:guest", **changes: Any) -> RabbitMQSink:
        url = SecretStr(f"amqp://{user}@127.0.0.1:{port}/")
        values = {"type": "rabbitmq", "url": url, "exchange": exchange, "max_message_bytes": MAX_MESSAGE_BYTES}
        return RabbitMQSink(RabbitMQSettings.model_validate(values | changes))

    async def arrived(self) -> Sequence[Event]:
        return await drain(self._queue)

    async def break_connection(self) -> None:
        self._proxy.cut()
        await until(lambda: not self.sink.is_open, "the sink notices that its connection is gone")

    def stall(self, on: bool) -> None:
        self._proxy.blackhole = on


@asynccontextmanager
async def rabbitmq(server: RabbitMQServer, name: str) -> AsyncIterator[RabbitMQHarness]:
    async with Proxy(server.host, server.port) as proxy, await aio_pika.connect(server.url) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(name, aio_pika.ExchangeType.TOPIC, durable=True)
        queue = await channel.declare_queue(name, durable=True)
        await queue.bind(exchange, "#")
        yield RabbitMQHarness(proxy, queue, name)
        await queue.delete(if_unused=False, if_empty=False)
        await exchange.delete()


class NatsHarness:
    size_limit = MAX_MESSAGE_BYTES
    ordered_by_key = False

    def __init__(self, server: NatsServer, proxy: Proxy, name: str) -> None:
        self._server = server
        self._proxy = proxy
        self._name = name
        self.sink = self._make(name, proxy.port)
        self.impatient = self._make(name, proxy.port, publish_timeout=IMPATIENCE)
        self.lacking = self._make(f"{name}-missing", proxy.port)
        self.unreachable = self._make(name, 1, user="bridge:hunter2@")

    def _make(self, stream: str, port: int, user: str = "", **changes: Any) -> NatsSink:
        url = SecretStr(f"nats://{user}127.0.0.1:{port}")
        values = {"type": "nats", "url": url, "stream": stream, "max_message_bytes": MAX_MESSAGE_BYTES}
        return NatsSink(NatsSettings.model_validate(values | changes))

    async def arrived(self) -> Sequence[Event]:
        async with await nats.connect(self._server.url) as client:
            jetstream = client.jetstream()
            count = (await jetstream.stream_info(self._name)).state.messages
            events: list[Event] = []
            if count:
                reader = await jetstream.subscribe(f"{self._name}.>", ordered_consumer=True)
                while len(events) < count:
                    message = await reader.next_msg(LIMIT)
                    headers = message.headers or {}
                    events.append(from_attributes(unquote_headers(headers), message.data, headers.get(CONTENT_TYPE)))
            return events

    async def break_connection(self) -> None:
        self._proxy.cut()
        await until(lambda: not self.sink.is_open, "the sink notices that its connection is gone")

    def stall(self, on: bool) -> None:
        self._proxy.blackhole = on


@asynccontextmanager
async def nats_jetstream(server: NatsServer, name: str) -> AsyncIterator[NatsHarness]:
    async with Proxy(server.host, server.port) as proxy:
        harness = NatsHarness(server, proxy, name)
        await harness.sink.topology(apply=True)
        yield harness


class PubSubHarness:
    size_limit = MAX_MESSAGE_BYTES
    ordered_by_key = True

    def __init__(self, server: PubSubEmulator, proxy: Proxy, name: str) -> None:
        self._proxy = proxy
        self._reader = PubSubReader(server.address, name)
        self.sink = self._make(name, proxy.port)
        self.impatient = self._make(name, proxy.port, publish_timeout=IMPATIENCE)
        self.lacking = self._make(f"{name}-missing", proxy.port)
        self.unreachable = self._make(name, 1)

    def _make(self, topic: str, port: int, **changes: Any) -> PubSubSink:
        return PubSubSink(pubsub_settings(f"127.0.0.1:{port}", topic, **changes))

    async def arrived(self) -> Sequence[Event]:
        return await self._reader.drain()

    async def break_connection(self) -> None:
        # Refused for a while, since gRPC makes an idle connection anew without telling the sink.
        self._proxy.refuse = True
        self._proxy.cut()
        await until(lambda: not self.sink.is_open, "the sink notices that its connection is gone")
        self._proxy.refuse = False

    def stall(self, on: bool) -> None:
        self._proxy.blackhole = on


@asynccontextmanager
async def pubsub(server: PubSubEmulator, name: str) -> AsyncIterator[PubSubHarness]:
    async with Proxy(server.host, server.port) as proxy:
        harness = PubSubHarness(server, proxy, name)
        await harness.sink.topology(apply=True)
        await PubSubReader(server.address, name).subscribe()
        yield harness


HARNESSES: dict[str, tuple[str | None, Start]] = {
    "memory": (None, memory),
    "nats": ("nats_server", nats_jetstream),
    "pubsub": ("pubsub_emulator", pubsub),
    "rabbitmq": ("rabbitmq", rabbitmq),
}
"""By the sink's type: the fixture of its server, and how a harness is made."""
