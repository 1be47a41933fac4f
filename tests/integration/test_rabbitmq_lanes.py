"""Lanes of an ordered worker on RabbitMQ: keys are spread over queues, and queues over processes."""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any

import aio_pika
import pytest
from pydantic import SecretStr

from bridge.brokers.contract import CONFIRMED, Failure, Letter, Subscription, Verdict
from bridge.brokers.rabbitmq import queue as queue_module
from bridge.brokers.rabbitmq.dead import RabbitMQDeadLetters
from bridge.brokers.rabbitmq.lanes import LANES, lane_of
from bridge.brokers.rabbitmq.queue import RabbitMQQueue
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.sink import RabbitMQSink
from bridge.event import AMQP_PREFIX, Event
from tests.support.events import make_event
from tests.support.servers import RabbitMQServer
from tests.support.until import LIMIT, until


def settings_of(rabbitmq: RabbitMQServer, name: str) -> RabbitMQSettings:
    return RabbitMQSettings(type="rabbitmq", url=SecretStr(rabbitmq.url), exchange=name, heartbeat=1.0)


def queue_of(
    rabbitmq: RabbitMQServer, name: str, lanes: int, prefetch: int = 20, *, holds: bool = False
) -> RabbitMQQueue:
    wanted = Subscription(name, ["shop.#"], prefetch, [1.0], 3, 30.0, ordered=True, holds=holds, lanes=lanes)
    return RabbitMQQueue(settings_of(rabbitmq, name), wanted)


@pytest.fixture
async def publish(rabbitmq: RabbitMQServer, unique: str) -> AsyncIterator[Callable[[list[Event]], Any]]:
    settings = RabbitMQSettings(type="rabbitmq", url=SecretStr(rabbitmq.url), exchange=unique)
    sink = RabbitMQSink(settings)

    async def publish_all(events: list[Event]) -> None:
        if not sink.is_open:
            await sink.open()
        assert list(await sink.publish(events)) == [CONFIRMED] * len(events)

    yield publish_all
    await sink.close()


async def counts(rabbitmq: RabbitMQServer, *names: str) -> list[int]:
    async with await aio_pika.connect(rabbitmq.url) as connection:
        channel = await connection.channel()
        found = [await channel.declare_queue(name, passive=True) for name in names]
        return [each.declaration_result.message_count or 0 for each in found]


def queues(name: str, lanes: int) -> list[str]:
    return [name, *(f"{name}.lane{n}" for n in range(2, lanes + 1))]


def of_keys(keys: int, each: int, first: int = 0) -> list[Event]:
    return [make_event(topic="shop.x", key=f"key-{n % keys}", payload=first + n) for n in range(keys * each)]


async def test_every_event_is_in_the_queue_of_its_key(rabbitmq: RabbitMQServer, unique: str, publish: Any) -> None:
    await queue_of(rabbitmq, unique, 4).topology(apply=True)
    await publish(of_keys(60, 3))
    wanted = [0] * 4
    for n in range(60):
        wanted[lane_of(f"key-{n}".encode()) % LANES % 4] += 3
    assert min(wanted) > 0
    await until_counts(rabbitmq, unique, 4, wanted)


async def until_counts(rabbitmq: RabbitMQServer, name: str, lanes: int, wanted: list[int]) -> None:
    async def are_there() -> bool:
        return await counts(rabbitmq, *queues(name, lanes)) == wanted

    await until(are_there, f"the queues hold {wanted}")


async def test_what_has_no_lane_comes_through_the_first_queue(rabbitmq: RabbitMQServer, unique: str) -> None:
    await queue_of(rabbitmq, unique, 3).topology(apply=True)
    attributes = {"specversion": "1.0", "id": "x", "source": "/other", "type": "shop.x"}
    headers: dict[str, Any] = {f"{AMQP_PREFIX}{name}": value for name, value in attributes.items()}
    async with await aio_pika.connect(rabbitmq.url) as connection:
        exchange = await (await connection.channel()).get_exchange(unique, ensure=False)
        message = aio_pika.Message(b"{}", headers=headers)
        await exchange.publish(message, "shop.x", mandatory=True)
    await until_counts(rabbitmq, unique, 3, [1, 0, 0])
    queue = queue_of(rabbitmq, unique, 3)
    await queue.open()
    delivery = await asyncio.wait_for(anext(aiter(queue.deliveries())), LIMIT)
    assert isinstance(delivery.event, Event)
    assert delivery.event.id == "x"
    await delivery.ack()
    await queue.close()


async def test_another_number_of_lanes_leaves_no_way_of_the_old_one(
    rabbitmq: RabbitMQServer, unique: str, publish: Any
) -> None:
    for lanes in (1, 4, 2, 1):
        await queue_of(rabbitmq, unique, lanes).topology(apply=True)
    await publish(of_keys(10, 1))
    await until_counts(rabbitmq, unique, 4, [10, 0, 0, 0])


async def test_the_lane_is_no_part_of_the_event(rabbitmq: RabbitMQServer, unique: str, publish: Any) -> None:
    queue = queue_of(rabbitmq, unique, 2)
    await queue.topology(apply=True)
    event = make_event(1, topic="shop.x", key="k")
    await publish([event])
    await queue.open()
    delivery = await asyncio.wait_for(anext(aiter(queue.deliveries())), LIMIT)
    assert delivery.event == event._replace(sequence=0)
    await delivery.ack()
    await queue.close()


class Consumer:
    """Acknowledges what comes, and notes by whom and in which order."""

    def __init__(self, queue: RabbitMQQueue, seen: dict[str, list[tuple["Consumer", int]]]) -> None:
        self.queue = queue
        self.count = 0
        self._seen = seen

    async def run(self) -> None:
        await self.queue.open()
        async for delivery in self.queue.deliveries():
            event = delivery.event
            assert isinstance(event, Event)
            await asyncio.sleep(0)
            self._seen[str(event.key)].append((self, event.json()))
            self.count += 1
            await delivery.ack()


async def test_processes_hand_lanes_over_until_each_has_its_share_and_no_event_is_overtaken(
    rabbitmq: RabbitMQServer, unique: str, publish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "SHARE_INTERVAL", 0.1)
    await queue_of(rabbitmq, unique, 4).topology(apply=True)
    seen: dict[str, list[tuple[Consumer, int]]] = defaultdict(list)
    consumers = [Consumer(queue_of(rabbitmq, unique, 4), seen) for _ in range(2)]
    total = 0
    async with contextlib.AsyncExitStack() as stack:
        tasks: list[asyncio.Task[None]] = []

        async def end() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for consumer in consumers:
                await consumer.queue.close()

        stack.push_async_callback(end)
        tasks.append(asyncio.create_task(consumers[0].run()))
        await publish(of_keys(40, 2))
        total += 80
        await until(lambda: consumers[0].count == 80, "the first process has every lane")
        tasks.append(asyncio.create_task(consumers[1].run()))

        async def shared() -> bool:
            nonlocal total
            before = [consumer.count for consumer in consumers]
            await publish(of_keys(40, 2, first=total))
            total += 80
            await until(lambda: sum(consumer.count for consumer in consumers) == total, "all has come")
            ours, others = (consumer.count - was for consumer, was in zip(consumers, before, strict=True))
            return ours > 10 and others > 10

        await until(shared, "both processes work")
    for key, came in seen.items():
        numbers = [number for _, number in came]
        assert numbers == sorted(numbers), key
        assert len(numbers) == len(set(numbers)), key


async def test_a_lane_that_does_not_come_to_rest_goes_on_with_what_it_held_back(
    rabbitmq: RabbitMQServer, unique: str, publish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a key waits for another attempt."""
    monkeypatch.setattr(queue_module, "SHARE_INTERVAL", 0.1)
    monkeypatch.setattr(queue_module, "_REST_LIMIT", 1.0)
    held, others = queue_of(rabbitmq, unique, 2), queue_of(rabbitmq, unique, 2)
    await held.topology(apply=True)
    # Of each lane a key to hold and another one.
    keys: dict[int, list[str]] = defaultdict(list)
    for n in range(40):
        keys[lane_of(f"key-{n}".encode()) % 2].append(f"key-{n}")
    await publish([make_event(topic="shop.x", key=keys[lane][0]) for lane in (0, 1)])
    await held.open()
    deliveries = aiter(held.deliveries())
    in_hand = [await asyncio.wait_for(anext(deliveries), LIMIT) for _ in (0, 1)]
    await others.open()
    session = held._session
    assert session is not None
    consumers = list(session._consumers.values())
    coming = asyncio.ensure_future(anext(deliveries))
    await until(lambda: any(consumer._is_held for consumer in consumers), "a lane is asked to come to rest")
    (lane,) = [number for number, consumer in enumerate(consumers) if consumer._is_held]
    await publish([make_event(topic="shop.x", key=keys[lane][1])])
    await until(lambda: consumers[lane].in_hand == 2, "it has come")
    delivery = await asyncio.wait_for(coming, LIMIT)
    assert isinstance(delivery.event, Event)
    assert delivery.event.key == keys[lane][1]
    for each in (*in_hand, delivery):
        await each.ack()
    await held.close()
    await others.close()


async def replay(letter: Letter) -> Verdict:
    return "replay"


async def test_a_replay_goes_to_the_lane_of_its_key(rabbitmq: RabbitMQServer, unique: str, publish: Any) -> None:
    queue = queue_of(rabbitmq, unique, 4)
    await queue.topology(apply=True)
    await publish(of_keys(60, 2))
    wanted = await counts(rabbitmq, *queues(unique, 4))
    await queue.open()
    deliveries = aiter(queue.deliveries())
    for _ in range(120):
        await (await asyncio.wait_for(anext(deliveries), LIMIT)).dead_letter(Failure("error", "it failed"))
    await queue.close()
    await until_counts(rabbitmq, unique, 4, [0] * 4)
    await RabbitMQDeadLetters(settings_of(rabbitmq, unique), unique, 4).walk(replay)
    await until_counts(rabbitmq, unique, 4, wanted)


@pytest.mark.parametrize("holds", [True, False])
async def test_replays_stand_in_the_line_of_their_key_where_dead_letters_hold_it(
    rabbitmq: RabbitMQServer, unique: str, publish: Any, holds: bool
) -> None:
    queue = queue_of(rabbitmq, unique, 1, holds=holds)
    await queue.topology(apply=True)
    await publish([make_event(topic="shop.x", key="k", payload=n) for n in range(3)])
    await queue.open()
    deliveries = aiter(queue.deliveries())
    for _ in range(2):
        await (await asyncio.wait_for(anext(deliveries), LIMIT)).dead_letter(Failure("error", "it failed"))
    last = await asyncio.wait_for(anext(deliveries), LIMIT)
    await RabbitMQDeadLetters(settings_of(rabbitmq, unique), unique).walk(replay)

    if holds:
        await until(lambda: behind(queue) == 2, "both replays wait behind it")
        assert queue.in_hand == 1
    else:
        await until(lambda: queue.in_hand == 3, "both replays may run beside it")
    await last.ack()
    for number in range(2):
        delivery = await asyncio.wait_for(anext(deliveries), LIMIT)
        assert isinstance(delivery.event, Event)
        assert delivery.event.json() == number
        await delivery.ack()
    await queue.close()


def behind(queue: RabbitMQQueue) -> int:
    assert queue._session is not None
    return sum(consumer._hand.behind for consumer in queue._session._consumers.values())
