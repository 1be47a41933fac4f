"""CloudEvents that other programs publish with a broker's own client reach a worker as events."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import aio_pika
import nats
import pytest
from google.pubsub_v1 import types
from pydantic import SecretStr

from bridge.brokers.contract import Delivery, Failure, Queue, Subscription
from bridge.brokers.nats.queue import NatsQueue
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.pubsub.connection import connect
from bridge.brokers.pubsub.queue import PubSubQueue
from bridge.brokers.rabbitmq.queue import RabbitMQQueue
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.event import Event, Malformed
from tests.support.pubsub import PROJECT, pubsub_settings
from tests.support.servers import NatsServer, PubSubEmulator, RabbitMQServer
from tests.support.until import LIMIT

pytestmark = [pytest.mark.rabbitmq, pytest.mark.pubsub]

Headers = Mapping[str, Any]


class Stranger(Protocol):
    """Another program, and the queue of a worker that subscribed to ``shop.#``."""

    prefix: str
    """Of attributes, in binary mode."""
    clock: bool
    """Whether the broker knows when it took a message."""

    def queue(self) -> Queue:
        """The worker's, not yet open."""

    async def publish(self, payload: bytes, headers: Headers, content_type: str | None = None) -> None:
        """A message on the topic ``shop.order.placed``."""


def _subscription(name: str) -> Subscription:
    return Subscription(name, ["shop.#"], 10, [0.1], max_attempts=3, ack_wait=5.0)


@dataclass
class OnRabbitMQ:
    server: RabbitMQServer
    name: str
    prefix: str = "cloudEvents_"
    clock: bool = False

    def queue(self) -> RabbitMQQueue:
        settings = RabbitMQSettings(type="rabbitmq", url=SecretStr(self.server.url), exchange=self.name)
        return RabbitMQQueue(settings, _subscription(self.name))

    async def publish(
        self, payload: bytes, headers: Headers, content_type: str | None = None, timestamp: datetime | None = None
    ) -> None:
        async with await aio_pika.connect(self.server.url) as connection:
            exchange = await (await connection.channel()).get_exchange(self.name, ensure=False)
            message = aio_pika.Message(payload, headers={**headers}, content_type=content_type, timestamp=timestamp)
            await exchange.publish(message, "shop.order.placed")


@dataclass
class OnNats:
    server: NatsServer
    name: str
    prefix: str = "ce-"
    clock: bool = True

    def queue(self) -> NatsQueue:
        settings = NatsSettings(type="nats", url=SecretStr(self.server.url), stream=self.name)
        return NatsQueue(settings, _subscription(self.name))

    async def publish(self, payload: bytes, headers: Headers, content_type: str | None = None) -> None:
        typed = {"Content-Type": content_type} if content_type else {}
        async with await nats.connect(self.server.url) as client:
            await client.jetstream().publish(
                f"{self.name}.shop.order.placed", payload, headers={**headers, **typed} or None
            )


@dataclass
class OnPubSub:
    server: PubSubEmulator
    name: str
    prefix: str = "ce-"
    clock: bool = True

    def queue(self) -> PubSubQueue:
        return PubSubQueue(pubsub_settings(self.server.address, self.name), _subscription(self.name))

    async def publish(self, payload: bytes, headers: Headers, content_type: str | None = None) -> None:
        typed = {"content-type": content_type} if content_type else {}
        connection = await connect(pubsub_settings(self.server.address, self.name))
        message = types.PubsubMessage.pb()(data=payload, attributes={**headers, **typed})
        request = types.PublishRequest.pb()(topic=f"projects/{PROJECT}/topics/{self.name}", messages=[message])
        await connection.call(connection.publish, request)
        await connection.close()


@pytest.fixture(params=["nats_server", "pubsub_emulator", "rabbitmq"])
async def stranger(request: pytest.FixtureRequest, unique: str) -> Stranger:
    server = request.getfixturevalue(request.param)
    kinds: dict[str, Any] = {"nats_server": OnNats, "pubsub_emulator": OnPubSub, "rabbitmq": OnRabbitMQ}
    stranger: Stranger = kinds[request.param](server, unique)
    await stranger.queue().topology(apply=True)
    return stranger


@asynccontextmanager
async def delivered(stranger: Stranger) -> AsyncIterator[AsyncIterator[Delivery]]:
    """What the worker's queue delivers."""
    queue = stranger.queue()
    await queue.open()
    try:
        yield queue.deliveries()
    finally:
        await queue.close()


async def following(deliveries: AsyncIterator[Delivery]) -> Delivery:
    return await asyncio.wait_for(anext(deliveries), LIMIT)


async def taken(stranger: Stranger) -> Event | Malformed:
    """The next message, acknowledged."""
    async with delivered(stranger) as deliveries:
        delivery = await following(deliveries)
        await delivery.ack()
        return delivery.event


ATTRIBUTES = {"specversion": "1.0", "id": "order-17", "source": "https://shop", "type": "shop.order.placed"}
TIME = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
EVENT = Event(
    id="order-17",
    topic="shop.order.placed",
    payload=b'{"total": 34.260}',
    key="customer 7",
    source="https://shop",
    time=TIME,
    content_type="application/json; charset=utf-8",
    headers={"dataschema": "https://schema", "own": "1"},
)


def binary(prefix: str, **more: str) -> dict[str, str]:
    return {prefix + name: value for name, value in {**ATTRIBUTES, **more}.items()}


def structured(**more: object) -> bytes:
    return json.dumps({**ATTRIBUTES, **more}).encode()


async def test_an_event_in_binary_mode_is_read(stranger: Stranger) -> None:
    headers = binary(
        stranger.prefix, time="2026-01-02T04:04:05+01:00", subject="customer 7", dataschema="https://schema"
    )
    await stranger.publish(EVENT.payload, headers | {"own": "1"}, EVENT.content_type)
    assert await taken(stranger) == EVENT


async def test_an_event_in_structured_mode_is_read(stranger: Stranger) -> None:
    document = structured(
        time="2026-01-02T03:04:05Z",
        subject="customer 7",
        dataschema="https://schema",
        datacontenttype=EVENT.content_type,
    )
    document = document[:-1] + b', "data": ' + EVENT.payload + b"}"
    await stranger.publish(document, {"own": "1"}, "Application/CloudEvents+json; charset=UTF-8")
    assert await taken(stranger) == EVENT


async def test_binary_data_in_structured_mode_is_read(stranger: Stranger) -> None:
    document = structured(data_base64="AP8=", datacontenttype="image/png")
    await stranger.publish(document, {}, "application/cloudevents+json")
    event = await taken(stranger)
    assert isinstance(event, Event)
    assert (event.payload, event.content_type) == (b"\0\xff", "image/png")


@pytest.mark.parametrize("mode", ["binary", "structured"])
async def test_an_event_without_a_time_has_that_of_its_message_at_every_attempt(stranger: Stranger, mode: str) -> None:
    began = datetime.now(UTC)
    if mode == "binary":
        await stranger.publish(b"{}", binary(stranger.prefix))
    else:
        await stranger.publish(structured(data={}), {}, "application/cloudevents+json")
    times = []
    async with delivered(stranger) as deliveries:
        for _ in range(3):
            delivery = await following(deliveries)
            assert isinstance(delivery.event, Event)
            times.append(delivery.event.time)
            await delivery.retry(0.1)
    # RabbitMQ does not note when it took a message; there a retry, which is a copy, gets its time in whole seconds.
    assert times[1] == times[2]
    assert times[0] == times[1] or not stranger.clock
    for time in times:
        assert began - timedelta(seconds=1) <= time <= datetime.now(UTC)


async def test_the_timestamp_of_amqp_is_the_time_of_an_event_without_one(rabbitmq: RabbitMQServer, unique: str) -> None:
    stranger = OnRabbitMQ(rabbitmq, unique)
    await stranger.queue().topology(apply=True)
    await stranger.publish(b"{}", binary(stranger.prefix), timestamp=TIME)
    event = await taken(stranger)
    assert isinstance(event, Event)
    assert event.time == TIME


async def test_the_other_prefix_and_the_types_of_amqp_are_read(rabbitmq: RabbitMQServer, unique: str) -> None:
    stranger = OnRabbitMQ(rabbitmq, unique)
    await stranger.queue().topology(apply=True)
    headers = {**binary("cloudEvents:"), "cloudEvents:time": TIME, "cloudEvents:rush": True, "cloudEvents:tries": 5}
    await stranger.publish(b"{}", headers)
    event = await taken(stranger)
    assert isinstance(event, Event)
    assert (event.id, event.time, event.headers) == ("order-17", TIME, {"rush": "true", "tries": "5"})


async def test_on_nats_names_are_read_in_any_case_and_values_with_quotes_or_percents(
    nats_server: NatsServer, unique: str
) -> None:
    stranger = OnNats(nats_server, unique)
    await stranger.queue().topology(apply=True)
    headers = {"CE-SpecVersion": "1.0", "Ce-Id": '"a \\"b\\""', "ce-type": "shop.x", "CE-SOURCE": "/%c3%a9%20"}
    await stranger.publish(b"{}", {**headers, "ce-datacontenttype": "text/plain", "Own": '"1"'})
    event = await taken(stranger)
    assert isinstance(event, Event)
    assert (event.id, event.topic, event.source) == ('a "b"', "shop.x", "/é ")
    assert (event.content_type, event.headers) == ("text/plain", {"Own": '"1"'})


async def test_on_nats_an_attribute_that_is_not_utf8_is_malformed(nats_server: NatsServer, unique: str) -> None:
    stranger = OnNats(nats_server, unique)
    await stranger.queue().topology(apply=True)
    await stranger.publish(b"{}", binary("ce-", subject="%C0%A0"), "application/json")
    event = await taken(stranger)
    assert isinstance(event, Malformed)
    assert "ce-subject" in str(event)


@pytest.mark.parametrize(
    ("payload", "content_type", "said"),
    [
        (b"[" + structured() + b"]", "application/cloudevents-batch+json", "it is a batch"),
        (structured(specversion="0.3"), "application/cloudevents+json", "specversion is '0.3'"),
        (structured()[:-1] + b', "id": ""}', "application/cloudevents+json", "is there twice"),
        (b'{"data":' * 50_000, "application/cloudevents+json", "nested too deeply"),
        (structured()[:-1] + b', "data": NaN}', "application/cloudevents+json", "NaN"),
        (b"\xff{}", "application/cloudevents+json", "decode"),
        (structured(), None, "no attribute"),
    ],
    ids=["batch", "version", "twice", "nested", "nan", "utf8", "untyped"],
)
async def test_what_is_no_event_is_a_dead_letter_and_what_follows_is_delivered(
    stranger: Stranger, payload: bytes, content_type: str | None, said: str
) -> None:
    await stranger.publish(payload, {}, content_type)
    async with delivered(stranger) as deliveries:
        strange = await following(deliveries)
        assert isinstance(strange.event, Malformed)
        assert said in str(strange.event)
        await strange.dead_letter(Failure("malformed", str(strange.event)))
        await stranger.publish(b"{}", binary(stranger.prefix))
        ordinary = await following(deliveries)
        assert isinstance(ordinary.event, Event)
        await ordinary.ack()


async def test_the_type_is_the_topic_and_the_broker_decides_who_gets_it(stranger: Stranger) -> None:
    await stranger.publish(b"{}", binary(stranger.prefix, type="com.example.placed"))
    await stranger.publish(b"{}", binary(stranger.prefix, type="shop.order"))
    event = await taken(stranger)
    assert isinstance(event, Event)
    # On Pub/Sub the type is all that there is to choose by; on the others it is the routing key or the subject.
    assert event.topic == ("shop.order" if isinstance(stranger, OnPubSub) else "com.example.placed")
