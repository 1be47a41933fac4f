"""What is Pub/Sub's own about a worker's queue: ordering keys, leases, filters, dead letters."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from google.pubsub_v1 import types

from bridge.brokers.contract import CONFIRMED, Failure, Letter, Subscription, Verdict
from bridge.brokers.pubsub.connection import connect
from bridge.brokers.pubsub.dead import PubSubDeadLetters
from bridge.brokers.pubsub.queue import PubSubDelivery, PubSubQueue
from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.brokers.pubsub.sink import PubSubSink
from bridge.brokers.pubsub.topology import filter_of
from bridge.errors import SettingsError, TopologyError
from bridge.event import Event, Malformed
from tests.support.events import make_event
from tests.support.pubsub import PROJECT, pubsub_settings
from tests.support.servers import PubSubEmulator


def subscription(worker: str, *topics: str, prefetch: int = 20, ack_wait: float = 30.0) -> Subscription:
    return Subscription(worker, topics or ("#",), prefetch, [1.0, 2.0], 5, ack_wait)


class Desk:
    """A topic with its sink, and the queues that a test opens on it."""

    def __init__(self, settings: PubSubSettings) -> None:
        self.settings = settings
        self.sink = PubSubSink(settings)
        self._queues: list[PubSubQueue] = []

    async def queue(self, wanted: Subscription) -> tuple[PubSubQueue, AsyncIterator[PubSubDelivery]]:
        queue = PubSubQueue(self.settings, wanted)
        self._queues.append(queue)
        await queue.topology(apply=True)
        await queue.open()
        return queue, queue.deliveries()

    async def publish(self, *events: Event) -> None:
        await self.sink.open()
        assert list(await self.sink.publish(events)) == [CONFIRMED] * len(events)

    async def close(self) -> None:
        for queue in self._queues:
            await queue.close()
        await self.sink.close()


@pytest.fixture
async def desk(pubsub_emulator: PubSubEmulator, unique: str) -> AsyncIterator[Desk]:
    desk = Desk(pubsub_settings(pubsub_emulator.address, unique))
    yield desk
    await desk.close()


async def come(deliveries: AsyncIterator[PubSubDelivery], limit: float = 15.0) -> PubSubDelivery:
    return await asyncio.wait_for(anext(deliveries), limit)


def payload(delivery: PubSubDelivery) -> bytes:
    assert isinstance(delivery.event, Event), delivery.event
    return delivery.event.payload


async def nothing_comes(deliveries: AsyncIterator[PubSubDelivery], seconds: float = 0.3) -> asyncio.Task[Any]:
    """The task that goes on waiting for what must not have come within this time."""
    waiting = asyncio.ensure_future(anext(deliveries))
    done, _ = await asyncio.wait([waiting], timeout=seconds)
    assert not done
    return waiting


async def test_of_a_key_the_next_comes_once_the_one_before_is_settled(desk: Desk, unique: str) -> None:
    _, deliveries = await desk.queue(subscription(unique))
    await desk.publish(*(make_event(key="a", payload=b"a%d" % n) for n in range(3)))
    await desk.publish(make_event(key="b", payload=b"b0"))
    first, other = await come(deliveries), await come(deliveries)
    assert {payload(first), payload(other)} == {b"a0", b"b0"}
    second = await nothing_comes(deliveries)
    a, b = (first, other) if payload(first) == b"a0" else (other, first)
    await b.ack()
    await a.ack()
    assert payload(await second) == b"a1"
    await second.result().ack()
    last = await come(deliveries)
    assert payload(last) == b"a2"
    await last.ack()


async def test_a_busy_key_leaves_room_for_others(desk: Desk, unique: str) -> None:
    _, deliveries = await desk.queue(subscription(unique, prefetch=3))
    await desk.publish(*(make_event(key="busy", payload=b"%d" % n) for n in range(10)))
    busy = await come(deliveries)
    await desk.publish(make_event(key="a"), make_event(key="b"), make_event(key="c"))
    others = {(await come(deliveries)).key, (await come(deliveries)).key}
    assert others < {"a", "b", "c"}
    (await nothing_comes(deliveries)).cancel()
    await busy.ack()


async def test_a_key_drains_at_once_while_a_pull_waits(desk: Desk, unique: str) -> None:
    _, deliveries = await desk.queue(subscription(unique, prefetch=2))
    await desk.publish(*(make_event(key="a", payload=b"%d" % n) for n in range(30)))
    found = []
    async with asyncio.timeout(20):
        for _ in range(30):
            delivery = await come(deliveries)
            found.append(payload(delivery))
            await delivery.ack()
    assert found == [b"%d" % n for n in range(30)]


async def test_a_retry_takes_along_what_is_in_hand_behind_it(desk: Desk, unique: str) -> None:
    _, deliveries = await desk.queue(subscription(unique))
    await desk.publish(*(make_event(key="a", payload=b"%d" % n) for n in range(3)))
    first = await come(deliveries)
    assert first.attempt == 1
    began = asyncio.get_running_loop().time()
    await first.retry(0.7)
    found = []
    for _ in range(3):
        delivery = await come(deliveries)
        found.append((payload(delivery), delivery.attempt > 1))
        await delivery.ack()
    assert [each for each, _ in found] == [b"0", b"1", b"2"]
    assert found[0][1]
    assert asyncio.get_running_loop().time() - began >= 0.9


async def test_a_lease_is_extended_while_a_handler_runs_longer_than_the_deadline(desk: Desk, unique: str) -> None:
    _, deliveries = await desk.queue(subscription(unique, ack_wait=1.0))
    await desk.publish(make_event(key=None, payload=b"slow"))
    delivery = await come(deliveries)
    again = await nothing_comes(deliveries, 12.0)  # the shortest deadline that Pub/Sub offers is 10 s
    await delivery.ack()
    again.cancel()


async def test_a_stop_gives_back_what_was_not_handed_out_and_keeps_the_order(desk: Desk, unique: str) -> None:
    queue, deliveries = await desk.queue(subscription(unique))
    await desk.publish(*(make_event(key="a", payload=b"%d" % n) for n in range(3)), make_event(key="b", payload=b"b"))
    first = await come(deliveries)
    while payload(first) != b"0":
        await first.ack()
        first = await come(deliveries)
    await queue.stop()
    with pytest.raises(StopAsyncIteration):
        await anext(deliveries)
    _, others = await desk.queue(subscription(unique))
    await first.ack()
    wanted = [b"1", b"2"]
    while wanted:
        delivery = await come(others)
        if payload(delivery) != b"b":
            assert payload(delivery) == wanted.pop(0)
        await delivery.ack()


async def test_only_wanted_topics_come_and_the_others_do_not_come_back(desk: Desk, unique: str) -> None:
    _, deliveries = await desk.queue(subscription(unique, "shop.*.paid", "stock.#"))
    topics = ["shop.order.paid", "shop.order.sent", "stock", "stock.low.soon", "shop.a.b.paid"]
    await desk.publish(*(make_event(key="k", topic=topic) for topic in topics))
    found = []
    for _ in range(3):
        delivery = await come(deliveries)
        assert isinstance(delivery.event, Event)
        found.append(delivery.event.topic)
        await delivery.ack()
    assert found == ["shop.order.paid", "stock", "stock.low.soon"]
    (await nothing_comes(deliveries)).cancel()


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["#"], ""),
        (["*.paid"], ""),
        (["shop.paid"], 'attributes."ce-type" = "shop.paid"'),
        (["shop.#"], 'attributes."ce-type" = "shop" OR hasPrefix(attributes."ce-type", "shop.")'),
        (["shop.*"], 'hasPrefix(attributes."ce-type", "shop.")'),
        (["shop.*.paid", "shop.*.sent"], 'hasPrefix(attributes."ce-type", "shop.")'),
        (['b"\\', "a"], 'attributes."ce-type" = "a" OR attributes."ce-type" = "b\\"\\\\"'),
        ([f"shop.topic{n}" for n in range(20)], ""),
    ],
)
def test_a_filter_lets_pass_all_that_the_patterns_take(patterns: Sequence[str], expected: str) -> None:
    assert filter_of(patterns) == expected
    assert filter_of(list(reversed(patterns))) == expected


async def test_another_filter_is_refused_with_what_to_do_about_it(desk: Desk, unique: str) -> None:
    await desk.queue(subscription(unique, "shop.paid"))
    changed = PubSubQueue(desk.settings, subscription(unique, "shop.paid", "shop.sent"))
    with pytest.raises(TopologyError, match="pgbridge topology"):
        await changed.open()
    differs = [each for each in await changed.topology(apply=True) if each.state == "differs"]
    assert [each.name for each in differs] == [unique]
    assert f"gcloud pubsub subscriptions delete {unique}" in differs[0].detail


async def test_an_ordered_worker_says_what_must_be_set_for_ordering_keys(desk: Desk, unique: str) -> None:
    wanted = replace(subscription(unique), ordered=True)
    unordered = desk.settings.model_copy(update={"ordering": False})
    with pytest.raises(
        SettingsError, match=rf"sinks\.events\.ordering: an ordered worker \(workers\.{unique}\.ordered"
    ):
        PubSubQueue(unordered, wanted)
    await PubSubQueue(unordered, subscription(unique)).topology(apply=True)
    queue = PubSubQueue(desk.settings, wanted)
    with pytest.raises(TopologyError, match=rf"without message ordering, which workers\.{unique}\.ordered needs"):
        await queue.open()
    assert "differs" in {each.state for each in await queue.topology(apply=True)}


async def test_the_service_forwards_nothing_of_an_ordered_worker(desk: Desk, unique: str) -> None:
    """It would do so whenever it likes, and what is behind would overtake."""
    unordered, ordered = subscription(unique), replace(subscription(unique), ordered=True)
    await PubSubQueue(desk.settings, unordered).topology(apply=True)
    queue = PubSubQueue(desk.settings, ordered)
    with pytest.raises(TopologyError, match=r"with a dead-letter policy.*run `pgbridge topology --apply`"):
        await queue.open()
    assert "declared" in {each.state for each in await queue.topology(apply=True)}
    await desk.publish(make_event(key="a"))
    _, deliveries = await desk.queue(ordered)
    await (await come(deliveries)).ack()
    assert {each.state for each in await queue.topology(apply=False)} == {"present"}
    await PubSubQueue(desk.settings, unordered).topology(apply=True)
    assert {each.state for each in await PubSubQueue(desk.settings, unordered).topology(apply=False)} == {"present"}


def test_lanes_are_a_mistake_in_the_settings(desk: Desk, unique: str) -> None:
    with pytest.raises(SettingsError, match=rf"workers\.{unique}\.lanes: Pub/Sub"):
        PubSubQueue(desk.settings, replace(subscription(unique), ordered=True, lanes=2))


async def test_what_can_be_changed_in_place_is_changed(desk: Desk, unique: str) -> None:
    await desk.queue(subscription(unique, ack_wait=20.0))
    changed = PubSubQueue(desk.settings, subscription(unique, ack_wait=40.0))
    states = {each.name: each for each in await changed.topology(apply=False)}
    assert (states[unique].state, states[unique].detail) == (
        "differs",
        "ack_deadline_seconds differ; --apply changes them",
    )
    assert "declared" in [each.state for each in await changed.topology(apply=True)]
    assert {each.state for each in await changed.topology(apply=False)} == {"present"}


async def dead_letters(desk: Desk, worker: str, verdicts: Mapping[str, Verdict] = {}) -> dict[str, Letter]:
    """The worker's dead letters, by id; `verdicts` are by event id."""
    found = {}

    async def decide(letter: Letter) -> Verdict:
        found[letter.id] = letter
        return verdicts.get(str(letter.event_id), "keep")

    await PubSubDeadLetters(desk.settings, worker).walk(decide)
    return found


async def test_dead_letters_are_shown_replayed_to_their_worker_alone_and_discarded(desk: Desk, unique: str) -> None:
    other = f"{unique}-other"
    _, deliveries = await desk.queue(subscription(unique))
    _, others = await desk.queue(subscription(other))
    headers = {"actor": "zoë", **{f"h{n}": "v" * 1024 for n in range(80)}}
    events = [make_event(key="k", payload=b"%d" % n, headers=headers) for n in range(3)]
    await desk.publish(*events)
    for _ in range(3):
        await (await come(deliveries)).dead_letter(Failure("error", "it broke " + "ü" * 1000, "x" * 3000 + "the end"))
        await (await come(others)).ack()
    for _ in range(2):
        found = await dead_letters(desk, unique)
        assert {letter.event_id: (letter.payload, letter.key, letter.headers) for letter in found.values()} == {
            event.id: (event.payload, event.key, headers) for event in events
        }
    one = found[f"{unique}:{events[0].id}"]
    assert (one.box, one.sink, one.code, one.attempts, one.topic) == (unique, "events", "error", 1, events[0].topic)
    assert one.reason.startswith("it broke üü")
    assert one.trace.endswith("the end")
    assert one.failed_at is not None

    await dead_letters(desk, unique, {events[1].id: "replay", events[0].id: "discard"})
    replayed = await come(deliveries)
    assert isinstance(replayed.event, Event)
    assert replayed.event == events[1]._replace(headers=headers | {"replayed": str(replayed.event.replay)})
    await replayed.ack()
    (await nothing_comes(others)).cancel()
    assert [letter.event_id for letter in (await dead_letters(desk, unique)).values()] == [events[2].id]


async def test_a_strangers_message_is_malformed_and_can_be_dead_lettered(desk: Desk, unique: str) -> None:
    _, deliveries = await desk.queue(subscription(unique))
    connection = await connect(desk.settings)
    stranger = types.PubsubMessage.pb()(data=b"hello", attributes={f"a{n}": "1" for n in range(100)})
    topic = f"projects/{PROJECT}/topics/{unique}"
    await connection.call(connection.publish, types.PublishRequest.pb()(topic=topic, messages=[stranger]))
    await connection.close()
    delivery = await come(deliveries)
    assert isinstance(delivery.event, Malformed)
    await delivery.dead_letter(Failure("malformed", str(delivery.event)))
    (letter,) = (await dead_letters(desk, unique)).values()
    assert (letter.event_id, letter.payload, letter.code) == (None, b"hello", "malformed")


@pytest.mark.parametrize("worker", ["ab", "google"])
def test_a_worker_name_that_pubsub_refuses_is_a_mistake_in_the_settings(worker: str) -> None:
    with pytest.raises(SettingsError, match=f"workers.{worker}: .*rename the worker"):
        PubSubQueue(pubsub_settings("127.0.0.1:1", "events"), subscription(worker))


async def test_what_is_not_settled_at_a_close_comes_again_at_once(desk: Desk, unique: str) -> None:
    queue, deliveries = await desk.queue(subscription(unique, ack_wait=600.0))
    await desk.publish(make_event(key="k", payload=b"1"), make_event(key="k", payload=b"2"))
    assert payload(await come(deliveries)) == b"1"
    await queue.close()
    _, others = await desk.queue(subscription(unique, ack_wait=600.0))
    for wanted in (b"1", b"2"):
        delivery = await come(others)
        assert payload(delivery) == wanted
        await delivery.ack()


async def test_acknowledgements_share_requests(desk: Desk, unique: str) -> None:
    _, deliveries = await desk.queue(subscription(unique, prefetch=500))
    await desk.publish(*(make_event(key=None, payload=b"%d" % n) for n in range(500)))
    async with asyncio.timeout(20):
        await asyncio.gather(*[(await come(deliveries)).ack() for _ in range(500)])
    (await nothing_comes(deliveries)).cancel()
