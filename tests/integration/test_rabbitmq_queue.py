"""What is RabbitMQ's own about a worker's queue."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from pydantic import SecretStr

from bridge.brokers.contract import CONFIRMED, Failure, Subscription
from bridge.brokers.rabbitmq import topology
from bridge.brokers.rabbitmq.queue import RabbitMQQueue
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.sink import RabbitMQSink
from bridge.brokers.rabbitmq.topology import duration
from bridge.errors import BrokerUnavailableError
from bridge.event import Event, Malformed
from tests.support.events import make_event
from tests.support.servers import RabbitMQServer
from tests.support.until import LIMIT, until


def queue_of(server: RabbitMQServer, name: str, topic: str = "#", *, ordered: bool = False) -> RabbitMQQueue:
    settings = RabbitMQSettings(type="rabbitmq", url=SecretStr(server.url), exchange=name)
    subscription = Subscription(name, [topic], 10, [0.5, 60.0], max_attempts=3, ack_wait=30.0, ordered=ordered)
    return RabbitMQQueue(settings, subscription)


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


async def test_no_number_of_deliveries_makes_rabbitmq_give_up_a_message(
    rabbitmq: RabbitMQServer, channel: AbstractChannel, unique: str
) -> None:
    queue = queue_of(rabbitmq, unique)
    await queue.topology(apply=True)
    await publish(channel, unique, b"patient")
    await queue.open()
    deliveries = aiter(queue.deliveries())
    # RabbitMQ 4 gives up after 20 by itself, and so did we.
    for attempt in range(1, 31):
        delivery = await asyncio.wait_for(anext(deliveries), LIMIT)
        assert delivery.attempt == attempt
        await delivery.give_back()
    await queue.close()


async def test_what_a_policy_gives_up_is_a_dead_letter(
    rabbitmq: RabbitMQServer, channel: AbstractChannel, unique: str
) -> None:
    queue = queue_of(rabbitmq, unique)
    await queue.topology(apply=True)
    await asyncio.to_thread(rabbitmq.ctl, "set_policy", unique, f"^{unique}$", '{"delivery-limit":1}')
    try:
        await publish(channel, unique, b"policy")
        await queue.open()
        deliveries = aiter(queue.deliveries())
        for _ in range(2):
            await (await asyncio.wait_for(anext(deliveries), LIMIT)).give_back()
        dead = await channel.get_queue(f"{unique}.dead", ensure=False)
        async with asyncio.timeout(LIMIT), dead.iterator(no_ack=True) as letters:
            letter = await anext(letters)
        assert letter.body == b"policy"
        assert "x-death" in letter.headers
        await queue.close()
    finally:
        await asyncio.to_thread(rabbitmq.ctl, "clear_policy", unique)


async def test_a_queue_with_the_delivery_limit_of_earlier_versions_differs(
    rabbitmq: RabbitMQServer, channel: AbstractChannel, unique: str
) -> None:
    arguments: dict[str, Any] = {
        "x-queue-type": "quorum",
        "x-delivery-limit": 20,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": f"{unique}.dead",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    await channel.declare_queue(unique, durable=True, arguments=arguments)
    declarations = {each.name: each for each in await queue_of(rabbitmq, unique).topology(apply=True)}
    assert declarations[unique].state == "differs"
    assert "x-delivery-limit" in declarations[unique].detail
    assert "run empty" in declarations[unique].detail
    # A worker goes on with it all the same.
    queue = queue_of(rabbitmq, unique)
    await queue.open()
    await queue.close()


@pytest.mark.rabbitmq
@pytest.mark.crashes_rabbitmq
async def test_a_new_queue_with_its_binding_and_what_it_confirmed_outlives_a_crash_of_the_broker_at_once(
    server_folder: Path, unique: str
) -> None:
    with RabbitMQServer(server_folder / unique) as server:
        # The last queue to be declared is the one at risk, here the one that is consumed.
        queue = queue_of(server, unique, ordered=True)
        await queue.topology(apply=True)
        sink = RabbitMQSink(RabbitMQSettings(type="rabbitmq", url=SecretStr(server.url), exchange=unique))
        await sink.open()
        events = [make_event(), make_event()]
        assert await sink.publish(events) == [CONFIRMED] * 2
        await asyncio.to_thread(server.kill)
        await sink.close()
        await asyncio.to_thread(server.start)
        await sink.open()
        events.append(make_event())
        assert await sink.publish(events[2:]) == [CONFIRMED]
        await sink.close()
        await queue.open()
        deliveries = aiter(queue.deliveries())
        async with asyncio.timeout(LIMIT):
            for event in events:
                delivery = await anext(deliveries)
                assert isinstance(delivery.event, Event)
                assert delivery.event.id == event.id
                await delivery.ack()
        await queue.close()


@pytest.mark.rabbitmq
async def test_a_broker_that_crashes_before_a_new_binding_is_on_disk_is_told(
    server_folder: Path, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "UNSAVED", 4.0)
    with RabbitMQServer(server_folder / unique) as server:
        sink = RabbitMQSink(RabbitMQSettings(type="rabbitmq", url=SecretStr(server.url), exchange=unique))
        await sink.topology(apply=True)
        await sink.open()
        applying = asyncio.create_task(queue_of(server, unique).topology(apply=True))

        async def is_bound() -> bool:
            return await sink.publish([make_event()]) == [CONFIRMED]

        await until(is_bound)
        await asyncio.to_thread(server.kill)
        with pytest.raises(BrokerUnavailableError):
            await applying
        await sink.close()


def event_message(topic: str) -> aio_pika.Message:
    headers: dict[str, Any] = {
        "cloudEvents_specversion": "1.0",
        "cloudEvents_id": topic,
        "cloudEvents_source": "shop",
        "cloudEvents_type": topic,
        "cloudEvents_time": "2026-02-03T04:05:06Z",
    }
    return aio_pika.Message(b"{}", content_type="application/json", headers=headers, message_id=topic)


async def test_a_narrowed_subscription_gets_nothing_of_its_earlier_patterns(
    rabbitmq: RabbitMQServer, channel: AbstractChannel, unique: str
) -> None:
    wide, narrow = queue_of(rabbitmq, unique), queue_of(rabbitmq, unique, "shop.order.*")
    await wide.topology(apply=True)
    exchange = await channel.get_exchange(unique, ensure=False)
    await wide.open()
    deliveries = aiter(wide.deliveries())
    for topic in ("shop.order.placed", "shop.stock.low"):
        await exchange.publish(event_message(topic), topic)
        await (await asyncio.wait_for(anext(deliveries), LIMIT)).retry(0.1)
    await wide.close()
    await narrow.topology(apply=True)
    await narrow.open()
    deliveries = aiter(narrow.deliveries())
    for _ in range(12):
        await exchange.publish(event_message("shop.stock.low"), "shop.stock.low")
    # An event of another publisher, whose type is not its routing key; and one that was put into the queue itself.
    await exchange.publish(event_message("com.example.placed"), "shop.order.foreign")
    await channel.default_exchange.publish(event_message("shop.stock.by-hand"), unique)
    came = set()
    for _ in range(4):
        delivery = await asyncio.wait_for(anext(deliveries), LIMIT)
        assert isinstance(delivery.event, Event)
        came.add((delivery.event.topic, delivery.attempt))
        again = delivery.event.topic == "com.example.placed" and delivery.attempt == 1
        await (delivery.retry(0.1) if again else delivery.ack())
    assert came == {
        ("shop.order.placed", 2),
        ("com.example.placed", 1),
        ("com.example.placed", 2),
        ("shop.stock.by-hand", 1),
    }
    await narrow.close()
    left = await channel.declare_queue(unique, passive=True)
    assert left.declaration_result.message_count == 0


async def test_a_message_that_is_no_event_is_handed_out_though_no_pattern_takes_it(
    rabbitmq: RabbitMQServer, channel: AbstractChannel, unique: str
) -> None:
    await queue_of(rabbitmq, unique).topology(apply=True)
    await publish(channel, unique, b"strange")
    queue = queue_of(rabbitmq, unique, "shop.#")
    await queue.open()
    delivery = await asyncio.wait_for(anext(aiter(queue.deliveries())), LIMIT)
    assert isinstance(delivery.event, Malformed)
    await delivery.ack()
    await queue.close()


async def test_a_copy_has_every_byte_and_property_of_the_message(
    rabbitmq: RabbitMQServer, channel: AbstractChannel, unique: str
) -> None:
    queue = queue_of(rabbitmq, unique)
    await queue.topology(apply=True)
    body = bytes(range(256)) * 1000
    properties: dict[str, Any] = {
        "content_type": "text/x",
        "content_encoding": "y",
        "priority": 3,
        "correlation_id": "c",
        "reply_to": "r",
        "message_id": "m",
        "timestamp": datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC),
        "type": "t",
        "app_id": "a",
    }
    headers: dict[str, Any] = {"number": 2**40, "list": [1, "a"], "table": {"b": True}, "text": "\u2713"}
    exchange = await channel.get_exchange(unique, ensure=False)
    other = await channel.declare_queue(f"{unique}.other", durable=True)
    # RabbitMQ routes by CC too; the copy must not go there again.
    message = aio_pika.Message(body, headers=headers | {"CC": [f"{unique}.other"]}, user_id="guest", **properties)
    await exchange.publish(message, "a.b")
    await queue.open()
    delivery = await asyncio.wait_for(anext(aiter(queue.deliveries())), LIMIT)
    await delivery.dead_letter(Failure("error", "a lone surrogate: \ud800", "trace"))
    await queue.close()
    dead = await channel.get_queue(f"{unique}.dead", ensure=False)
    letter = await dead.get(no_ack=True, timeout=LIMIT)
    assert letter is not None
    assert letter.body == body
    assert {name: getattr(letter, name) for name in properties} == properties
    assert {name: letter.headers.get(name) for name in headers} == headers
    assert letter.headers["x-pgbridge-reason"] == "a lone surrogate: \\ud800"
    assert letter.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert (await channel.declare_queue(other.name, passive=True)).declaration_result.message_count == 0


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
