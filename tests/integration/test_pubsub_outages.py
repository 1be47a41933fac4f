"""The emulator is frozen, or the connection cut, while deliveries are being settled: everything is settled in the end.

The tests do what a worker does: a verb that raises has the queue closed and a new one opened.
"""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bridge.brokers.contract import CONFIRMED, Failure, Subscription
from bridge.brokers.pubsub.queue import PubSubDelivery, PubSubQueue
from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.brokers.pubsub.sink import PubSubSink
from bridge.errors import BrokerUnavailableError
from bridge.event import Event
from tests.support.events import make_event
from tests.support.proxy import Proxy
from tests.support.pubsub import pubsub_settings
from tests.support.servers import MissingProgramError, PubSubEmulator
from tests.support.until import LIMIT

KEYS = 8
CLOSE_LIMIT = 6.0
"""Seconds within which a queue must be closed, whatever its server does."""


@pytest.fixture(scope="module")
def emulator(server_folder: Path) -> Iterator[PubSubEmulator]:
    """One that no other test uses, since it is frozen."""
    try:
        server = PubSubEmulator(Path(tempfile.mkdtemp(prefix="pubsub-", dir=server_folder)))
    except MissingProgramError as error:
        pytest.skip(str(error))
    with server:
        yield server


class Work:
    """A topic with events of several keys, a queue that consumes them, and what became of each."""

    def __init__(self, settings: PubSubSettings, worker: str, ack_wait: float) -> None:
        self._settings = settings
        self._wanted = Subscription(worker, ["#"], 2 * KEYS, [1.0], 5, ack_wait)
        self._published: list[Event] = []
        self.queue = PubSubQueue(settings, self._wanted)
        self._settled: set[bytes] = set()
        """Payloads of what needs not come any more: also of what the service may have taken without our knowing."""

    async def start(self) -> tuple[AsyncIterator[PubSubDelivery], list[PubSubDelivery]]:
        """The deliveries, and of those the first of each key."""
        self._published = [make_event(key=f"k{n % KEYS}", payload=b"%d" % n) for n in range(3 * KEYS)]
        await self.queue.topology(apply=True)
        sink = PubSubSink(self._settings)
        await sink.open()
        assert set(await sink.publish(self._published)) == {CONFIRMED}
        await sink.close()
        await self.queue.open()
        deliveries = self.queue.deliveries()
        first = [await asyncio.wait_for(anext(deliveries), LIMIT) for _ in range(KEYS)]
        assert len({delivery.key for delivery in first}) == KEYS
        return deliveries, first

    def settle(self, first: list[PubSubDelivery]) -> list[asyncio.Task[None]]:
        """Begins to settle them, with every verb."""
        return [asyncio.create_task(self._settle(delivery, n)) for n, delivery in enumerate(first)]

    async def _settle(self, delivery: PubSubDelivery, number: int) -> None:
        match number % 4:
            case 0:
                self._settled.add(delivery.message.data)
                await delivery.ack()
            case 1:
                await delivery.retry(1.0)
            case 2:
                self._settled.add(delivery.message.data)
                await delivery.dead_letter(Failure("error", "it broke"))
            case 3:
                await delivery.give_back()

    async def close(self) -> None:
        began = time.monotonic()
        await self.queue.close()
        assert time.monotonic() - began < CLOSE_LIMIT

    async def open_anew(self) -> AsyncIterator[PubSubDelivery]:
        while True:
            self.queue = PubSubQueue(self._settings, self._wanted)
            try:
                await self.queue.open()
            except BrokerUnavailableError:
                await self.close()
                await asyncio.sleep(0.1)
            else:
                return self.queue.deliveries()

    async def acknowledge_the_rest(self, deliveries: AsyncIterator[PubSubDelivery]) -> None:
        """Until every event is settled that must be. The emulator does not keep the order of what it gives again."""
        while self._remaining():
            delivery = await anext(deliveries)
            await delivery.ack()
            self._settled.add(delivery.message.data)

    def _remaining(self) -> set[bytes]:
        return {event.payload for event in self._published} - self._settled


@pytest.mark.parametrize("seconds", [5, 12, 40])
async def test_what_was_being_settled_while_the_service_stood_still_is_settled_or_comes_again(
    emulator: PubSubEmulator, unique: str, seconds: int
) -> None:
    work = Work(pubsub_settings(emulator.address, unique), unique, ack_wait=10.0)
    deliveries, first = await work.start()
    emulator.freeze()
    thawing = asyncio.create_task(asyncio.sleep(seconds))
    thawing.add_done_callback(lambda _: emulator.thaw())
    began = time.monotonic()
    settling = work.settle(first)
    done, _ = await asyncio.wait(settling, return_when=asyncio.FIRST_EXCEPTION)
    failures = [error for task in done if (error := task.exception()) is not None]
    if seconds < 10:
        assert not failures
    else:
        assert time.monotonic() - began < 15.0
        assert all(isinstance(error, BrokerUnavailableError) for error in failures)
        await work.close()
        results = await asyncio.gather(*settling, return_exceptions=True)
        assert all(result is None or isinstance(result, BrokerUnavailableError) for result in results)
        deliveries = await work.open_anew()
    async with asyncio.timeout(seconds + LIMIT):
        await work.acknowledge_the_rest(deliveries)
    await thawing
    await work.close()


async def test_what_was_in_hand_when_the_connection_was_cut_comes_again_at_once(
    emulator: PubSubEmulator, unique: str
) -> None:
    async with Proxy(emulator.host, emulator.port) as proxy:
        work = Work(pubsub_settings(f"127.0.0.1:{proxy.port}", unique), unique, ack_wait=60.0)
        deliveries, first = await work.start()
        proxy.blackhole = True
        settling = work.settle(first)
        await asyncio.wait(settling, timeout=0.3)
        proxy.refuse = True
        proxy.cut()
        results = await asyncio.wait_for(asyncio.gather(*settling, return_exceptions=True), 5.0)
        assert all(isinstance(result, BrokerUnavailableError) for result in results)
        proxy.blackhole = False
        asyncio.get_running_loop().call_later(0.3, setattr, proxy, "refuse", False)
        await work.close()
        deliveries = await work.open_anew()
        async with asyncio.timeout(LIMIT):  # half of a lease
            await work.acknowledge_the_rest(deliveries)
        await work.close()
