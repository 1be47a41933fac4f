"""The exchange and the quorum queue that RabbitMQ's contenders publish to."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import aio_pika
from aio_pika.abc import FieldValue

from tests.bench.bridge import wait_until
from tests.bench.world import World


@dataclass(frozen=True, slots=True)
class Target:
    """A durable topic exchange with one quorum queue that takes everything."""

    url: str
    exchange: str
    queue: str

    @property
    def sink(self) -> dict[str, str | int]:
        """The sink's settings."""
        return {"type": "rabbitmq", "url": self.url, "exchange": self.exchange}

    def count(self) -> int:
        """Messages in the queue."""
        return asyncio.run(self._count())

    def expect(self, messages: int) -> None:
        """Waits until the queue holds exactly so many. Raises RuntimeError when it holds others."""
        try:
            wait_until(lambda: self.count() == messages, "the expected count", 10.0)
        except TimeoutError:
            raise RuntimeError(f"the queue holds {self.count()} messages instead of {messages}") from None

    async def _count(self) -> int:
        async with await aio_pika.connect(self.url) as connection:
            channel = await connection.channel()
            queue = await channel.declare_queue(self.queue, passive=True)
            return queue.declaration_result.message_count or 0


@contextmanager
def quorum_queue(world: World) -> Iterator[Target]:
    """A new exchange and queue, deleted afterwards: no contender meets the messages of another."""
    name = world.unique("bench")
    target = Target(world.rabbitmq.url, name, name)
    asyncio.run(_declare(target))
    try:
        yield target
    finally:
        asyncio.run(_delete(target))


@contextmanager
def other_queue(target: Target, topic: str, arguments: Mapping[str, FieldValue]) -> Iterator[str]:
    """The name of another durable queue at the same exchange, for one topic."""
    name = f"{target.queue}-other"
    asyncio.run(_declare_other(target, name, topic, dict(arguments)))
    try:
        yield name
    finally:
        asyncio.run(_delete_other(target, name))


async def _declare_other(target: Target, name: str, topic: str, arguments: dict[str, FieldValue]) -> None:
    async with await aio_pika.connect(target.url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(name, durable=True, arguments=arguments)
        await queue.bind(target.exchange, topic)


async def _delete_other(target: Target, name: str) -> None:
    async with await aio_pika.connect(target.url) as connection:
        channel = await connection.channel()
        await channel.queue_delete(name)


async def _declare(target: Target) -> None:
    async with await aio_pika.connect(target.url) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(target.exchange, "topic", durable=True)
        queue = await channel.declare_queue(target.queue, durable=True, arguments={"x-queue-type": "quorum"})
        await queue.bind(exchange, "#")


async def _delete(target: Target) -> None:
    async with await aio_pika.connect(target.url) as connection:
        channel = await connection.channel()
        await channel.queue_delete(target.queue)
        await channel.exchange_delete(target.exchange)
