"""Order and loss on Pub/Sub while the emulator is killed and started again.

The emulator keeps nothing across a restart, as Google's service would. So what the bridge had confirmed and nobody had
read by then is counted apart, from the relay's own record of what was confirmed: it may be missing, nothing else may.

PGBRIDGE_ORDER_EVENTS, _KEYS and _RESTARTS set the size: 50000, 500 and 3 are the full run.
"""

import asyncio
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from bridge.brokers.contract import CONFIRMED, Outcome
from bridge.brokers.pubsub.sink import PubSubSink
from bridge.errors import BrokerUnavailableError
from bridge.event import Event
from bridge.relay import Limits, Relay
from bridge.sources import DeadLetter, Page
from tests.support.events import make_event
from tests.support.pubsub import PubSubReader, pubsub_settings
from tests.support.servers import MissingProgramError, PubSubEmulator
from tests.support.until import until

EVENTS = int(os.environ.get("PGBRIDGE_ORDER_EVENTS", "5000"))
KEYS = int(os.environ.get("PGBRIDGE_ORDER_KEYS", "100"))
RESTARTS = int(os.environ.get("PGBRIDGE_ORDER_RESTARTS", "1"))
PAGE = 100
LIMIT = 120.0 + EVENTS / 100


class Log:
    """A source in memory: numbered events, page by page. `gate` lets a test hold back the rest."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events
        self._read = 0
        self.allowed = 0
        self.gate = asyncio.Event()
        self.settled = 0
        self.letters: list[DeadLetter] = []

    def allow(self, count: int) -> None:
        self.allowed = count
        self.gate.set()

    async def read(self, most: int) -> Page:
        while self._read >= self.allowed:
            self.gate.clear()
            await self.gate.wait()
        page = self._events[self._read : min(self._read + min(PAGE, most), self.allowed)]
        self._read += len(page)
        return Page(page, self._read)

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        self.letters += letters

    async def settle(self, position: object, held: Collection[int]) -> None:
        assert isinstance(position, int)
        # Google's service holds nothing here for long: what waits is not settled.
        self.settled = 0 if held else position


class RecordingSink(PubSubSink):
    """Records what the emulator confirmed. It opens only while `may_open` is set, so that a reader can come first."""

    def __init__(self, address: str, topic: str) -> None:
        super().__init__(pubsub_settings(address, topic))
        self.confirmed: list[int] = []
        self.calls = 0
        self.may_open = asyncio.Event()

    async def open(self) -> None:
        await self.may_open.wait()
        await super().open()

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        self.calls += 1
        outcomes = await super().publish(events)
        self.calls -= 1
        told = zip(events, outcomes, strict=True)
        self.confirmed += [_number(event) for event, outcome in told if outcome is CONFIRMED]
        return outcomes


def _event(number: int) -> Event:
    return make_event(
        number, id=str(UUID(int=number)), payload=b"%d" % number, key=f"key-{number % KEYS}", sequence=number
    )


def _number(event: Event) -> int:
    return int(event.payload)


def _number_of(message: Any) -> int:
    return int(message.data)


@pytest.fixture
def emulator(server_folder: Path, unique: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[PubSubEmulator]:
    # One of our own, since it is killed.
    monkeypatch.delenv("PUBSUB_EMULATOR_HOST", raising=False)
    try:
        server = PubSubEmulator(server_folder / unique)
    except MissingProgramError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have every server: {error}")
        pytest.skip(str(error))
    with server:
        yield server


async def read_until_lost(reader: PubSubReader, into: list[Any], stop: asyncio.Event) -> None:
    """Reads until the emulator goes, or `stop` is set and it has no more."""
    while True:
        stopping, before = stop.is_set(), len(into)
        try:
            # At the end it waits for longer, so that a slow emulator is not taken for a lost event.
            await reader.messages(quiet=5.0 if stopping else 0.5, into=into)
        except BrokerUnavailableError:
            return
        if stopping and len(into) == before:
            return


async def test_no_event_is_lost_and_keys_keep_their_order_while_the_emulator_is_killed(
    emulator: PubSubEmulator, unique: str
) -> None:
    log = Log([_event(number) for number in range(EVENTS)])
    sink = RecordingSink(emulator.address, unique)
    await sink.topology(apply=True)
    reader = PubSubReader(emulator.address, unique)
    await reader.subscribe()
    sink.may_open.set()
    await sink.open()
    relay = Relay(log, "events", sink, limits=Limits(retry_max=0.5))
    stop = asyncio.Event()
    running = asyncio.create_task(relay.run(stop))
    lives: list[list[Any]] = []
    gone: set[int] = set()
    async with asyncio.timeout(LIMIT):
        for life in range(RESTARTS + 1):
            read: list[Any] = []
            lives.append(read)
            confirmed_before = len(sink.confirmed)
            end_of_life = asyncio.Event()
            reading = asyncio.create_task(read_until_lost(reader, read, end_of_life))
            log.allow(EVENTS * (life + 1) // (RESTARTS + 1))
            if life < RESTARTS:
                # Killed in the middle: some of this life's events are confirmed, and others in flight.
                half = (log.allowed - confirmed_before) // 2
                await until(lambda least=confirmed_before + half: len(sink.confirmed) >= least, limit=LIMIT)  # type: ignore[misc]
                sink.may_open.clear()
                await asyncio.to_thread(emulator.kill)
                await reading
                await until(lambda: not sink.is_open and not sink.calls, limit=LIMIT)
                gone |= set(sink.confirmed[confirmed_before:]) - set(map(_number_of, read))
                await asyncio.to_thread(emulator.start)
                await PubSubSink(pubsub_settings(emulator.address, unique)).topology(apply=True)
                await reader.subscribe()
                sink.may_open.set()
            else:
                log.allow(EVENTS)
                await until(lambda: log.settled >= EVENTS, limit=LIMIT)
                end_of_life.set()
                await reading
    stop.set()
    await running
    await sink.close()

    assert not log.letters
    assert set(sink.confirmed) == set(range(EVENTS))
    numbers = [[_number_of(message) for message in read] for read in lives]
    seen = {number for read in numbers for number in read}
    print(f"read {len(seen)} of {EVENTS}; confirmed by an emulator that was killed before they were read: {len(gone)}")
    assert set(range(EVENTS)) - seen <= gone
    for read in numbers:
        assert_order_up_to_repeats(read)


def assert_order_up_to_repeats(numbers: Sequence[int]) -> None:
    """The first time that each event of a key was read is in order."""
    of_key: dict[int, list[int]] = defaultdict(list)
    seen: set[int] = set()
    for number in numbers:
        if number not in seen:
            seen.add(number)
            of_key[number % KEYS].append(number)
    for key, found in of_key.items():
        assert found == sorted(found), f"key {key}"
