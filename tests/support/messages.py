"""What tests of the bridge look at: a queue that takes everything, and the settings of a bridge that fills it."""

import asyncio

import aio_pika
import psycopg

from bridge.brokers.rabbitmq.lanes import LANE
from bridge.event import AMQP_PREFIX, Event, from_attributes

ACKS = 100
"""Messages that are acknowledged together: one acknowledgement each takes longer than the messages themselves."""


class Messages:
    """A queue bound to everything on one exchange."""

    def __init__(self, url: str, exchange: str) -> None:
        self.url, self.exchange = url, exchange
        self.seen = 0
        """Messages taken so far."""

    async def open(self) -> None:
        self.connection = await aio_pika.connect(self.url)
        channel = await self.connection.channel()
        await channel.set_qos(1000)
        exchange = await channel.declare_exchange(self.exchange, aio_pika.ExchangeType.TOPIC, durable=True)
        self.queue = await channel.declare_queue(f"{self.exchange}-all", durable=True)
        await self.queue.bind(exchange, "#")

    async def take(self, count: int, timeout: float = 60.0) -> list[aio_pika.abc.AbstractIncomingMessage]:
        """The next `count` messages, acknowledged."""
        taken: list[aio_pika.abc.AbstractIncomingMessage] = []
        async with asyncio.timeout(timeout), self.queue.iterator() as messages:
            async for message in messages:
                taken.append(message)
                self.seen += 1
                if len(taken) % ACKS == 0 or len(taken) >= count:
                    await message.ack(multiple=True)
                if len(taken) >= count:
                    break
        return taken

    async def take_distinct(self, count: int, timeout: float = 60.0) -> list[aio_pika.abc.AbstractIncomingMessage]:
        """Messages until `count` different ids have come; the repeats are in it."""
        taken: list[aio_pika.abc.AbstractIncomingMessage] = []
        seen = set()
        async with asyncio.timeout(timeout), self.queue.iterator() as messages:
            async for message in messages:
                taken.append(message)
                self.seen += 1
                seen.add(message.message_id)
                if len(taken) % ACKS == 0 or len(seen) >= count:
                    await message.ack(multiple=True)
                if len(seen) >= count:
                    break
        return taken


async def drain(queue: aio_pika.abc.AbstractQueue) -> list[Event]:
    """Takes all that a queue holds, as the events that a worker would read."""
    events = []
    while (message := await queue.get(no_ack=True, fail=False)) is not None:
        headers = {name: str(value) for name, value in message.headers.items() if name != LANE}
        events.append(from_attributes(headers, message.body, message.content_type, AMQP_PREFIX))
    return events


def settings(dsn: str, messages: Messages, more: str = "") -> str:
    return f"""
name = "test"
[postgres]
dsn = "{dsn}"
[sinks.events]
type = "rabbitmq"
url = "{messages.url}"
exchange = "{messages.exchange}"
[[routes]]
topic = "#"
sink = "events"
{more}
"""


async def execute(dsn: str, query: str, *values: object) -> list[tuple[object, ...]]:
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        cursor = await connection.execute(query, values)
        return await cursor.fetchall() if cursor.description else []


def stored_mark(dsn: str) -> int:
    """The mark of the one bridge: every event up to it is settled."""
    with psycopg.connect(dsn) as connection:
        row = connection.execute("select mark from bridge.cursor").fetchone()
    assert row is not None
    return int(row[0])
