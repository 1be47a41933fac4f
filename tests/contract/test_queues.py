"""Every claim that `bridge.brokers.contract.Queue` makes, for every queue. Each broker's own: tests/integration/."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime

import pytest

from bridge.brokers.contract import Delivery, Failure, Letter, Queue, Verdict
from bridge.errors import BrokerUnavailableError, TopologyError
from bridge.event import Event, Malformed
from tests.contract.queues import ACK_WAIT, HARNESSES, RETRY_DELAYS, QueueHarness
from tests.support.events import ids, make_event
from tests.support.until import LIMIT, until

FAILURE = Failure("error", "ValueError: kein Betrag für »A-1«\r\nzweite Zeile", "Traceback: \n  füür 🎉\n  ValueError")


@pytest.fixture(params=sorted(HARNESSES))
async def harness(request: pytest.FixtureRequest, unique: str) -> AsyncIterator[QueueHarness]:
    server_fixture, start = HARNESSES[request.param]
    server = request.getfixturevalue(server_fixture) if server_fixture else None
    async with start(server, unique) as harness:
        yield harness


@asynccontextmanager
async def consuming(harness: QueueHarness, prefetch: int = 10) -> AsyncIterator[tuple[Queue, AsyncIterator[Delivery]]]:
    """A queue that is open, and its deliveries."""
    queue = harness.queue(prefetch)
    await queue.open()
    try:
        yield queue, aiter(queue.deliveries())
    finally:
        await queue.close()


async def take(deliveries: AsyncIterator[Delivery]) -> Delivery:
    return await asyncio.wait_for(anext(deliveries), LIMIT)


async def comes_within(deliveries: AsyncIterator[Delivery], seconds: float) -> bool:
    """Whether a delivery comes in this time; the last use of `deliveries`."""
    try:
        await asyncio.wait_for(anext(deliveries), seconds)
    except TimeoutError:
        return False
    return True


def order(harness: QueueHarness, events: Sequence[Event]) -> list[str]:
    """The ids in the order that the broker promises to keep: of all events, or of those with one key."""
    kept = sorted(events, key=lambda event: str(event.key)) if harness.ordered_by_key else events
    return [event.id for event in kept]


def event_in(delivery: Delivery) -> Event:
    assert isinstance(delivery.event, Event), delivery.event
    return delivery.event


async def test_deliveries_come_in_the_order_of_publishing(harness: QueueHarness) -> None:
    events = [make_event(number) for number in range(300)]
    await harness.publish(*events)
    async with consuming(harness) as (_, deliveries):
        seen = []
        for _ in events:
            delivery = await take(deliveries)
            seen.append(event_in(delivery))
            assert delivery.attempt == 1
            await delivery.ack()
    assert order(harness, seen) == order(harness, events)


@pytest.mark.parametrize(
    "event",
    [
        make_event(key=None),
        make_event(payload=b""),
        make_event(payload=bytes(range(256)) * 8192, content_type="text/plain"),
        make_event(topic="shop.Stock Level.für*>%🎉..x", payload="12 € 🎉 \u0000".encode(), key="schlüssel 🔑\r\n%/+"),
        make_event(
            headers={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "actor": "zoë ☃"}
        ),
    ],
    ids=["no key", "no payload", "2 MB", "unicode", "headers"],
)
async def test_the_event_arrives_as_it_was_published(harness: QueueHarness, event: Event) -> None:
    await harness.publish(event)
    async with consuming(harness) as (_, deliveries):
        delivery = await take(deliveries)
        assert delivery.event == event
        await delivery.ack()


async def test_no_more_than_the_prefetch_is_in_hand_and_settling_makes_room(harness: QueueHarness) -> None:
    # A key each: one behind another of its key would rightly wait for it.
    await harness.publish(*[make_event(number, key=f"key-{number}") for number in range(8)])
    async with consuming(harness, prefetch=3) as (_, deliveries):
        in_hand = [await take(deliveries) for _ in range(3)]
        following = asyncio.ensure_future(anext(deliveries))
        done, _ = await asyncio.wait([following], timeout=0.3)
        assert not done
        await in_hand.pop().ack()
        in_hand.append(await asyncio.wait_for(following, LIMIT))
        for _ in range(4):
            await in_hand.pop(0).ack()
            in_hand.append(await take(deliveries))
        for delivery in in_hand:
            await delivery.ack()


async def test_what_is_acknowledged_never_comes_again(harness: QueueHarness) -> None:
    await harness.publish(make_event(1), make_event(2))
    async with consuming(harness) as (_, deliveries):
        for _ in range(2):
            await (await take(deliveries)).ack()
    async with consuming(harness) as (_, deliveries):
        assert not await comes_within(deliveries, ACK_WAIT + 0.5)


async def test_what_is_in_hand_stays_there_for_longer_than_ack_wait(harness: QueueHarness) -> None:
    await harness.publish(make_event())
    async with consuming(harness) as (_, deliveries), consuming(harness) as (_, others):
        delivery = await take(deliveries)
        assert not await comes_within(others, ACK_WAIT + 2.0)
        await delivery.ack()


async def test_a_retry_comes_after_its_delay_and_counts(harness: QueueHarness) -> None:
    event = make_event(headers={"actor": "zoë"})
    await harness.publish(event)
    async with consuming(harness) as (_, deliveries):
        for attempt, delay in enumerate(RETRY_DELAYS, start=1):
            delivery = await take(deliveries)
            assert (delivery.event, delivery.attempt) == (event, attempt)
            retried = time.monotonic()
            await delivery.retry(delay)
            following = await take(deliveries)
            waited = time.monotonic() - retried
            assert delay - 0.05 <= waited < delay + 2.0
            assert (following.event, following.attempt) == (event, attempt + 1)
            if attempt < len(RETRY_DELAYS):
                await following.retry(0.01)
                await (await take(deliveries)).ack()
                await harness.publish(event := make_event(number=attempt, headers={"actor": "zoë"}))
                delivery = await take(deliveries)
                await delivery.retry(0.01)
            else:
                await following.ack()


async def test_a_retry_does_not_hold_up_what_comes_behind(harness: QueueHarness) -> None:
    first, second = make_event(1), make_event(2)
    await harness.publish(first, second)
    async with consuming(harness, prefetch=1) as (_, deliveries):
        retried = await take(deliveries)
        await retried.retry(RETRY_DELAYS[0])
        delivery = await take(deliveries)
        assert {event_in(retried).id, event_in(delivery).id} == {first.id, second.id}
        await delivery.ack()
        delivery = await take(deliveries)
        assert event_in(delivery).id == event_in(retried).id
        await delivery.ack()


async def test_a_dead_letter_keeps_its_bytes_and_tells_why(harness: QueueHarness, unique: str) -> None:
    payload = "für 12 € \u0000".encode() + bytes(range(256))
    await harness.publish(make_event(payload=payload))
    async with consuming(harness) as (_, deliveries):
        await (await take(deliveries)).retry(0.01)
        delivery = await take(deliveries)
        await delivery.dead_letter(FAILURE)
        assert not await comes_within(deliveries, 0.3)
    (letter,) = await harness.dead_letters(1)
    assert letter.payload == payload
    told = dict(letter.headers)
    assert datetime.fromisoformat(told.pop("failed-at")).tzinfo is not None
    assert told == {
        "code": "error",
        "reason": FAILURE.reason,
        "trace": FAILURE.trace,
        "attempts": "2",
        "worker": unique,
    }


async def test_each_replay_of_a_dead_letter_has_a_mark_of_its_own(harness: QueueHarness) -> None:
    desk = harness.desk()
    if desk is None:
        pytest.skip("nobody can look at its dead letters")
    event = make_event(headers={"tenant": "a"})
    await harness.publish(event)
    marks = set()
    async with consuming(harness) as (_, deliveries):
        for _ in range(3):
            await (await take(deliveries)).dead_letter(FAILURE)
            verdicts: list[Verdict] = []

            async def decide(letter: Letter, verdicts: list[Verdict] = verdicts) -> Verdict:
                assert letter.event_id == event.id
                verdicts.append("replay")
                return "replay"

            async with asyncio.timeout(LIMIT):
                while not verdicts:  # a letter on its way from a stopped push is not there at once
                    await desk.walk(decide)
            again = await take(deliveries)
            replayed = event_in(again)
            marks.add(replayed.replay)
            assert replayed._replace(headers={"tenant": "a"}) == event
            await again.give_back()
        await (await take(deliveries)).ack()
    assert None not in marks
    assert len(marks) == 3


async def test_dead_letters_are_replayed_in_the_order_that_is_asked_for(harness: QueueHarness) -> None:
    """Also once somebody has looked at them, which may change how they lie there."""
    desk = harness.desk()
    if desk is None:
        pytest.skip("nobody can look at its dead letters")
    events = [make_event(number, key="k") for number in range(120)]
    await harness.publish(*events)
    seen: list[str] = []

    def place(letter: Letter) -> float:
        return ids(events).index(str(letter.event_id))

    async def keep(letter: Letter) -> Verdict:
        seen.append(str(letter.event_id))
        return "keep"

    async def replay_half(letter: Letter) -> Verdict:
        seen.append(str(letter.event_id))
        return "replay" if len(seen) <= 60 else "keep"

    async def all_are_there() -> bool:
        seen.clear()
        await desk.walk(keep)
        return set(seen) == set(ids(events))

    async with consuming(harness) as (_, deliveries):
        for _ in events:
            await (await take(deliveries)).dead_letter(FAILURE)
        await until(all_are_there, "all letters are there")
        seen.clear()
        await desk.walk(replay_half, place)
        assert seen == ids(events)
        for event in events[:60]:
            delivery = await take(deliveries)
            assert event_in(delivery).id == event.id
            await delivery.ack()
        seen.clear()
        await desk.walk(keep, place)
        assert seen == ids(events[60:])


async def test_a_long_trace_is_cut_at_its_begin(harness: QueueHarness) -> None:
    await harness.publish(make_event())
    async with consuming(harness) as (_, deliveries):
        await (await take(deliveries)).dead_letter(Failure("error", "x" * 5000, "🎉\n" * 100_000 + "the end"))
    (letter,) = await harness.dead_letters(1)
    assert letter.headers["trace"].endswith("the end")
    assert len(letter.headers["trace"]) <= 8000
    assert len(letter.headers["reason"]) == 300


async def test_what_is_not_an_event_is_delivered_as_malformed_and_can_be_dead_lettered(harness: QueueHarness) -> None:
    await harness.publish_strange(b"hello")
    await harness.publish(make_event())
    async with consuming(harness) as (_, deliveries):
        strange = await take(deliveries)
        assert isinstance(strange.event, Malformed)
        await strange.dead_letter(Failure("malformed", str(strange.event)))
        assert isinstance((await take(deliveries)).event, Event)
    (letter,) = await harness.dead_letters(1)
    assert letter.payload == b"hello"
    assert letter.headers["code"] == "malformed"
    assert letter.headers["attempts"] == "1"


async def test_what_is_given_back_goes_to_another_consumer_at_once(harness: QueueHarness) -> None:
    event = make_event()
    await harness.publish(event)
    async with consuming(harness) as (first, deliveries):
        delivery = await take(deliveries)
        await first.stop()
        await delivery.give_back()
        async with consuming(harness) as (_, others):
            again = await asyncio.wait_for(anext(others), ACK_WAIT - 1)
            assert again.event == event
            assert again.attempt == (2 if harness.counts_given_back else 1)
            await again.ack()


async def test_after_stop_nothing_more_comes_and_what_is_in_hand_can_be_settled(harness: QueueHarness) -> None:
    events = [make_event(number) for number in range(6)]
    await harness.publish(*events)
    async with consuming(harness, prefetch=4) as (queue, deliveries):
        in_hand = [await take(deliveries), await take(deliveries)]
        await queue.stop()
        with pytest.raises(StopAsyncIteration):
            await take(deliveries)
        handled = {event_in(delivery).id for delivery in in_hand}
        for delivery in in_hand:
            await delivery.ack()
        async with consuming(harness) as (_, others):
            rest = set()
            for _ in range(4):
                delivery = await asyncio.wait_for(anext(others), ACK_WAIT - 1)
                rest.add(event_in(delivery).id)
                await delivery.ack()
    assert rest == {event.id for event in events} - handled


async def test_stop_ends_deliveries_that_wait(harness: QueueHarness) -> None:
    async with consuming(harness) as (queue, deliveries):
        waiting = asyncio.ensure_future(anext(deliveries))
        await asyncio.sleep(0)
        await queue.stop()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(waiting, LIMIT)


async def test_what_was_in_hand_at_close_comes_again(harness: QueueHarness) -> None:
    event = make_event()
    await harness.publish(event)
    async with consuming(harness) as (_, deliveries):
        await take(deliveries)
    async with consuming(harness) as (_, deliveries):
        again = await take(deliveries)
        assert (again.event, again.attempt) == (event, 2)
        await again.ack()


async def test_close_may_be_called_twice_and_before_open(harness: QueueHarness) -> None:
    queue = harness.queue()
    await queue.close()
    await queue.open()
    await queue.close()
    await queue.close()


async def test_a_lost_connection_is_told_and_open_restores_it(harness: QueueHarness) -> None:
    if harness.lacking is None:
        pytest.skip("this queue has no connection")
    event = make_event()
    await harness.publish(event)
    async with consuming(harness) as (queue, deliveries):
        delivery = await take(deliveries)
        waiting = asyncio.ensure_future(anext(deliveries))
        await asyncio.sleep(0)
        await harness.break_connections()
        with pytest.raises(BrokerUnavailableError):
            await asyncio.wait_for(waiting, 5.0)
        with pytest.raises(BrokerUnavailableError):
            await asyncio.wait_for(delivery.ack(), 5.0)
        await queue.open()
        again = await take(aiter(queue.deliveries()))
        assert (again.event, again.attempt) == (event, 2)
        await again.ack()


async def test_a_retry_and_a_dead_letter_on_a_lost_connection_are_told(harness: QueueHarness) -> None:
    if harness.lacking is None:
        pytest.skip("this queue has no connection")
    await harness.publish(make_event(1), make_event(2))
    async with consuming(harness) as (_, deliveries):
        first, second = await take(deliveries), await take(deliveries)
        await harness.break_connections()
        with pytest.raises(BrokerUnavailableError):
            await asyncio.wait_for(first.retry(0.1), 15.0)
        with pytest.raises(BrokerUnavailableError):
            await asyncio.wait_for(second.dead_letter(FAILURE), 15.0)


async def test_the_depth_counts_what_waits_and_what_waits_for_another_attempt(harness: QueueHarness) -> None:
    queue = harness.queue(prefetch=1)
    await queue.open()
    if await queue.depth() is None:
        await queue.close()
        pytest.skip("this broker does not say")
    await harness.publish(*[make_event(number) for number in range(3)])
    deliveries = aiter(queue.deliveries())
    await (await take(deliveries)).retry(RETRY_DELAYS[-1])
    await take(deliveries)

    async def all_count() -> bool:
        return await queue.depth() == 2

    await until(all_count, "what waits is counted")
    await queue.close()


async def test_it_knows_what_it_has_in_hand(harness: QueueHarness) -> None:
    async with consuming(harness) as (queue, deliveries):
        assert queue.in_hand == 0
        await harness.publish(*[make_event(number) for number in range(4)])
        taken = [await take(deliveries) for _ in range(4)]
        assert queue.in_hand == 4
        left = []
        for settle in (taken[0].ack(), taken[1].retry(60), taken[2].dead_letter(FAILURE)):
            await settle
            left.append(queue.in_hand)
        assert left == [3, 2, 1]
        await taken[3].give_back()
        await (await take(deliveries)).ack()
        assert queue.in_hand == 0


async def test_open_without_its_queue_points_to_the_command_that_declares_it(harness: QueueHarness) -> None:
    if harness.lacking is None:
        pytest.skip("this queue needs nothing on its broker")
    with pytest.raises(TopologyError, match="pgbridge topology --apply"):
        await harness.lacking.open()
    await harness.lacking.close()


async def test_topology_shows_what_is_missing_declares_it_when_told_and_can_be_repeated(harness: QueueHarness) -> None:
    if harness.lacking is None:
        assert list(await harness.queue().topology(apply=True)) == []
        return
    for _ in range(2):
        assert "missing" in {each.state for each in await harness.lacking.topology(apply=False)}
    declared = await harness.lacking.topology(apply=True)
    assert "declared" in {each.state for each in declared}
    assert "missing" not in {each.state for each in declared}
    again = await harness.lacking.topology(apply=True)
    assert "differs" not in {each.state for each in again}
    assert [(each.kind, each.name) for each in again] == [(each.kind, each.name) for each in declared]
    assert {each.state for each in await harness.lacking.topology(apply=False)} == {"present"}
    await harness.lacking.open()
    await harness.lacking.close()
