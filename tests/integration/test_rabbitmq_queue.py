"""What is RabbitMQ's own about a worker's queue."""

import asyncio
from collections.abc import AsyncIterator

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from pydantic import SecretStr

from bridge.brokers.contract import Subscription
from bridge.brokers.rabbitmq.queue import RabbitMQQueue
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.topology import DELIVERY_LIMIT, duration
from bridge.errors import BrokerUnavailableError, TopologyError
from bridge.event import Malformed
from tests.support.servers import RabbitMQServer
from tests.support.until import LIMIT


def queue_of(server: RabbitMQServer, name: str) -> RabbitMQQueue:
    settings = RabbitMQSettings(type="rabbitmq", url=SecretStr(server.url), exchange=name)
    return RabbitMQQueue(settings, Subscription(name, ["#"], 10, [0.5, 60.0], max_attempts=3, ack_wait=30.0))


@pytest.fixture
async def channel(rabbitmq: RabbitMQServer) -> AsyncIterator[AbstractChannel]:
    async with await aio_pika.connect(rabbitmq.url) as connection, connection.channel() as channel:
        yield channel


async def publish(channel: AbstractChannel, exchange: str, body: bytes) -> None:
    await (await channel.get_exchange(exchange, ensure=False)).publish(aio_pika.Message(body), "a.b")


async def test_a_queue_with_other_arguments_differs_and_the_rest_is_still_told(
    rabbitmq: RabbitMQServer, channel: AbstractChannel, unique: str
) -> None:
    await channel.declare_queue(f"{unique}.retry.1m", durable=True)
    declarations = {each.name: each for each in await queue_of(rabbitmq, unique).topology(apply=True)}
    differing = declarations[f"{unique}.retry.1m"]
    assert differing.state == "differs"
    assert "inequivalent arg" in differing.detail
    assert "delete it" in differing.detail
    assert {each.state for name, each in declarations.items() if name != differing.name} == {"declared"}


async def test_a_message_that_is_never_acknowledged_ends_as_a_dead_letter(
    rabbitmq: RabbitMQServer, channel: AbstractChannel, unique: str
) -> None:
    queue = queue_of(rabbitmq, unique)
    await queue.topology(apply=True)
    await publish(channel, unique, b"poison")
    await queue.open()
    deliveries = aiter(queue.deliveries())
    for attempt in range(1, DELIVERY_LIMIT + 2):
        delivery = await asyncio.wait_for(anext(deliveries), LIMIT)
        assert delivery.attempt == attempt
        await delivery.give_back()
    dead = await channel.get_queue(f"{unique}.dead", ensure=False)
    async with asyncio.timeout(LIMIT), dead.iterator(no_ack=True) as letters:
        letter = await anext(letters)
    assert letter.body == b"poison"
    assert "x-death" in letter.headers
    await queue.close()


async def test_a_retry_queue_that_is_gone_is_told_and_the_message_stays(
    rabbitmq: RabbitMQServer, channel: AbstractChannel, unique: str
) -> None:
    queue = queue_of(rabbitmq, unique)
    await queue.topology(apply=True)
    await publish(channel, unique, b"")
    await queue.open()
    deliveries = aiter(queue.deliveries())
    delivery = await asyncio.wait_for(anext(deliveries), LIMIT)
    assert isinstance(delivery.event, Malformed)
    await channel.queue_delete(f"{unique}.retry.500ms")
    with pytest.raises(TopologyError, match=r"retry\.500ms"):
        await delivery.retry(0.1)
    await delivery.give_back()
    again = await asyncio.wait_for(anext(deliveries), LIMIT)
    assert again.attempt == 2
    await again.ack()
    await queue.close()


async def test_a_deleted_queue_ends_the_deliveries(
    rabbitmq: RabbitMQServer, channel: AbstractChannel, unique: str
) -> None:
    queue = queue_of(rabbitmq, unique)
    await queue.topology(apply=True)
    await queue.open()
    waiting = asyncio.ensure_future(anext(aiter(queue.deliveries())))
    await channel.queue_delete(unique)
    with pytest.raises(BrokerUnavailableError, match="cancelled the consumer"):
        await asyncio.wait_for(waiting, LIMIT)
    await queue.close()


@pytest.mark.parametrize(
    ("milliseconds", "name"),
    [(500, "500ms"), (5000, "5s"), (90_000, "90s"), (600_000, "10m"), (7_200_000, "2h"), (86_400_000, "1d")],
)
def test_a_delay_is_named_as_the_settings_write_it(milliseconds: int, name: str) -> None:
    assert duration(milliseconds) == name
