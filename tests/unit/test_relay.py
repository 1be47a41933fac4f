"""The relay against a broker that fails in every way: nothing lost, per-key order kept, memory bounded."""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import pytest
from structlog.testing import capture_logs

from bridge.brokers.contract import CONFIRMED, Declaration, Never, NotSent, Outcome, Refused, Unknown
from bridge.errors import BrokerUnavailableError, DatabaseUnavailableError, RefusedError
from bridge.event import Event
from bridge.lane import sink_outage
from bridge.process.tasks import one_error
from bridge.relay import Limits, Relay, Routes
from bridge.sources import DeadLetter, Page
from tests.support.events import make_event
from tests.support.until import until

LIMITS = Limits(pages_in_flight=4, retry_initial=0.001, retry_max=0.01, shutdown_limit=5.0)


def event(number: int, key: str | None = None, topic: str = "t") -> Event:
    """Its number is in its id and is its place in the log."""
    return make_event(number, id=f"id-{number}", key=key, topic=topic, sequence=number)


class Log:
    """A source over a list; remembers what was settled and how far reading ran ahead."""

    def __init__(self, events: Sequence[Event], page_size: int = 10) -> None:
        self.pages = [Page(events[start : start + page_size], start) for start in range(0, len(events), page_size)]
        self.next = 0
        self.settled = -1
        self.ahead = 0
        self.letters: list[DeadLetter] = []
        self.done = asyncio.Event()
        self.may_read: Callable[[], bool] = lambda: True

    async def read(self) -> Page:
        if self.next == len(self.pages):
            await asyncio.Event().wait()
        await until(self.may_read)
        self.next += 1
        self.ahead = max(self.ahead, self.next - 1 - self.settled)
        return self.pages[self.next - 1]

    async def settle(self, page: Page) -> None:
        number = self.pages.index(page)
        assert number > self.settled
        self.settled = number
        if number == len(self.pages) - 1:
            self.done.set()

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        self.letters += letters


class Broker:
    """A sink over a list of what arrived. `chaos`: how often a batch loses its connection, by a seed."""

    def __init__(self, seed: int = 0, chaos: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.chaos = chaos
        self.arrived: list[Event] = []
        self.open_now = True
        self.refuse: dict[str, Outcome] = {}
        self.refused: Counter[str] = Counter()
        self.gate: asyncio.Event | None = None

    @property
    def is_open(self) -> bool:
        return self.open_now

    @property
    def stalled(self) -> str | None:
        """See `contract.Sink.stalled`."""
        return None

    @property
    def pipelines(self) -> bool:
        """See `contract.Sink.pipelines`."""
        return True

    async def open(self) -> None:
        if self.random.random() < 0.3:
            raise BrokerUnavailableError("not yet")
        self.open_now = True

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        if not self.open_now:
            return [NotSent("closed")] * len(events)
        lost = self.random.random() < self.chaos
        arriving = self.random.randrange(len(events) + 1) if lost else len(events)
        outcomes: list[Outcome] = []
        for index, one in enumerate(events):
            if one.id in self.refuse:
                outcomes.append(self.refuse[one.id])
                self.refused[one.id] += 1
            elif index < arriving:
                self.arrived.append(one)
                # The confirm of what arrived may be lost with the connection.
                outcomes.append(Unknown("gone") if lost and self.random.random() < 0.5 else CONFIRMED)
            else:
                outcomes.append(Unknown("gone"))
        if lost:
            self.open_now = False
        await asyncio.sleep(self.random.choice([0, 0, 0.001]))
        if self.gate is not None:
            await self.gate.wait()
        return outcomes

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        return []

    async def close(self) -> None:
        self.open_now = False


async def carry(log: Log, broker: Broker, routes: Routes | None = None, *, drop_unrouted: bool = False) -> None:
    relay = Relay(log, {"s": broker}, routes or Routes([("#", "s")]), limits=LIMITS, drop_unrouted=drop_unrouted)
    async with asyncio.timeout(20):
        await relay.run(log.done)


def first_arrivals(broker: Broker) -> list[Event]:
    return list({one.id: one for one in reversed(broker.arrived)}.values())[::-1]


@pytest.mark.parametrize("seed", range(12))
async def test_lost_connections_lose_no_event_and_break_no_keys_order(seed: int) -> None:
    chosen = random.Random(seed)
    events = [event(n, chosen.choice([None, "a", "b", "c"])) for n in range(600)]
    log, broker = Log(events), Broker(seed, chaos=0.15)
    await carry(log, broker)
    seen: set[str] = set()
    by_key = defaultdict(list)
    for one in broker.arrived:
        if one.id not in seen:
            seen.add(one.id)
            by_key[one.key].append(one.sequence)
    assert seen == {one.id for one in events}
    assert len(broker.arrived) > len(events), "the chaos must have made repeats, else it shows nothing"
    assert all(numbers == sorted(numbers) for key, numbers in by_key.items() if key is not None)


async def test_a_refused_event_stops_its_key_and_no_other() -> None:
    events = [event(n, "stuck" if n % 2 else f"free-{n}") for n in range(20)]
    log, broker = Log(events, page_size=5), Broker()
    # At the second refusal the relay knows of the first.
    log.may_read = lambda: log.next == 0 or broker.refused["id-1"] >= 2
    broker.refuse["id-1"] = Refused("full")
    carrying = asyncio.create_task(carry(log, broker))
    free = [one for one in events if one.key != "stuck"]
    await until(lambda: all(one in broker.arrived for one in free))
    assert log.settled == -1
    # What was in flight in the same page had left already; all later pages wait.
    assert not [one for one in broker.arrived if one.key == "stuck" and one.sequence >= 5]
    broker.refuse.clear()
    await carrying
    assert {one.id for one in broker.arrived} == {one.id for one in events}


class TakesNothingAtFirst(Broker):
    """Answers its first call with one outcome for every event, and takes everything from then on."""

    def __init__(self, first: Outcome) -> None:
        super().__init__()
        self.first: Outcome | None = first
        self.calls = 0

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        self.calls += 1
        if self.first is not None:
            first, self.first = self.first, None
            return [first] * len(events)
        return await super().publish(events)


@pytest.mark.parametrize(
    ("first", "calls"),
    [(NotSent("cut"), 2), (Unknown("cut"), 2), (Refused("full"), 501)],
    ids=["unsent", "unknown", "refused"],
)
async def test_only_what_was_refused_goes_one_by_one_within_its_key(first: Outcome, calls: int) -> None:
    events = [event(n, "k") for n in range(500)]
    log, broker = Log(events, page_size=500), TakesNothingAtFirst(first)
    await carry(log, broker)
    assert broker.calls == calls
    assert [one.sequence for one in broker.arrived] == list(range(500))


async def test_what_can_never_be_published_becomes_a_dead_letter_and_lets_its_key_go_on() -> None:
    events = [event(n, "k") for n in range(10)]
    log, broker = Log(events), Broker()
    broker.refuse["id-3"] = Never("too_large", "limit")
    await carry(log, broker)
    assert [(letter.event.id, letter.sink, letter.failure.code) for letter in log.letters] == [
        ("id-3", "s", "too_large")
    ]
    assert [one.sequence for one in broker.arrived] == [0, 1, 2, 4, 5, 6, 7, 8, 9]


async def test_an_event_without_a_route_is_dead_lettered_or_dropped_as_the_settings_say() -> None:
    events = [event(0, topic="other"), event(1, topic="t")]
    log, broker = Log(events), Broker()
    await carry(log, broker, Routes([("t", "s")]))
    assert [letter.failure.code for letter in log.letters] == ["no_route"]
    log = Log(events)
    await carry(log, Broker(), Routes([("t", "s")]), drop_unrouted=True)
    assert not log.letters


async def test_reading_stops_while_the_broker_does_not_confirm() -> None:
    log, broker = Log([event(n) for n in range(500)]), Broker()
    broker.gate = asyncio.Event()
    carrying = asyncio.create_task(carry(log, broker))
    await until(lambda: log.next >= LIMITS.pages_in_flight)
    for _ in range(50):
        await asyncio.sleep(0)
    assert log.next == LIMITS.pages_in_flight
    broker.gate.set()
    await carrying
    assert log.ahead <= LIMITS.pages_in_flight + 1


async def test_a_stop_settles_what_is_in_flight_and_reads_nothing_more() -> None:
    log, broker, stop = Log([event(n) for n in range(500)]), Broker(), asyncio.Event()
    broker.gate = asyncio.Event()
    relay = Relay(log, {"s": broker}, Routes([("#", "s")]), limits=LIMITS)
    running = asyncio.create_task(relay.run(stop))
    await until(lambda: log.next >= LIMITS.pages_in_flight)
    stop.set()
    broker.gate.set()
    await asyncio.wait_for(running, 5)
    assert log.settled == log.next - 1 == LIMITS.pages_in_flight - 1


async def test_a_source_that_is_lost_ends_the_relay_with_its_error() -> None:
    class Lost(Log):
        async def settle(self, page: Page) -> None:
            raise DatabaseUnavailableError("session ended")

    relay = Relay(Lost([event(1)]), {"s": Broker()}, Routes([("#", "s")]), limits=LIMITS)

    async def run() -> None:
        with one_error():
            await relay.run(asyncio.Event())

    with pytest.raises(DatabaseUnavailableError, match="session ended"):
        await asyncio.wait_for(run(), 5)


async def test_fan_out_settles_a_page_only_when_every_sink_has_confirmed() -> None:
    log, first, second = Log([event(n) for n in range(10)]), Broker(), Broker()
    second.gate = asyncio.Event()
    relay = Relay(log, {"a": first, "b": second}, Routes([("#", "a"), ("t", "b")]), limits=LIMITS)
    running = asyncio.create_task(relay.run(log.done))
    await until(lambda: len(second.arrived) >= 10)
    assert log.settled == -1
    second.gate.set()
    await asyncio.wait_for(running, 5)
    assert len(first.arrived) == len(second.arrived) == 10


async def test_an_outage_of_a_sink_that_spans_two_relays_is_told_once() -> None:
    class Gone(Broker):
        may_open = False

        async def open(self) -> None:
            if not self.may_open:
                raise BrokerUnavailableError("not yet")
            self.open_now = True

    broker = Gone()
    broker.open_now = False
    outages = {"s": sink_outage("s", retry_initial=0.001, retry_max=0.01)}

    with capture_logs() as lines:
        first = Relay(Log([event(1)]), {"s": broker}, Routes([("#", "s")]), limits=LIMITS, outages=outages)
        running = asyncio.create_task(first.run(asyncio.Event()))
        await until(lambda: outages["s"].lasts)
        running.cancel()
        await asyncio.wait([running])
        broker.may_open = True
        log = Log([event(1)])
        second = Relay(log, {"s": broker}, Routes([("#", "s")]), limits=LIMITS, outages=outages)
        async with asyncio.timeout(5):
            await second.run(log.done)
    assert [line["event"] for line in lines if line["event"].startswith("sink.")] == ["sink.lost", "sink.restored"]


async def test_a_sink_that_recovers_between_two_relays_is_restored_by_the_second() -> None:
    broker, log = Broker(), Log([])
    outages = {"s": sink_outage("s", retry_initial=0.001, retry_max=0.01)}
    outages["s"].lost(RefusedError("a queue is full"))
    stop = asyncio.Event()
    running = asyncio.create_task(
        Relay(log, {"s": broker}, Routes([("#", "s")]), limits=LIMITS, outages=outages).run(stop)
    )
    await until(lambda: not outages["s"].lasts)
    stop.set()
    await asyncio.wait_for(running, 5)


async def test_what_waits_is_named_with_the_last_reason() -> None:
    broker = Broker()
    broker.refuse["id-1"] = Refused("a queue is full")
    outages = {"s": sink_outage("s", retry_initial=0.001, retry_max=0.01)}
    log = Log([event(1)])
    with capture_logs() as lines:
        running = asyncio.create_task(
            Relay(log, {"s": broker}, Routes([("#", "s")]), limits=LIMITS, outages=outages).run(log.done)
        )
        await until(lambda: outages["s"].lasts)
        assert outages["s"].problem == "sink s: refusing for 0 s: a queue is full"
        broker.refuse.clear()
        await asyncio.wait_for(running, 5)
    assert [line["event"] for line in lines if line["event"].startswith("sink.")] == ["sink.refusing", "sink.restored"]
