"""Messages that other programs may put into a worker's queue on RabbitMQ, and that client libraries cannot read."""

import asyncio
import struct
from collections.abc import AsyncIterator

import aio_pika
import pytest
from pamqp import commands, frame
from pydantic import SecretStr

from bridge.brokers.contract import Failure, Subscription
from bridge.brokers.rabbitmq.connection import connect
from bridge.brokers.rabbitmq.frames import CHANNEL
from bridge.brokers.rabbitmq.queue import RabbitMQQueue
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.event import Event, Malformed
from tests.support.servers import RabbitMQServer
from tests.support.until import LIMIT

pytestmark = pytest.mark.rabbitmq

# Flags of the properties in a content header (AMQP 0-9-1, 4.2.6.1), by their place from the left.
HEADERS, PRIORITY, MESSAGE_ID, TIMESTAMP, TYPE = (1 << bit for bit in (13, 11, 7, 6, 5))


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def table(value: bytes) -> bytes:
    """One that has a single field, ``a``."""
    fields = short(b"a") + value
    return struct.pack(">I", len(fields)) + fields


def nested(depth: int) -> bytes:
    value = b"V"
    for _ in range(depth):
        value = b"F" + table(value)
    return table(value)


HOSTILE = {
    "a time in microseconds": (TIMESTAMP, struct.pack(">Q", 10**15)),
    "the largest time": (TIMESTAMP, struct.pack(">Q", 2**64 - 1)),
    "a deep table": (HEADERS, nested(1000)),
    "a high priority": (PRIORITY, b"\xff"),
    "an id that is not UTF-8": (MESSAGE_ID, short(b"\xff\xfe")),
    "a type that is not UTF-8": (TYPE, short(b"\xff\xfe")),
    "a header's name that is not UTF-8": (HEADERS, struct.pack(">I", 4) + short(b"\xff\xfe") + b"V"),
    "a header's time": (HEADERS, table(b"T" + struct.pack(">Q", 2**63))),
    "a header's decimal": (HEADERS, table(b"D\xff" + struct.pack(">i", 5))),
    "an empty header": (HEADERS, struct.pack(">I", 0)),
}


@pytest.fixture
async def queue(rabbitmq: RabbitMQServer, unique: str) -> AsyncIterator[RabbitMQQueue]:
    settings = RabbitMQSettings(type="rabbitmq", url=SecretStr(rabbitmq.url), exchange=unique)
    queue = RabbitMQQueue(settings, Subscription(unique, ["shop.#"], 4, [0.1], max_attempts=3, ack_wait=5.0))
    await queue.topology(apply=True)
    await queue.open()
    yield queue
    await queue.close()


async def publish(rabbitmq: RabbitMQServer, exchange: str, flags: int, properties: bytes) -> None:
    """Sends the properties as they are."""
    settings = RabbitMQSettings(type="rabbitmq", url=SecretStr(rabbitmq.url), exchange=exchange)
    connection = await connect(settings)
    await connection.call(CHANNEL, commands.Channel.Open())
    header = struct.pack(">HHQH", 60, 0, 2, flags) + properties
    connection.write(
        frame.marshal(commands.Basic.Publish(exchange=exchange, routing_key="shop.odd"), CHANNEL)
        + struct.pack(">BHI", 2, CHANNEL, len(header))
        + header
        + b"\xce"
        + struct.pack(">BHI", 3, CHANNEL, 2)
        + b"{}\xce"
    )
    # An answer behind it says that it was taken.
    await connection.call(CHANNEL, commands.Basic.Qos(prefetch_count=1))
    await connection.close()


@pytest.mark.parametrize("kind", HOSTILE)
async def test_what_no_library_can_read_is_malformed_and_ends_no_connection(
    queue: RabbitMQQueue, rabbitmq: RabbitMQServer, unique: str, kind: str
) -> None:
    deliveries = aiter(queue.deliveries())
    # More than the prefetch, since what is lost between library and worker stays in hand.
    for _ in range(6):
        await publish(rabbitmq, unique, *HOSTILE[kind])
    for number in range(6):
        delivery = await asyncio.wait_for(anext(deliveries), LIMIT)
        assert isinstance(delivery.event, Malformed)
        if number % 2:
            await delivery.retry(0.05)
            delivery = await asyncio.wait_for(anext(deliveries), LIMIT)
        await delivery.dead_letter(Failure("malformed", str(delivery.event)))
    async with await aio_pika.connect(rabbitmq.url) as connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange(unique, ensure=False)
        attributes = {"specversion": "1.0", "id": "1", "type": "shop.even", "source": "/s"}
        headers = {f"cloudEvents_{name}": value for name, value in attributes.items()}
        await exchange.publish(aio_pika.Message(b"{}", headers=dict(headers)), "shop.even")
    delivery = await asyncio.wait_for(anext(deliveries), LIMIT)
    assert isinstance(delivery.event, Event)
    await delivery.ack()
