"""What the contract suite needs of each broker: one harness per sink, registered in `HARNESSES`."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import aio_pika
from pydantic import SecretStr

from bridge.demo.servers import RabbitMQServer
from bridge.event import AMQP_PREFIX, Event, from_attributes
from bridge.settings import RabbitMQSettings
from bridge.sinks import Sink
from bridge.sinks.memory import MemorySettings, MemorySink
from bridge.sinks.rabbitmq import RabbitMQSink
from tests.servers.proxy import Proxy

DEADLINE = 30.0
"""Seconds after which a condition that a test waits for counts as never met."""

MAX_MESSAGE_BYTES = 100_000
"""`max_message_bytes` of every harness's sink that has such a setting."""


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """Waits until the condition holds. Fails the test after DEADLINE seconds, saying what was waited for."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        await asyncio.sleep(0.01)


class SinkHarness(Protocol):
    """A sink on a target of its own (exchange and queue, stream), which stands and takes every topic."""

    @property
    def sink(self) -> Sink:
        """Not yet open."""

    @property
    def lacking(self) -> Sink | None:
        """A sink whose target is missing; None where nothing can be missing."""

    @property
    def unreachable(self) -> Sink | None:
        """A sink on 127.0.0.1:1, where nobody listens, with the password ``hunter2``; None where there is no broker."""

    @property
    def size_limit(self) -> int | None:
        """Bytes beyond which the sink refuses a payload; None where it takes any size."""

    async def arrived(self) -> Sequence[Event]:
        """What the target holds, in order; repetitions included. Leaves it there or not; called once in a test."""

    async def break_connection(self) -> None:
        """Resets the sink's connection; returns when the sink has noticed."""

    def stall(self, on: bool) -> None:
        """Holds back the bytes between sink and broker; what is in flight stays in flight."""


Start = Callable[[Any, str], AbstractAsyncContextManager[SinkHarness]]
"""From the server that the fixture gave (None without one) and a unique name to a harness."""


class MemoryHarness:
    lacking = None
    unreachable = None
    size_limit = None

    def __init__(self) -> None:
        self.sink = MemorySink(MemorySettings(type="memory"))

    async def arrived(self) -> Sequence[Event]:
        return self.sink.arrivals

    async def break_connection(self) -> None:
        self.sink.disconnect()

    def stall(self, on: bool) -> None:
        """Nothing is ever in flight."""


@asynccontextmanager
async def memory(server: None, name: str) -> AsyncIterator[MemoryHarness]:
    yield MemoryHarness()


class RabbitMQHarness:
    size_limit = MAX_MESSAGE_BYTES

    def __init__(self, proxy: Proxy, queue: aio_pika.abc.AbstractQueue, name: str) -> None:
        self._proxy = proxy
        self._queue = queue
        self.sink = self._make(name, proxy.port)
        self.lacking = self._make(f"{name}-missing", proxy.port)
        self.unreachable = self._make(name, 1, user="guest:hunter2")

    def _make(self, exchange: str, port: int, user: str = "guest:guest") -> RabbitMQSink:
        url = SecretStr(f"amqp://{user}@127.0.0.1:{port}/")
        return RabbitMQSink(
            RabbitMQSettings(type="rabbitmq", url=url, exchange=exchange, max_message_bytes=MAX_MESSAGE_BYTES)
        )

    async def arrived(self) -> Sequence[Event]:
        return await drain(self._queue)

    async def break_connection(self) -> None:
        self._proxy.cut()
        await eventually(lambda: not self.sink.is_open, "the sink notices that its connection is gone")

    def stall(self, on: bool) -> None:
        self._proxy.blackhole = on


def event_of(message: aio_pika.abc.AbstractIncomingMessage) -> Event:
    """The event that a worker would read."""
    headers = {name: str(value) for name, value in message.headers.items()}
    return from_attributes(headers, message.body, message.content_type, AMQP_PREFIX)


async def drain(queue: aio_pika.abc.AbstractQueue) -> list[Event]:
    """Takes all that a queue holds."""
    events = []
    while (message := await queue.get(no_ack=True, fail=False)) is not None:
        events.append(event_of(message))
    return events


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


HARNESSES: dict[str, tuple[str | None, Start]] = {
    "memory": (None, memory),
    "rabbitmq": ("rabbitmq", rabbitmq),
}
"""By the sink's type: the fixture of its server, and how a harness is made."""
