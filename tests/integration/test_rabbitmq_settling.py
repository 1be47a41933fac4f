"""What settles a delivery on RabbitMQ when the broker does not take a copy of it, or takes nothing for a while."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from pydantic import SecretStr

from bridge.brokers.contract import Delivery, Failure, Letter, Subscription, Verdict
from bridge.brokers.rabbitmq.connection import Connection
from bridge.brokers.rabbitmq.dead import RabbitMQDeadLetters
from bridge.brokers.rabbitmq.queue import RabbitMQQueue
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.errors import BrokerUnavailableError, PrivilegeError, RefusedError, TopologyError
from tests.support.servers import RabbitMQServer
from tests.support.until import LIMIT, until

pytestmark = pytest.mark.rabbitmq

PREFETCH = 5
"""Every test has as many deliveries in trouble as may be in hand, and as many behind them."""

FAILURE = Failure("rejected", "no")


@pytest.fixture(scope="module")
def node(rabbitmq: RabbitMQServer, server_folder: Path) -> Iterator[RabbitMQServer]:
    """A server of this module's own, to be frozen and alarmed. `rabbitmq` skips where none is installed."""
    with RabbitMQServer(server_folder / "settling") as server:
        yield server


class Scene:
    """A worker's topology on the node, and what a person does to it."""

    def __init__(self, node: RabbitMQServer, name: str, channel: AbstractChannel) -> None:
        self.node = node
        self.name = name
        self.channel = channel

    def settings(self, *, url: str = "", **changes: Any) -> RabbitMQSettings:
        return RabbitMQSettings(type="rabbitmq", url=SecretStr(url or self.node.url), exchange=self.name, **changes)

    def queue(self, *, prefetch: int = PREFETCH, **changes: Any) -> RabbitMQQueue:
        settings = self.settings(**changes)
        return RabbitMQQueue(
            settings, Subscription(self.name, ["#"], prefetch, [0.2, 60.0], max_attempts=3, ack_wait=30.0)
        )

    async def publish(self, count: int) -> None:
        exchange = await self.channel.get_exchange(self.name, ensure=False)
        for number in range(count):
            await exchange.publish(aio_pika.Message(b"%d" % number, message_id=f"{number}"), "a.b")

    async def ctl(self, *arguments: str) -> None:
        await asyncio.to_thread(self.node.ctl, *arguments)

    @asynccontextmanager
    async def full(self, queue: str) -> AsyncIterator[None]:
        """Meanwhile the queue holds one message, and rejects what is published to it."""
        limit = '{"max-length":1,"overflow":"reject-publish"}'
        await self.ctl("set_policy", self.name, f"^{queue}$", limit, "--apply-to", "queues")
        while await self.takes(queue):
            pass
        try:
            yield
        finally:
            # First this: RabbitMQ looks whether there is room when messages leave a queue, not when its limit does.
            await (await self.channel.get_queue(queue, ensure=False)).purge()
            await self.ctl("clear_policy", self.name)
            await until(lambda: self.takes(queue), f"{queue} takes messages again")

    async def takes(self, queue: str) -> bool:
        try:
            await self.channel.default_exchange.publish(aio_pika.Message(b"filler"), queue)
        except aio_pika.exceptions.DeliveryError:
            return False
        return True


@pytest.fixture
async def scene(node: RabbitMQServer, unique: str) -> AsyncIterator[Scene]:
    async with await aio_pika.connect(node.url) as connection, connection.channel() as channel:
        scene = Scene(node, unique, channel)
        await scene.queue().topology(apply=True)
        yield scene


@pytest.fixture
async def opened() -> AsyncIterator[Any]:
    """Opens queues, and closes them at the end."""
    async with AsyncExitStack() as stack:

        async def open_queue(queue: RabbitMQQueue) -> AsyncIterator[Delivery]:
            stack.push_async_callback(queue.close)
            await queue.open()
            return aiter(queue.deliveries())

        yield open_queue


async def take(deliveries: AsyncIterator[Delivery], count: int) -> list[Delivery]:
    async with asyncio.timeout(LIMIT):
        return [await anext(deliveries) for _ in range(count)]


async def together(*verbs: Any, limit: float = LIMIT) -> list[BaseException | None]:
    """What each raised."""
    async with asyncio.timeout(limit):
        return list(await asyncio.gather(*verbs, return_exceptions=True))


async def test_a_full_queue_of_dead_letters_leaves_every_delivery_to_another_verb(scene: Scene, opened: Any) -> None:
    await scene.publish(2 * PREFETCH)
    deliveries = await opened(scene.queue())
    async with scene.full(f"{scene.name}.dead"):
        for _ in range(2):
            hand = await take(deliveries, PREFETCH)
            told = await together(*(each.dead_letter(FAILURE) for each in hand), limit=5)
            assert {type(each) for each in told} == {RefusedError}
            assert all(f"queue {scene.name}.dead" in str(each) for each in told)
            assert await together(*(each.retry(0.1) for each in hand)) == [None] * PREFETCH
    hand = await take(deliveries, PREFETCH)
    assert await together(*(each.dead_letter(FAILURE) for each in hand)) == [None] * PREFETCH
    hand = await take(deliveries, PREFETCH)
    assert await together(*(each.ack() for each in hand)) == [None] * PREFETCH


async def test_a_full_retry_queue_leaves_every_delivery_in_hand_and_closing_gives_them_back(
    scene: Scene, opened: Any
) -> None:
    await scene.publish(PREFETCH)
    queue = scene.queue()
    deliveries = await opened(queue)
    hand = await take(deliveries, PREFETCH)
    async with scene.full(f"{scene.name}.retry.1m"):
        told = await together(*(each.retry(60) for each in hand), limit=5)
    assert {type(each) for each in told} == {RefusedError}
    assert all(f"queue {scene.name}.retry.1m" in str(each) for each in told)
    await queue.close()
    again = await take(await opened(scene.queue(prefetch=50)), PREFETCH)
    assert await together(*(each.retry(0.1) for each in again)) == [None] * PREFETCH


async def test_copies_of_the_same_moment_for_one_queue_are_written_as_one(
    scene: Scene, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails together, as when a service is down that all call, costs what one that fails costs."""
    await scene.publish(50)
    deliveries = await take(await opened(scene.queue(prefetch=50)), 50)
    written: list[bytes] = []
    write = Connection.write

    def spy(connection: Connection, data: bytes) -> None:
        written.append(data)
        write(connection, data)

    monkeypatch.setattr(Connection, "write", spy)
    assert set(await together(*(delivery.retry(60.0) for delivery in deliveries))) == {None}
    # Beside them go the acknowledgements of what was copied.
    assert [count for data in written if (count := data.count(b".retry.1m"))] == [50]


async def test_a_deleted_retry_queue_is_told_and_nothing_is_lost(scene: Scene, opened: Any) -> None:
    await scene.publish(PREFETCH)
    queue = scene.queue()
    hand = await take(await opened(queue), PREFETCH)
    await scene.channel.queue_delete(f"{scene.name}.retry.200ms")
    told = await together(*(each.retry(0.1) for each in hand), limit=5)
    assert {type(each) for each in told} == {TopologyError}
    assert {
        f"lacks queue {scene.name}.retry.200ms; declare it with `pgbridge topology --apply`" in str(each)
        for each in told
    } == {True}
    await queue.close()
    with pytest.raises(TopologyError, match=r"retry\.200ms"):
        await queue.open()
    await queue.topology(apply=True)
    again = await take(await opened(scene.queue()), PREFETCH)
    assert await together(*(each.retry(0.1) for each in again)) == [None] * PREFETCH


async def test_a_worker_that_may_not_write_is_told_before_it_gets_anything(scene: Scene, opened: Any) -> None:
    await scene.publish(1)
    await scene.ctl("add_user", scene.name, "hunter2")
    url = scene.node.url.replace("guest:guest", f"{scene.name}:hunter2")
    await scene.ctl("set_permissions", scene.name, "", "", ".*")
    with pytest.raises(PrivilegeError, match=r"amq\.default.*rabbitmqctl set_permissions"):
        await opened(scene.queue(url=url))
    await scene.ctl("set_permissions", scene.name, "", r"amq\.default", ".*")
    (delivery,) = await take(await opened(scene.queue(url=url)), 1)
    assert delivery.attempt == 1
    await delivery.ack()


async def test_a_permission_that_is_taken_away_leaves_every_delivery_in_hand(scene: Scene, opened: Any) -> None:
    await scene.ctl("add_user", scene.name, "hunter2")
    url = scene.node.url.replace("guest:guest", f"{scene.name}:hunter2")
    await scene.ctl("set_permissions", scene.name, "", r"amq\.default", ".*")
    await scene.publish(PREFETCH)
    queue = scene.queue(url=url)
    deliveries = await opened(queue)
    hand = await take(deliveries, PREFETCH)
    await scene.ctl("set_permissions", scene.name, "", "", ".*")
    await forget_permissions(scene)
    told = await together(*(each.retry(0.1) for each in hand), limit=10)
    assert {type(each) for each in told} <= {PrivilegeError}
    with pytest.raises(BrokerUnavailableError, match=r"amq\.default"):
        await take(deliveries, 1)
    # What is finished is acknowledged all the same.
    await hand[0].ack()
    await queue.close()
    with pytest.raises(PrivilegeError, match=r"amq\.default"):
        await queue.open()
    again = await take(await opened(scene.queue()), PREFETCH - 1)
    assert await together(*(each.retry(0.1) for each in again)) == [None] * (PREFETCH - 1)


async def forget_permissions(scene: Scene) -> None:
    """RabbitMQ's channels know for how long they were permitted something: until they have slept once."""
    sleeping = "{current_function, {erlang, hibernate, 3}}"
    awake = f"[P || P <- rabbit_channel:list(), process_info(P, current_function) =/= {sleeping}]."

    async def all_sleep() -> bool:
        return (await asyncio.to_thread(scene.node.ctl, "eval", awake)).strip() == "[]"

    await until(all_sleep, "every channel of the broker sleeps")


async def test_a_retry_during_an_alarm_waits_and_goes_on_when_it_ends(scene: Scene, opened: Any) -> None:
    await scene.publish(2 * PREFETCH)
    deliveries = await opened(scene.queue(publish_timeout=1.0))
    hand = await take(deliveries, PREFETCH)
    await asyncio.to_thread(scene.node.alarm, True)
    try:
        retries = asyncio.ensure_future(together(*(each.retry(0.1) for each in hand[:-1])))
        await hand[-1].ack()
        # The acknowledgement made room, so the connection that consumes is not blocked.
        (last,) = await take(deliveries, 1)
        await last.ack()
        done, _ = await asyncio.wait([retries], timeout=3.0)
        assert not done, "it waits for longer than publish_timeout"
    finally:
        await asyncio.to_thread(scene.node.alarm, False)
    assert await asyncio.wait_for(retries, 5.0) == [None] * (PREFETCH - 1)
    for _ in range(2 * PREFETCH - 2):
        (delivery,) = await take(deliveries, 1)
        await delivery.ack()


async def test_a_worker_starts_and_settles_during_an_alarm(scene: Scene, opened: Any) -> None:
    await scene.publish(PREFETCH)
    await asyncio.to_thread(scene.node.alarm, True)
    try:
        queue = scene.queue()
        async with asyncio.timeout(5):
            deliveries = await opened(queue)
        hand = await take(deliveries, PREFETCH)
        waiting = asyncio.ensure_future(hand[0].retry(0.1))
        assert await together(*(each.ack() for each in hand[1:])) == [None] * (PREFETCH - 1)
        async with asyncio.timeout(10):
            await queue.close()
        (told,) = await together(waiting)
        assert isinstance(told, BrokerUnavailableError)
    finally:
        await asyncio.to_thread(scene.node.alarm, False)
    (again,) = await take(await opened(scene.queue()), 1)
    await again.ack()


async def test_a_replay_during_an_alarm_ends_after_the_time_out_and_its_letter_stays(scene: Scene, opened: Any) -> None:
    await scene.channel.default_exchange.publish(aio_pika.Message(b"letter"), f"{scene.name}.dead")

    async def replay(_: Letter) -> Verdict:
        return "replay"

    letters = RabbitMQDeadLetters(scene.settings(publish_timeout=1.0), scene.name)
    await asyncio.to_thread(scene.node.alarm, True)
    try:
        with pytest.raises(BrokerUnavailableError, match="within 1 s"):
            await asyncio.wait_for(letters.walk(replay), LIMIT)
    finally:
        await asyncio.to_thread(scene.node.alarm, False)
    await letters.walk(replay)
    (delivery,) = await take(await opened(scene.queue()), 1)
    await delivery.ack()


@pytest.mark.parametrize("publishes", [True, False], ids=["the one that publishes", "the one that consumes"])
async def test_the_end_of_either_connection_ends_the_queue(scene: Scene, opened: Any, publishes: bool) -> None:
    await scene.publish(PREFETCH)
    await scene.ctl("add_user", scene.name, "hunter2")
    await scene.ctl("set_permissions", scene.name, "", r"amq\.default", ".*")
    queue = scene.queue(url=scene.node.url.replace("guest:guest", f"{scene.name}:hunter2"))
    deliveries = await opened(queue)
    hand = await take(deliveries, PREFETCH)
    listed = await asyncio.to_thread(scene.node.ctl, "-q", "list_connections", "pid", "user", "client_properties")
    (pid,) = [
        line.split("\t")[0]
        for line in listed.splitlines()
        if f"\t{scene.name}\t" in line and (f"pgbridge worker {scene.name} on" not in line) == publishes
    ]
    await scene.ctl("close_connection", pid, "by hand")
    with pytest.raises(BrokerUnavailableError, match="by hand"):
        await take(deliveries, 1)
    told = await together(*(each.retry(0.1) for each in hand), limit=5)
    assert {type(each) for each in told} == {BrokerUnavailableError}
    await queue.close()
    again = await take(await opened(scene.queue()), PREFETCH)
    assert await together(*(each.ack() for each in again)) == [None] * PREFETCH


async def test_a_frozen_broker_ends_every_verb_and_gives_back_what_is_in_hand(scene: Scene, opened: Any) -> None:
    await scene.publish(PREFETCH)
    queue = scene.queue(heartbeat=1.0, publish_timeout=3.0)
    deliveries = await opened(queue)
    hand = await take(deliveries, PREFETCH)
    scene.node.freeze()
    try:
        told = await together(
            hand[0].retry(0.1), hand[1].dead_letter(FAILURE), *(each.ack() for each in hand[2:]), limit=15
        )
        assert {type(each) for each in told[:2]} == {BrokerUnavailableError}
        with pytest.raises(BrokerUnavailableError):
            await take(deliveries, 1)
        async with asyncio.timeout(15):
            await queue.close()
    finally:
        scene.node.thaw()
    missing = {b"0", b"1"}
    async with asyncio.timeout(LIMIT):
        async for delivery in await opened(scene.queue()):
            # What was acknowledged may come again; what was retried too, once more as its copy.
            missing.discard(delivery.message.body)
            await delivery.ack()
            if not missing:
                break
