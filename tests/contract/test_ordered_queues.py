"""Every claim of `bridge.brokers.contract.Subscription.ordered`, for every queue that takes it."""

import asyncio
import contextlib
import random
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from bridge.brokers.contract import Delivery, Failure, Queue
from bridge.errors import PgbridgeError
from bridge.event import Event
from tests.contract.queues import HARNESSES, ORDERED, QueueHarness
from tests.contract.test_queues import consuming, event_in, take
from tests.support.events import ids, make_event
from tests.support.until import LIMIT, until


@pytest.fixture(params=ORDERED)
async def harness(request: pytest.FixtureRequest, unique: str) -> AsyncIterator[QueueHarness]:
    server_fixture, start = HARNESSES[request.param]
    server = request.getfixturevalue(server_fixture) if server_fixture else None
    async with start(server, unique, ordered=True) as harness:
        yield harness


@pytest.fixture
def chance() -> random.Random:
    """Its seed is printed where a test fails."""
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    return random.Random(seed)


def of_key(key: str, count: int) -> list[Event]:
    return [make_event(number, key=key) for number in range(count)]


@asynccontextmanager
async def nothing_comes(deliveries: AsyncIterator[Delivery]) -> AsyncIterator[None]:
    """While the block runs. What comes afterwards is lost, so this is the last use of `deliveries`."""
    coming = asyncio.ensure_future(anext(deliveries))
    try:
        yield
        assert not coming.done(), f"this came too soon: {coming.result().event}"
    finally:
        coming.cancel()
        with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, PgbridgeError):
            await coming


async def drained(deliveries: AsyncIterator[Delivery], count: int) -> dict[str, list[str]]:
    """Acknowledges until so many events have come; the ids of each key, as they came first."""
    came: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    async with asyncio.timeout(LIMIT):
        while len(seen) < count:
            delivery = await anext(deliveries)
            event = event_in(delivery)
            if event.id not in seen:
                seen.add(event.id)
                came[str(event.key)].append(event.id)
            await delivery.ack()
    return came


def by_key(events: Sequence[Event]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for event in events:
        found[str(event.key)].append(event.id)
    return found


async def test_of_a_key_one_is_in_hand_at_a_time_and_in_order(harness: QueueHarness) -> None:
    events = of_key("a", 5)
    await harness.publish(*events)
    async with consuming(harness) as (_, deliveries):
        for event in events:
            delivery = await take(deliveries)
            assert event_in(delivery).id == event.id
            following = asyncio.ensure_future(anext(deliveries))
            done, _ = await asyncio.wait([following], timeout=0.2)
            assert not done
            await delivery.ack()
            if event is not events[-1]:
                deliveries = _continued(following, deliveries)
            else:
                following.cancel()


async def _continued(first: "asyncio.Future[Delivery]", rest: AsyncIterator[Delivery]) -> AsyncIterator[Delivery]:
    yield await first
    async for delivery in rest:
        yield delivery


async def test_other_keys_go_on_while_one_is_held(harness: QueueHarness) -> None:
    held, others = of_key("held", 4), [make_event(number, key=f"key-{number % 5}") for number in range(50)]
    await harness.publish(held[0])
    async with consuming(harness, prefetch=4) as (_, deliveries):
        first = await take(deliveries)
        await harness.publish(*held[1:], *others)
        assert await drained(deliveries, len(others)) == by_key(others)
        await first.ack()
        assert await drained(deliveries, 3) == by_key(held[1:])


async def test_what_waits_behind_a_held_key_leaves_room_for_others(harness: QueueHarness) -> None:
    """Ten times the prefetch may be in hand with what waits; there may be nine times that much behind one key."""
    held, others = of_key("held", 30), [make_event(number, key="free") for number in range(8)]
    await harness.publish(*held, *others)
    async with consuming(harness, prefetch=4) as (_, deliveries):
        first = await take(deliveries)
        second = await take(deliveries)
        by = {event_in(each).key: each for each in (first, second)}
        assert set(by) == {"held", "free"}
        await by["free"].ack()
        assert await drained(deliveries, 7) == by_key(others[1:])
        await by["held"].ack()
        assert await drained(deliveries, 29) == by_key(held[1:])


async def test_a_dead_letter_lets_its_key_go_on(harness: QueueHarness) -> None:
    events = of_key("a", 2)
    await harness.publish(*events)
    async with consuming(harness) as (_, deliveries):
        await (await take(deliveries)).dead_letter(Failure("error", "it failed"))
        following = await take(deliveries)
        assert event_in(following).id == events[1].id
        await following.ack()
    await harness.dead_letters(1)


async def test_what_has_no_key_holds_nothing_up(harness: QueueHarness) -> None:
    events = [make_event(number, key=None) for number in range(6)]
    await harness.publish(*events)
    async with consuming(harness) as (_, deliveries):
        in_hand = [await take(deliveries) for _ in events]
        assert {event_in(each).id for each in in_hand} == set(ids(events))
        for delivery in in_hand:
            await delivery.ack()


async def test_a_second_process_gets_nothing_of_a_key_that_a_first_one_has_in_hand(harness: QueueHarness) -> None:
    events = of_key("a", 3)
    await harness.publish(*events)
    async with consuming(harness) as (_, deliveries), consuming(harness) as (_, others):
        first = await take(deliveries)
        async with nothing_comes(others):
            await asyncio.sleep(harness.lease + 1.0)
        await first.ack()
        following = await take(deliveries)
        assert event_in(following).id == events[1].id
        await following.ack()


async def test_a_process_that_closes_with_some_in_hand_is_overtaken_by_nothing(harness: QueueHarness) -> None:
    events = [make_event(number, key=f"key-{number % 3}") for number in range(24)]
    await harness.publish(*events[:12])
    async with consuming(harness) as (_, deliveries):
        for _ in range(3):
            await take(deliveries)
        await harness.publish(*events[12:])
    async with consuming(harness) as (_, deliveries):
        assert await drained(deliveries, len(events)) == by_key(events)


async def test_a_successor_waits_for_what_a_stopped_process_still_has_in_hand(harness: QueueHarness) -> None:
    events = of_key("a", 6)
    await harness.publish(*events[:4])
    async with consuming(harness) as (queue, deliveries):
        first = await take(deliveries)
        await queue.stop()
        await harness.publish(*events[4:])
        async with consuming(harness) as (_, others):
            came: list[Delivery] = []

            async def come() -> None:
                came.append(await anext(others))

            coming = asyncio.create_task(come())
            await asyncio.sleep(1.0)
            assert not came
            await first.ack()
            await queue.close()
            await asyncio.wait_for(coming, LIMIT)
            assert event_in(came[0]).id == events[1].id
            await came[0].ack()
            assert await drained(others, 4) == by_key(events[2:])


async def test_what_is_given_back_at_a_stop_comes_first_again(harness: QueueHarness) -> None:
    events = [make_event(number, key=f"key-{number % 2}") for number in range(12)]
    await harness.publish(*events)
    async with consuming(harness) as (queue, deliveries):
        in_hand = [await take(deliveries) for _ in range(2)]
        await queue.stop()
        for delivery in reversed(in_hand):
            await delivery.give_back()
    async with consuming(harness) as (_, deliveries):
        assert await drained(deliveries, len(events)) == by_key(events)


async def test_a_process_that_is_cut_off_is_overtaken_by_nothing(harness: QueueHarness) -> None:
    proxy = harness.proxy()
    if proxy is None:
        pytest.skip("there is no wire")
    events = [make_event(number, key=f"key-{number % 3}") for number in range(24)]
    await harness.publish(*events[:12])
    async with proxy:
        lost = harness.queue(proxy=proxy)
        await lost.open()
        deliveries = aiter(lost.deliveries())
        for _ in range(3):
            await take(deliveries)
        async with consuming(harness) as (_, others):
            proxy.refuse = True
            proxy.cut()
            await harness.publish(*events[12:])
            assert await drained(others, len(events)) == by_key(events)
        await lost.close()


async def test_a_process_that_was_out_of_reach_hands_out_nothing_that_another_one_has_now(
    harness: QueueHarness,
) -> None:
    """As one that was paused: it comes back with a hand full of what has gone to another one meanwhile."""
    proxy = harness.proxy()
    if proxy is None:
        pytest.skip("there is no wire")
    events = of_key("a", 6)
    await harness.publish(*events[:4])
    async with proxy:
        paused = harness.queue(proxy=proxy)
        await paused.open()
        deliveries = aiter(paused.deliveries())
        first = await take(deliveries)
        async with consuming(harness) as (_, others):
            proxy.blackhole = True
            await harness.publish(*events[4:])
            assert await drained(others, len(events)) == by_key(events)
        proxy.blackhole = False
        with contextlib.suppress(PgbridgeError):
            await first.ack()
        with pytest.raises(PgbridgeError):
            await take(deliveries)
        await paused.close()


class StandingStill(threading.Thread):
    """A process that has two deliveries in hand, others behind them, and then stands still, its connection open."""

    def __init__(self, queue: Queue) -> None:
        super().__init__(daemon=True)
        self._queue = queue
        self.stands = threading.Event()
        self.go_on = threading.Event()
        self.then: list[Delivery] = []
        """What it was handed next."""

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        await self._queue.open()
        deliveries = aiter(self._queue.deliveries())
        in_hand = [await take(deliveries) for _ in range(2)]
        self.stands.set()
        self.go_on.wait(LIMIT)  # and with it the event loop
        with contextlib.suppress(PgbridgeError):
            self.then.append(await take(deliveries))
            await in_hand[0].ack()
            self.then.append(await take(deliveries))
        await self._queue.close()


async def test_a_process_that_stood_still_hands_out_nothing_that_another_one_has_now(harness: QueueHarness) -> None:
    if harness.proxy() is None:
        pytest.skip("its processes share one event loop")
    # What is behind the first one has come with what was published last.
    events = [*of_key("a", 4), make_event(4, key="b"), make_event(5, key="c")]
    await harness.publish(*events)
    process = StandingStill(harness.queue())
    process.start()
    assert await asyncio.to_thread(process.stands.wait, LIMIT)
    async with consuming(harness) as (_, others):
        assert await drained(others, len(events)) == by_key(events)
        process.go_on.set()
        await asyncio.to_thread(process.join, LIMIT)
    assert process.then == []


class World:
    """What all processes of one worker share: an inbox that knows what is finished, and what is wrong so far."""

    def __init__(self, events: Sequence[Event], chance: random.Random) -> None:
        self.order = by_key(events)
        self.finished: dict[str, list[str]] = defaultdict(list)
        self.running: dict[str, Process] = {}
        self.wrong: list[str] = []
        self.chance = chance
        self.active: Process | None = None
        """The one that was handed something last."""
        self._total = len(events)

    @property
    def done(self) -> bool:
        return sum(map(len, self.finished.values())) >= self._total

    def handed(self, event: Event, process: "Process") -> None:
        self.active = process
        key = str(event.key)
        earlier = self.order[key][: self.order[key].index(event.id)]
        unsettled = [each for each in earlier if each not in self.finished[key]]
        if unsettled:
            self.wrong.append(
                f"key {key}: number {len(earlier)} came before {len(unsettled)} earlier ones were settled"
            )


class Process:
    """Works on what its queue delivers, as a worker does, and can be killed, paused and stopped."""

    def __init__(self, harness: QueueHarness, world: World) -> None:
        self._harness = harness
        self._world = world
        self._tasks: set[asyncio.Task[None]] = set()
        self._proxy = harness.proxy()
        self._queue: Queue | None = None
        self._consuming: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if self._proxy is not None:
            await self._proxy.__aenter__()
        self._queue = self._harness.queue(8, self._proxy)
        await self._queue.open()
        self._consuming = asyncio.create_task(self._consume(self._queue))

    async def _consume(self, queue: Queue) -> None:
        with contextlib.suppress(PgbridgeError):
            async for delivery in queue.deliveries():
                task = asyncio.create_task(self._handle(delivery))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _handle(self, delivery: Delivery) -> None:
        event, world = event_in(delivery), self._world
        world.handed(event, self)
        finished = world.finished[str(event.key)]
        while event.id in world.running:
            await asyncio.sleep(0.02)
        if event.id not in finished:
            world.running[event.id] = self
            try:
                await asyncio.sleep(world.chance.choice([0.0, 0.0, 0.01, 0.05]))
                finished.append(event.id)
            finally:
                del world.running[event.id]
        with contextlib.suppress(PgbridgeError):
            await delivery.ack()

    async def kill(self) -> None:
        """It is gone from one moment to the next, and its connections with it."""
        if self._proxy is not None:
            self._proxy.refuse = True
            self._proxy.cut()
        await self._end_tasks()
        await self._leave()

    async def pause(self, seconds: float) -> None:
        """It hears nothing of its broker for a while, though its database answers; then it ends what it had begun."""
        if self._proxy is not None:
            self._proxy.blackhole = True
        await asyncio.sleep(seconds)
        if self._proxy is not None:
            self._proxy.blackhole = False
        await self.stop()

    async def stop(self) -> None:
        """As on SIGTERM: what runs may end."""
        assert self._queue is not None
        with contextlib.suppress(PgbridgeError):
            await self._queue.stop()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._leave()

    async def _end_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _leave(self) -> None:
        assert self._queue is not None
        assert self._consuming is not None
        await self._queue.close()
        await asyncio.wait_for(asyncio.gather(self._consuming, return_exceptions=True), LIMIT)
        await self._end_tasks()
        if self._proxy is not None:
            await self._proxy.__aexit__()


async def test_under_load_and_kills_each_key_keeps_its_order_and_nothing_is_lost(
    harness: QueueHarness, chance: random.Random
) -> None:
    events = [make_event(number, key=f"key-{number % 20}") for number in range(500)]
    world = World(events, chance)
    processes = [Process(harness, world) for _ in range(2)]
    for process in processes:
        await process.start()

    async def publish() -> None:
        for begin in range(0, len(events), 25):
            await harness.publish(*events[begin : begin + 25])
            await asyncio.sleep(0.1)

    others = [asyncio.create_task(publish())]
    for _ in range(4):
        enough = sum(map(len, world.finished.values())) + chance.randrange(20, 60)

        def settled(enough: int = enough) -> bool:
            return world.done or sum(map(len, world.finished.values())) >= enough

        await until(settled, "the processes go on", limit=90)
        victim = world.active if world.active in processes else processes[0]
        how = chance.choice(["kill", "kill", "pause", "stop"])
        if how == "pause":
            others.append(asyncio.create_task(victim.pause(harness.lease + 1.0)))
        else:
            await (victim.kill() if how == "kill" else victim.stop())
        processes[processes.index(victim)] = successor = Process(harness, world)
        await successor.start()
    await asyncio.gather(*others)
    await until(lambda: world.done, "everything is settled", limit=90)
    for process in processes:
        await process.stop()
    assert world.wrong == []
    assert world.finished == world.order
