"""The relay against a broker that fails in every way: nothing lost, per-key order kept, memory bounded."""

import asyncio
import contextlib
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence

import pytest
from structlog.testing import capture_logs

from bridge.brokers.contract import CONFIRMED, Declaration, Never, NotSent, Outcome, Refused, Unknown
from bridge.errors import BrokerUnavailableError, DatabaseUnavailableError, RefusedError
from bridge.event import Event
from bridge.lane import sink_outage
from bridge.process.tasks import one_error
from bridge.relay import Limits, Relay, Window
from bridge.sources import DeadLetter, Page
from tests.support.events import make_event
from tests.support.until import until

LIMITS = Limits(retry_initial=0.001, retry_max=0.01, shutdown_limit=5.0)


def event(number: int, key: str | None = None, topic: str = "t") -> Event:
    """Its number is in its id and is its place in the log."""
    return make_event(number, id=f"id-{number}", key=key, topic=topic, sequence=number)


class Log:
    """A source over a list; remembers what was settled and what was held."""

    def __init__(self, events: Sequence[Event], page_size: int = 10) -> None:
        self.events = list(events)
        self.page_size = page_size
        self.read_to = 0
        self.settled = 0
        """All events below this place are settled, but for the held ones."""
        self.held: frozenset[int] = frozenset()
        self.letters: list[DeadLetter] = []
        self.done = asyncio.Event()
        self.may_read: Callable[[], bool] = lambda: True

    async def read(self, most: int) -> Page:
        if self.read_to == len(self.events):
            await asyncio.Event().wait()
        await until(self.may_read)
        start = self.read_to
        self.read_to = min(len(self.events), start + min(self.page_size, most))
        return Page(self.events[start : self.read_to], self.read_to)

    async def settle(self, position: object, held: Collection[int]) -> None:
        assert isinstance(position, int)
        assert position >= self.settled
        self.settled, self.held = position, frozenset(held)
        if position == len(self.events) and not held:
            self.done.set()

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        self.letters += letters

    def lacks(self, arrived: Sequence[Event]) -> list[Event]:
        """What a reader that begins where this one is settled would never see, and that has not arrived either."""
        seen = {one.id for one in arrived} | {letter.event.id for letter in self.letters}
        gone = [one for place, one in enumerate(self.events) if place < self.settled and one.sequence not in self.held]
        return [one for one in gone if one.id not in seen]


class Broker:
    """A sink over a list of what arrived. `chaos`: how often a batch loses its connection, by a seed."""

    def __init__(self, seed: int = 0, chaos: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.chaos = chaos
        self.arrived: list[Event] = []
        self.open_now = True
        self.pipelined = True
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
        return self.pipelined

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


async def carry(log: Log, broker: Broker) -> None:
    async with asyncio.timeout(20):
        await Relay(log, "s", broker, limits=LIMITS).run(log.done)


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
    log.may_read = lambda: log.read_to == 0 or broker.refused["id-1"] >= 2
    broker.refuse["id-1"] = Refused("full")
    carrying = asyncio.create_task(carry(log, broker))
    free = [one for one in events if one.key != "stuck"]
    await until(lambda: all(one in broker.arrived for one in free))
    # What was in flight in the same page had left already; all later pages wait, and the position does not.
    assert not [one for one in broker.arrived if one.key == "stuck" and one.sequence >= 5]
    await until(lambda: log.settled == len(events))
    assert log.held == {1, *range(5, 20, 2)}
    broker.refuse.clear()
    await carrying
    assert {one.id for one in broker.arrived} == {one.id for one in events}
    assert log.held == set()


async def test_a_key_whose_events_of_two_topics_were_refused_together_goes_on() -> None:
    events = [event(n, "k", "t" if n % 2 else "u") for n in range(6)]
    log, broker = Log(events), Broker()
    for one in events:
        broker.refuse[one.id] = Refused("full")
    outage = sink_outage("s", retry_initial=0.001, retry_max=0.01)
    running = asyncio.create_task(Relay(log, "s", broker, limits=LIMITS, outage=outage).run(log.done))
    await until(lambda: len(log.held) == len(events))
    broker.refuse.clear()
    await until(lambda: not outage.lasts)
    await asyncio.wait_for(running, 5)
    assert [one.sequence for one in broker.arrived] == list(range(6))


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
            self.open_now = isinstance(first, Refused)
            return [first] * len(events)
        return await super().publish(events)


async def test_what_comes_behind_a_refused_event_is_held_though_later_ones_were_taken_with_it() -> None:
    events = [event(n, "k") for n in range(25)]
    log, broker = Log(events, page_size=20), TakesNothingAtFirst(NotSent("cut"))
    # After the loss 0 goes alone, then 1 to 4 together.
    broker.refuse["id-1"] = Refused("full")
    log.may_read = lambda: log.read_to == 0 or broker.refused["id-1"] >= 2
    running = asyncio.create_task(carry(log, broker))
    await until(lambda: log.settled == len(events))
    assert [one.sequence for one in broker.arrived] == [0, 2, 3, 4]
    assert log.held == {1, *range(5, 25)}
    broker.refuse.clear()
    await running
    assert len(broker.arrived) == len(events)


@pytest.mark.parametrize(
    ("first", "calls"),
    # 1, 4, 16, 64, 256 and the rest after a loss.
    [(NotSent("cut"), 7), (Unknown("cut"), 7), (Refused("full"), 501)],
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


async def test_a_broker_that_refuses_single_messages_gets_one_of_a_key_at_a_time() -> None:
    """Its later events would overtake: not even the first refusal lets one pass."""

    class Full(Broker):
        """Refuses at random, and takes what comes right after."""

        async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
            keys = [one.key for one in events if one.key is not None]
            assert len(keys) == len(set(keys)), "two of a key are on the way"
            return await super().publish(events)

    chosen = random.Random(1)
    events = [event(n, chosen.choice([None, "a", "b", "c"])) for n in range(400)]
    log, broker = Log(events), Full()
    broker.pipelined = False
    for one in chosen.sample(events, 40):
        broker.refuse[one.id] = Refused("full")
    carrying = asyncio.create_task(carry(log, broker))
    await until(lambda: sum(broker.refused.values()) > 20)
    broker.refuse.clear()
    await carrying
    assert len(broker.arrived) == len(events)
    for key in ("a", "b", "c"):
        numbers = [one.sequence for one in broker.arrived if one.key == key]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.parametrize("seed", range(12))
async def test_refusals_and_losses_together_lose_nothing_and_never_settle_too_much(seed: int, pipelined: bool) -> None:
    chosen = random.Random(seed)
    events = [event(n, chosen.choice([None, "a", "b", "c", "d"]), chosen.choice(["t", "u"])) for n in range(600)]
    log, broker = Log(events), Broker(seed, chaos=0.1)
    broker.pipelined = pipelined
    for one in chosen.sample(events, 60):
        outcomes: list[Outcome] = [Refused("full"), Refused("full"), Never("too_large", "limit")]
        broker.refuse[one.id] = chosen.choice(outcomes)

    async def give_in() -> None:
        while broker.refuse:
            assert not log.lacks(broker.arrived)
            await asyncio.sleep(0.002)
            broker.refuse.pop(chosen.choice(list(broker.refuse)))

    giving_in = asyncio.create_task(give_in())
    await carry(log, broker)
    await giving_in
    assert not log.lacks(broker.arrived)
    dead = {letter.event.id for letter in log.letters}
    assert {one.id for one in broker.arrived} | dead == {one.id for one in events}
    first: dict[str, Event] = {}
    for one in broker.arrived:
        first.setdefault(one.id, one)
    # What is on its way together when the first of a topic is refused may overtake.
    for key in ("a", "b", "c", "d") if not pipelined else ():
        numbers = [one.sequence for one in first.values() if one.key == key]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize("topics", [("t", "t"), ("t", "u")], ids=["same topic", "another topic"])
async def test_a_key_goes_on_whose_earlier_event_is_refused_after_a_later_one_was_chosen_to_be_tried_again(
    topics: tuple[str, str],
) -> None:
    class OutOfOrder(Broker):
        """Answers the first call last, and refuses each event once."""

        first_may_end = asyncio.Event()

        async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
            if events[0].sequence == 0 and not self.refused:
                self.refused["first"] += 1
                await self.first_may_end.wait()
                return [Refused("full")]
            if events[0].sequence == 1 and self.refused.total() == 1:
                self.refused["second"] += 1
                return [Refused("full")]
            return await super().publish(events)

    events = [event(n, "k", topic) for n, topic in enumerate(topics)]
    log, broker = Log(events, page_size=1), OutOfOrder()
    limits = Limits(retry_initial=0.0, retry_max=0.0)
    running = asyncio.create_task(Relay(log, "s", broker, limits=limits).run(log.done))
    await until(lambda: broker.refused.total() == 2)
    for _ in range(20):  # the second is chosen, and waits until the first has reported
        await asyncio.sleep(0)
    broker.first_may_end.set()
    await asyncio.wait_for(running, 5)
    assert [one.sequence for one in broker.arrived] == [0, 1]


async def test_what_waits_behind_a_full_queue_is_bounded_and_the_others_go_on_until_then() -> None:
    events = [event(n, topic="full" if n % 2 else "free") for n in range(8000)]
    log, broker = Log(events), Broker()
    for one in events:
        if one.topic == "full":
            broker.refuse[one.id] = Refused("full")
    limits = Limits(retry_initial=0.001, retry_max=0.01, held_events=300)
    running = asyncio.create_task(Relay(log, "s", broker, limits=limits).run(log.done))
    await until(lambda: len(log.held) >= 300)
    arrived = [one for one in broker.arrived if one.topic == "free"]
    assert len(arrived) >= 295
    for _ in range(100):
        await asyncio.sleep(0)
    # What was in flight when the limit was reached may be refused, too.
    assert len(log.held) <= 300 + Window(limits.events_in_flight).room(0)
    assert log.read_to < len(events)
    broker.refuse.clear()
    await asyncio.wait_for(running, 20)
    assert {one.id for one in broker.arrived} == {one.id for one in events}


async def test_an_event_that_ends_the_connection_is_found_alone_and_dead_lettered() -> None:
    class Poisoned(Broker):
        """Ends the connection over every message of the topic, and does not say which it was."""

        endings = 0

        async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
            if self.open_now and any(one.topic == "poison" for one in events):
                self.open_now = False
                self.endings += 1
                place = next(place for place, one in enumerate(events) if one.topic == "poison")
                self.arrived += events[:place]
                return [Unknown("406 PRECONDITION_FAILED - invalid header", poisoned=True)] * len(events)
            return await super().publish(events)

    chosen = random.Random(3)
    events = [event(n, chosen.choice([None, "a", "b"]), "poison" if n in (0, 77, 78, 399) else "t") for n in range(400)]
    log, broker = Log(events), Poisoned()
    await carry(log, broker)
    assert [letter.event.sequence for letter in log.letters] == [0, 77, 78, 399]
    assert {letter.failure.code for letter in log.letters} == {"ends_connection"}
    assert "406 PRECONDITION_FAILED" in log.letters[0].failure.reason
    assert {one.sequence for one in broker.arrived} == set(range(400)) - {0, 77, 78, 399}
    assert broker.endings <= 4 * 6, "each is found in a few steps"


async def test_a_lost_connection_is_never_blamed_on_an_event() -> None:
    """A broker that restarts again and again while one event is on the way alone."""

    class Restarting(Broker):
        losses = 0

        async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
            if self.losses < 10:
                self.losses += 1
                self.open_now = False
                return [Unknown("the connection was reset")] * len(events)
            return await super().publish(events)

    log, broker = Log([event(0)]), Restarting()
    await carry(log, broker)
    assert not log.letters
    assert [one.sequence for one in broker.arrived] == [0]


def test_the_window_grows_with_the_confirms() -> None:
    window = Window(16_000)
    assert window.room(0) == 2000
    assert window.room(1500) == 500
    assert window.room(1501) == 0  # less than a quarter is not worth a page
    window.confirmed(1500)
    assert window.room(500) == 2500
    window.confirmed(20_000)
    assert window.room(0) == 16_000


def test_the_window_of_a_broker_that_became_slow_shrinks_to_what_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    window = Window(16_000)
    window.confirmed(8000)
    assert window.room(16_000) == 0
    in_flight = 16_000
    for _ in range(16):
        now += 0.125
        window.confirmed(50)
        in_flight -= 50
        assert window.room(in_flight) == 0
    # 450 came back within the last second, its ends included, and twice as many may be in flight.
    assert window.room(600) == 300
    # Then nothing comes at all.
    assert window.room(900) == 0
    now += 2.0
    assert window.room(900) == 0
    assert window.room(375) == 125


def test_a_window_that_was_not_full_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a trickle few confirms come, since little was sent."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    window = Window(16_000)
    window.confirmed(5000)
    for _ in range(30):
        now += 0.1
        assert window.room(10) >= 9990
        window.confirmed(10)
    # With nothing in flight it is as at the beginning: the broker may be another one by then.
    now += 2.0
    assert window.room(0) == 2000


async def test_reading_stops_while_the_broker_does_not_confirm() -> None:
    log, broker = Log([event(n) for n in range(5000)]), Broker()
    broker.gate = asyncio.Event()
    carrying = asyncio.create_task(carry(log, broker))
    # A page is read when there is room for a quarter of the first window.
    await until(lambda: log.read_to > 1500)
    for _ in range(50):
        await asyncio.sleep(0)
    assert log.read_to <= 2000
    broker.gate.set()
    await carrying


async def test_bytes_of_payload_key_and_headers_are_bounded() -> None:
    large = {"name": "x" * 10_000}
    log = Log([make_event(n, id=f"id-{n}", headers=large, sequence=n) for n in range(200)], page_size=1)
    broker = Broker()
    broker.gate = asyncio.Event()
    limits = Limits(retry_initial=0.001, retry_max=0.01, bytes_in_flight=100_000)
    running = asyncio.create_task(Relay(log, "s", broker, limits=limits).run(log.done))
    await until(lambda: log.read_to >= 10)
    for _ in range(50):
        await asyncio.sleep(0)
    assert log.read_to == 10
    broker.gate.set()
    await asyncio.wait_for(running, 20)


async def test_a_stop_settles_what_is_in_flight_and_reads_nothing_more() -> None:
    log, broker, stop = Log([event(n) for n in range(5000)]), Broker(), asyncio.Event()
    broker.gate = asyncio.Event()
    running = asyncio.create_task(Relay(log, "s", broker, limits=LIMITS).run(stop))
    await until(lambda: log.read_to > 1500)
    stop.set()
    broker.gate.set()
    await asyncio.wait_for(running, 5)
    assert log.settled == log.read_to <= 2000


async def test_a_stop_asks_a_read_once_to_end_and_waits_for_it() -> None:
    """Asked twice, a statement that is being called off gives its session up, and with it the last positions."""

    class Slow(Log):
        asked = 0
        ended = False

        async def read(self, most: int) -> Page:
            if self.read_to < len(self.events):
                return await super().read(most)
            try:
                await asyncio.Event().wait()
            finally:
                self.asked += 1
                leaves.set()
                try:
                    await until(log.done.is_set)
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError:
                    self.asked += 1
                self.ended = True
            raise AssertionError("nothing sets that event")

    log, broker, stop, leaves = Slow([event(1)]), Broker(), asyncio.Event(), asyncio.Event()
    broker.gate = asyncio.Event()
    running = asyncio.create_task(Relay(log, "s", broker, limits=LIMITS).run(stop))
    await until(lambda: log.read_to == 1)
    stop.set()
    await asyncio.wait_for(leaves.wait(), 5)
    broker.gate.set()
    await asyncio.wait_for(running, 5)
    assert log.ended
    assert log.asked == 1


async def test_a_source_that_is_lost_ends_the_relay_with_its_error() -> None:
    class Lost(Log):
        async def settle(self, position: object, held: Collection[int]) -> None:
            raise DatabaseUnavailableError("session ended")

    relay = Relay(Lost([event(1)]), "s", Broker(), limits=LIMITS)

    async def run() -> None:
        with one_error():
            await relay.run(asyncio.Event())

    with pytest.raises(DatabaseUnavailableError, match="session ended"):
        await asyncio.wait_for(run(), 5)


async def test_a_source_that_is_lost_while_a_sink_comes_back_ends_the_relay_with_its_error() -> None:
    opening = asyncio.Event()

    class ForgetsCancellation(Broker):
        async def open(self) -> None:
            opening.set()
            # As asyncio.wait_for does before Python 3.12 when the result comes with the request to end.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            self.open_now = True

    class LostMeanwhile(Log):
        async def read(self, most: int) -> Page:
            if self.read_to:
                await opening.wait()
                raise DatabaseUnavailableError("session ended")
            return await super().read(most)

    broker = ForgetsCancellation()
    broker.open_now = False
    # One of the key at a time, so that some are left when the sink has shown that it works.
    broker.pipelined = False
    relay = Relay(LostMeanwhile([event(n, "key") for n in range(10)]), "s", broker, limits=LIMITS)

    async def run() -> None:
        with one_error():
            await relay.run(asyncio.Event())

    with pytest.raises(DatabaseUnavailableError, match="session ended"):
        await asyncio.wait_for(run(), 5)


async def test_an_outage_of_a_sink_that_spans_two_relays_is_told_once() -> None:
    class Gone(Broker):
        may_open = False

        async def open(self) -> None:
            if not self.may_open:
                raise BrokerUnavailableError("not yet")
            self.open_now = True

    broker = Gone()
    broker.open_now = False
    outage = sink_outage("s", retry_initial=0.001, retry_max=0.01)

    with capture_logs() as lines:
        first = Relay(Log([event(1)]), "s", broker, limits=LIMITS, outage=outage)
        running = asyncio.create_task(first.run(asyncio.Event()))
        await until(lambda: outage.lasts)
        running.cancel()
        await asyncio.wait([running])
        broker.may_open = True
        log = Log([event(1)])
        second = Relay(log, "s", broker, limits=LIMITS, outage=outage)
        async with asyncio.timeout(5):
            await second.run(log.done)
    assert [line["event"] for line in lines if line["event"].startswith("sink.")] == ["sink.lost", "sink.restored"]


async def test_a_sink_that_recovers_between_two_relays_is_restored_by_the_second() -> None:
    broker, log = Broker(), Log([])
    outage = sink_outage("s", retry_initial=0.001, retry_max=0.01)
    outage.lost(RefusedError("a queue is full"))
    stop = asyncio.Event()
    running = asyncio.create_task(Relay(log, "s", broker, limits=LIMITS, outage=outage).run(stop))
    await until(lambda: not outage.lasts)
    stop.set()
    await asyncio.wait_for(running, 5)


async def test_what_waits_is_named_with_the_last_reason() -> None:
    broker = Broker()
    broker.refuse["id-1"] = Refused("a queue is full")
    outage = sink_outage("s", retry_initial=0.001, retry_max=0.01)
    log = Log([event(1)])
    with capture_logs() as lines:
        running = asyncio.create_task(Relay(log, "s", broker, limits=LIMITS, outage=outage).run(log.done))
        await until(lambda: outage.lasts)
        problem = outage.problem or ""
        assert problem.startswith("sink s: refusing for 0 s: 1 event is held, of the topic 't', since ")
        assert problem.endswith(" UTC: a queue is full")
        broker.refuse.clear()
        await asyncio.wait_for(running, 5)
    assert [line["event"] for line in lines if line["event"].startswith("sink.")] == ["sink.refusing", "sink.restored"]
