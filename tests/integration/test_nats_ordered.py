"""What only an ordered queue on NATS can meet: pins that are lost, a consumer that is changed, a server that restarts.
What every ordered queue promises: tests/contract/test_ordered_queues.py."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import pytest
from nats.aio.msg import Msg
from pydantic import SecretStr

from bridge.brokers.contract import CONFIRMED, Delivery, Failure, Letter, Queue, Subscription, Verdict
from bridge.brokers.nats import BROKER, queue, topology
from bridge.brokers.nats.connection import Client
from bridge.brokers.nats.dead import NatsDeadLetters
from bridge.brokers.nats.ordered import PIN_HEADER
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.sink import NatsSink
from bridge.errors import BrokerUnavailableError, SettingsError, TopologyError
from bridge.event import Event
from tests.support.events import ids, make_event
from tests.support.servers import NatsServer
from tests.support.until import LIMIT, until

ACK_WAIT = 2.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """Its own, to be stopped."""
    with NatsServer(tmp_path) as server:
        yield server


def settings_of(server: NatsServer, stream: str) -> NatsSettings:
    return NatsSettings(type="nats", url=SecretStr(server.url), stream=stream)


def queue_of(
    server: NatsServer,
    name: str,
    *topics: str,
    prefetch: int = 10,
    ack_wait: float = ACK_WAIT,
    ordered: bool = True,
    lanes: int = 1,
) -> Queue:
    """The queue of a worker that is named as its stream is."""
    wanted = Subscription(name, topics or ["#"], prefetch, [1.0], 3, ack_wait, ordered=ordered, lanes=lanes)
    return BROKER.queue(settings_of(server, name), wanted)


@asynccontextmanager
async def consuming(queue: Queue) -> AsyncIterator[AsyncIterator[Delivery]]:
    await queue.open()
    try:
        yield aiter(queue.deliveries())
    finally:
        await queue.close()


async def take(deliveries: AsyncIterator[Delivery]) -> Delivery:
    return await asyncio.wait_for(anext(deliveries), LIMIT)


async def take_and_settle(deliveries: AsyncIterator[Delivery], count: int) -> list[str]:
    """The ids of the next so many, which come one after the other."""
    came = []
    for _ in range(count):
        delivery = await take(deliveries)
        came.append(id_of(delivery))
        await delivery.ack()
    return came


def id_of(delivery: Delivery) -> str:
    assert isinstance(delivery.event, Event), delivery.event
    return delivery.event.id


async def publish(server: NatsServer, stream: str, events: Sequence[Event]) -> None:
    sink = NatsSink(settings_of(server, stream))
    await sink.open()
    assert list(await sink.publish(events)) == [CONFIRMED] * len(events)
    await sink.close()


def of_key(count: int, **changes: object) -> list[Event]:
    return [make_event(number, key="a", **changes) for number in range(count)]


async def unsettled(server: NatsServer, name: str) -> int:
    async with await nats.connect(server.url) as client:
        return (await client.jetstream().consumer_info(name, name)).num_ack_pending or 0


async def vanish_with(server: NatsServer, name: str, count: int) -> None:
    """A process is pinned, takes so many messages, and is never heard of again."""
    async with await nats.connect(server.url) as client:
        inbox = await client.subscribe(client.new_inbox())
        request = {"group": "pgbridge", "batch": count, "expires": 5_000_000_000}
        await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{name}.{name}", json.dumps(request).encode(), inbox.subject)
        for _ in range(count):
            await inbox.next_msg(LIMIT)


async def unpin(server: NatsServer, name: str) -> None:
    """As `nats consumer unpin` does."""
    async with await nats.connect(server.url) as client:
        answer = await client.request(f"$JS.API.CONSUMER.UNPIN.{name}.{name}", b'{"group": "pgbridge"}')
    assert "error" not in json.loads(answer.data)


async def test_a_pin_that_somebody_takes_away_ends_the_queue_and_another_begins_with_what_it_had(
    nats_server: NatsServer, unique: str
) -> None:
    events = of_key(5)
    pinned = queue_of(nats_server, unique)
    await pinned.topology(apply=True)
    await publish(nats_server, unique, events[:3])
    await pinned.open()
    deliveries = aiter(pinned.deliveries())
    first = await take(deliveries)
    async with consuming(queue_of(nats_server, unique)) as others:
        coming = asyncio.ensure_future(anext(others))
        await unpin(nats_server, unique)
        await publish(nats_server, unique, events[3:])
        with pytest.raises(BrokerUnavailableError, match="to another process of the worker"):
            await take(deliveries)
        await first.ack()
        assert not coming.done()
        await pinned.close()
        following = await asyncio.wait_for(coming, LIMIT)
        assert id_of(following) == events[1].id
        await following.ack()
        assert await take_and_settle(others, 3) == ids(events[2:])


async def test_a_process_that_waits_for_the_pin_waits_for_as_long_as_it_takes(
    nats_server: NatsServer, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than a request is open, and than the silence after which a connection counts as lost."""
    for name, seconds in {"HEARTBEAT": 0.2, "_SILENCE": 0.6, "_REQUEST_OPEN": 1.0}.items():
        monkeypatch.setattr(queue, name, seconds)
    events = [make_event(number, key=f"key-{number}") for number in range(2)]
    pinned = queue_of(nats_server, unique)
    await pinned.topology(apply=True)
    await publish(nats_server, unique, events)
    async with consuming(pinned) as deliveries, consuming(queue_of(nats_server, unique)) as others:
        in_hand = [await take(deliveries) for _ in events]
        coming = asyncio.ensure_future(anext(others))
        done, _ = await asyncio.wait([coming], timeout=3.0)
        assert not done
        await in_hand[1].ack()
        await pinned.close()
        assert id_of(await asyncio.wait_for(coming, LIMIT)) == events[0].id


async def test_what_is_settled_while_what_no_pattern_takes_is_passed_over_lets_nothing_overtake(
    nats_server: NatsServer, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A successor hands out while it still acknowledges what it passes over, and new messages come meanwhile."""
    events = [make_event(n, key=f"key-{n % 4}", topic="x.a" if n % 2 else "x.y") for n in range(40)]
    wanted = [each for each in events if each.topic == "x.a"]
    first = queue_of(nats_server, unique, "*.a", "b.*", prefetch=40)
    await first.topology(apply=True)
    await publish(nats_server, unique, events[:20])
    await vanish_with(nats_server, unique, 20)
    await publish(nats_server, unique, events[20:])
    slowly = queue.NatsQueue._pass_over

    async def pass_over(self: queue.NatsQueue, message: Msg) -> None:
        await asyncio.sleep(0.02)
        await slowly(self, message)

    monkeypatch.setattr(queue.NatsQueue, "_pass_over", pass_over)
    async with consuming(first) as deliveries:
        came = []
        for _ in wanted:
            delivery = await take(deliveries)
            came.append(delivery.event)
            await delivery.ack()
    for key in {each.key for each in wanted}:
        assert [e for e in came if isinstance(e, Event) and e.key == key] == [e for e in wanted if e.key == key]


@pytest.mark.parametrize("most", [10_000, 300])
async def test_a_predecessor_may_leave_more_than_the_prefetch(
    nats_server: NatsServer, unique: str, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """As many as the server gives before some are settled, too, so that nothing new comes."""
    monkeypatch.setattr(topology, "MAX_UNSETTLED", most)
    events = [make_event(n, key=f"key-{n % 20}") for n in range(600)]
    worker = queue_of(nats_server, unique, prefetch=4)
    await worker.topology(apply=True)
    await publish(nats_server, unique, events)
    await vanish_with(nats_server, unique, 300)
    async with consuming(worker) as deliveries:
        came = await take_and_settle(deliveries, len(events))
    for key in {each.key for each in events}:
        of_this = ids(each for each in events if each.key == key)
        assert [each for each in came if each in of_this] == of_this


async def test_a_predecessor_that_goes_on_settling_confuses_nobody(nats_server: NatsServer, unique: str) -> None:
    """It has lost its pin, and settles what has been delivered again; what it still has in hand is missing."""
    events = [make_event(number, key=f"key-{number}") for number in range(6)]
    await queue_of(nats_server, unique).topology(apply=True)
    await publish(nats_server, unique, events)
    async with await nats.connect(nats_server.url) as client:
        inbox = await client.subscribe(client.new_inbox())
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{unique}.{unique}"
        request = {"group": "pgbridge", "batch": 4, "expires": 1_000_000_000}
        await client.publish(subject, json.dumps(request).encode(), reply=inbox.subject)
        old = [await inbox.next_msg(LIMIT) for _ in range(4)]
        await unpin(nats_server, unique)
        async with consuming(queue_of(nats_server, unique)) as deliveries:
            coming = asyncio.ensure_future(anext(deliveries))
            began = time.monotonic()
            # The first two go back and are acknowledged all the same; the others stay in hand for longer.
            for message in old[:2]:
                await client.request(message.reply, b"-NAK")
                await asyncio.sleep(0.1)
                await client.request(message.reply, b"+ACK")
            while time.monotonic() - began < 2 * ACK_WAIT:
                for message in old[2:]:
                    await client.request(message.reply, b"+WPI")
                await asyncio.sleep(0.1)
            assert not coming.done()
            await client.request(old[2].reply, b"+ACK")
            in_hand = [await asyncio.wait_for(coming, LIMIT), *[await take(deliveries) for _ in range(2)]]
            assert [id_of(each) for each in in_hand] == ids(events[3:])
            for each in in_hand:
                await each.ack()


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_a_restart_of_the_server_changes_no_order(server: NatsServer, unique: str, end: str) -> None:
    events = of_key(8)
    await queue_of(server, unique).topology(apply=True)
    await publish(server, unique, events[:5])
    lost = queue_of(server, unique)
    await lost.open()
    deliveries = aiter(lost.deliveries())
    await (await take(deliveries)).ack()
    await take(deliveries)
    getattr(server, end)()
    with pytest.raises(BrokerUnavailableError):
        await take(deliveries)
    await lost.close()
    server.start()
    await publish(server, unique, events[5:])
    came: list[str] = []
    async with consuming(queue_of(server, unique)) as deliveries:
        while len(set(came)) < 7 or came[-1] != events[-1].id:
            came += await take_and_settle(deliveries, 1)
    # A killed server may have forgotten the acknowledgement.
    assert came in (ids(events), ids(events[1:]))


async def test_an_unordered_worker_becomes_ordered_and_back_without_a_loss(
    nats_server: NatsServer, unique: str
) -> None:
    events = of_key(9)
    unordered, ordered = queue_of(nats_server, unique, ordered=False), queue_of(nats_server, unique)
    await unordered.topology(apply=True)
    await publish(nats_server, unique, events[:4])
    async with consuming(unordered) as deliveries:
        in_hand = [await take(deliveries) for _ in range(4)]
        await in_hand[2].ack()
    with pytest.raises(TopologyError, match=r"priority_policy is none.*stop all processes of the worker first"):
        await ordered.open()
    changed = (await ordered.topology(apply=True))[-1]
    assert (changed.kind, changed.state) == ("consumer", "declared")
    assert {each.state for each in await ordered.topology(apply=False)} == {"present"}
    await publish(nats_server, unique, events[4:6])
    async with consuming(ordered) as deliveries:
        expected = ids([*events[:2], *events[3:6]])
        assert await take_and_settle(deliveries, 4) == expected[:4]
        await take(deliveries)
    with pytest.raises(TopologyError, match="priority_policy is pinned_client"):
        await unordered.open()
    await unordered.topology(apply=True)
    await publish(nats_server, unique, events[6:])
    async with consuming(unordered) as deliveries:
        assert sorted(await take_and_settle(deliveries, 4)) == sorted(ids(events[5:]))
    assert await unsettled(nats_server, unique) == 0


async def test_what_no_pattern_takes_is_passed_over_and_other_patterns_lose_nothing(
    nats_server: NatsServer, unique: str
) -> None:
    """NATS takes `*.a` and `b.*` only as one filter that takes more."""
    wanted = [make_event(n, key="k", topic=topic) for n, topic in enumerate(["x.a", "b.y", "b.a", "x.a"])]
    others = [make_event(n, key="k", topic="x.y") for n in range(4)]
    worker = queue_of(nats_server, unique, "*.a", "b.*")
    await worker.topology(apply=True)
    await publish(nats_server, unique, [each for pair in zip(wanted, others, strict=True) for each in pair])
    async with consuming(worker) as deliveries:
        await take(deliveries)
    changed = queue_of(nats_server, unique, "b.*")
    await changed.topology(apply=True)
    async with consuming(changed) as deliveries:
        assert await take_and_settle(deliveries, 2) == ids(wanted[1:3])

        async def nothing_is_left() -> bool:
            return await unsettled(nats_server, unique) == 0

        await until(nothing_is_left, "what no pattern takes is settled")


async def test_a_strangers_header_is_not_taken_for_a_pin(nats_server: NatsServer, unique: str) -> None:
    await queue_of(nats_server, unique).topology(apply=True)
    async with await nats.connect(nats_server.url) as client:
        await client.jetstream().publish(f"{unique}.shop.strange", b"hello", headers={PIN_HEADER: "mine"})
    event = make_event()
    await publish(nats_server, unique, [event])
    async with consuming(queue_of(nats_server, unique)) as deliveries:
        await (await take(deliveries)).dead_letter(Failure("malformed", "it is no event"))
        assert await take_and_settle(deliveries, 1) == [event.id]


async def test_a_replayed_letter_comes_behind_what_its_key_has_by_then(nats_server: NatsServer, unique: str) -> None:
    events = of_key(3)
    await queue_of(nats_server, unique).topology(apply=True)
    await publish(nats_server, unique, events)

    async def replay(letter: Letter) -> Verdict:
        return "replay"

    async with consuming(queue_of(nats_server, unique)) as deliveries:
        await (await take(deliveries)).dead_letter(Failure("error", "it failed"))
        held = await take(deliveries)
        await NatsDeadLetters(settings_of(nats_server, unique), unique).walk(replay)
        await held.ack()
        assert await take_and_settle(deliveries, 2) == [events[2].id, events[0].id]


async def test_what_is_tried_again_keeps_its_key_and_nobody_else(nats_server: NatsServer, unique: str) -> None:
    events = [*of_key(2), make_event(7, key="b")]
    worker = queue_of(nats_server, unique)
    await worker.topology(apply=True)
    await publish(nats_server, unique, events)
    async with consuming(worker) as deliveries:
        first = await take(deliveries)
        began = time.monotonic()
        await first.retry(0.5)
        assert await take_and_settle(deliveries, 1) == [events[2].id]
        assert worker.in_hand == 0
        again = await take(deliveries)
        assert time.monotonic() - began >= 0.45
        assert (id_of(again), again.attempt) == (events[0].id, 2)
        await again.give_back()
        assert await take_and_settle(deliveries, 2) == ids(events[:2])


async def test_whoever_may_not_give_up_the_pin_closes_all_the_same_and_a_successor_waits_for_its_end(
    tmp_path: Path, unique: str
) -> None:
    user = '{ user: u, password: p, permissions: { publish: { deny: ["$JS.API.CONSUMER.UNPIN.>"] } } }'
    with NatsServer(tmp_path, lines=[f"authorization {{ users: [ {user}, {{ user: admin, password: p }} ] }}"]) as own:

        def settings(user: str) -> NatsSettings:
            url = SecretStr(f"nats://{user}:p@{own.host}:{own.port}")
            return NatsSettings(type="nats", url=url, stream=unique)

        wanted = Subscription(unique, ["#"], 10, [1.0], 3, ACK_WAIT, ordered=True)
        await BROKER.queue(settings("admin"), wanted).topology(apply=True)
        sink = NatsSink(settings("admin"))
        await sink.open()
        events = of_key(3)
        await sink.publish(events)
        await sink.close()
        for event in events[:2]:
            async with consuming(BROKER.queue(settings("u"), wanted)) as deliveries:
                assert await take_and_settle(deliveries, 1) == [event.id]


def test_lanes_are_a_mistake_in_the_settings(nats_server: NatsServer, unique: str) -> None:
    with pytest.raises(SettingsError, match=rf"workers\.{unique}\.lanes: NATS"):
        queue_of(nats_server, unique, lanes=2)


async def test_a_server_that_pins_no_consumers_is_too_old(
    nats_server: NatsServer, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Version:
        major, minor = 2, 10

    monkeypatch.setattr(Client, "connected_server_version", Version)
    with pytest.raises(TopologyError, match=rf"workers\.{unique}\.ordered: NATS at .* is 2\.10, .* since 2\.11"):
        await queue_of(nats_server, unique).topology(apply=True)
    await queue_of(nats_server, unique, ordered=False).topology(apply=True)
