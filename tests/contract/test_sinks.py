"""Every claim that `bridge.brokers.contract.Sink` makes, for every sink. Each broker's own: tests/integration/."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime

import pytest

from bridge.brokers.contract import CONFIRMED, Never, NotSent, Unknown
from bridge.errors import BrokerUnavailableError, TopologyError
from bridge.event import REPLAYED, Event
from tests.contract.sinks import HARNESSES, IMPATIENCE, SinkHarness
from tests.support.events import ids, make_event, make_events
from tests.support.until import LIMIT, until


@pytest.fixture(params=sorted(HARNESSES))
async def harness(request: pytest.FixtureRequest, unique: str) -> AsyncIterator[SinkHarness]:
    server_fixture, start = HARNESSES[request.param]
    server = request.getfixturevalue(server_fixture) if server_fixture else None
    async with start(server, unique) as harness:
        yield harness
        harness.stall(False)
        await harness.sink.close()
        if harness.impatient is not None:
            await harness.impatient.close()


def order(harness: SinkHarness, events: Iterable[Event]) -> list[str]:
    """The ids in the order that the broker promises to keep: of all events, or of those with one key."""
    return ids(sorted(events, key=lambda event: str(event.key)) if harness.ordered_by_key else events)


async def test_before_open_nothing_is_published_and_everything_may_be_tried_again(harness: SinkHarness) -> None:
    assert not harness.sink.is_open
    outcomes = await harness.sink.publish(make_events(3))
    assert [type(outcome) for outcome in outcomes] == [NotSent] * 3
    assert await harness.arrived() == []


async def test_open_may_be_called_again_while_open(harness: SinkHarness) -> None:
    await harness.sink.open()
    await harness.sink.open()
    assert harness.sink.is_open
    assert await harness.sink.publish([make_event()]) == [CONFIRMED]


async def test_an_empty_batch_has_no_outcomes(harness: SinkHarness) -> None:
    await harness.sink.open()
    assert list(await harness.sink.publish([])) == []


async def test_a_batch_arrives_once_and_in_order(harness: SinkHarness) -> None:
    await harness.sink.open()
    events = make_events(1500)
    assert list(await harness.sink.publish(events)) == [CONFIRMED] * 1500
    assert order(harness, await harness.arrived()) == order(harness, events)


@pytest.mark.parametrize(
    "event",
    [
        make_event(key=None),
        make_event(payload=b""),
        make_event(payload=b"not json", content_type="text/plain"),
        make_event(payload="für 12 € 🎉 \u0000".encode(), key="schlüssel 🔑 %/+"),
        make_event(
            headers={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "actor": "zoë ☃"}
        ),
        make_event(time=datetime(2026, 1, 1, tzinfo=UTC)),
    ],
    ids=["no key", "no payload", "text", "unicode", "headers", "whole second"],
)
async def test_a_worker_reads_the_event_that_was_published(harness: SinkHarness, event: Event) -> None:
    await harness.sink.open()
    assert await harness.sink.publish([event]) == [CONFIRMED]
    assert list(await harness.arrived()) == [event]


async def test_calls_in_flight_leave_in_the_order_of_the_calls(harness: SinkHarness) -> None:
    await harness.sink.open()
    batches = [[make_event(n, payload=b"x" * (50_000 if call % 2 else 10)) for n in range(60)] for call in range(6)]
    outcomes = await asyncio.gather(*(harness.sink.publish(batch) for batch in batches))
    assert [list(each) for each in outcomes] == [[CONFIRMED] * 60] * 6
    sent = [event for batch in batches for event in batch]
    assert order(harness, await harness.arrived()) == order(harness, sent)


async def test_a_call_that_need_not_wait_for_room_hands_over_its_bytes_before_it_suspends(harness: SinkHarness) -> None:
    await harness.sink.open()
    first, second = make_event(1), make_event(2)
    call = harness.sink.publish([first])
    try:
        call.send(None)
    except StopIteration:
        pass  # it did not even suspend
    else:
        call.close()
    assert await harness.sink.publish([second]) == [CONFIRMED]
    assert order(harness, await harness.arrived()) == order(harness, [first, second])


async def test_a_payload_beyond_the_limit_is_never_sent_and_disturbs_no_other(harness: SinkHarness) -> None:
    if harness.size_limit is None:
        pytest.skip("this sink takes any size")
    await harness.sink.open()
    events = make_events(5)
    events[2] = make_event(payload=b"x" * (harness.size_limit + 1))
    outcomes = await harness.sink.publish(events)
    refused = outcomes[2]
    assert isinstance(refused, Never)
    assert refused.code == "too_large"
    assert str(harness.size_limit) in refused.reason
    assert "max_message_bytes" in refused.reason
    assert [outcomes[n] for n in (0, 1, 3, 4)] == [CONFIRMED] * 4
    assert order(harness, await harness.arrived()) == order(harness, events[:2] + events[3:])


async def test_an_event_without_a_topic_is_never_sent_and_disturbs_no_other(harness: SinkHarness) -> None:
    await harness.sink.open()
    if harness.size_limit is None:
        pytest.skip("this sink takes anything")
    events = make_events(3)
    # No CloudEvent: a worker could only give it up, as malformed.
    events[1] = make_event(topic="")
    outcomes = await harness.sink.publish(events)
    refused = outcomes[1]
    assert isinstance(refused, Never)
    assert refused.code == "malformed"
    assert "has no topic" in refused.reason
    assert [outcomes[n] for n in (0, 2)] == [CONFIRMED] * 2
    assert order(harness, await harness.arrived()) == order(harness, [events[0], events[2]])


async def test_after_a_loss_nothing_is_published_until_open_is_called(harness: SinkHarness) -> None:
    await harness.sink.open()
    await harness.break_connection()
    assert not harness.sink.is_open
    lost = await asyncio.wait_for(harness.sink.publish(make_events(2)), 1.0)
    assert [type(outcome) for outcome in lost] == [NotSent] * 2
    await harness.sink.open()
    assert harness.sink.is_open
    event = make_event()
    assert await harness.sink.publish([event]) == [CONFIRMED]
    assert ids(await harness.arrived()) == [event.id]


async def test_what_was_in_flight_at_a_loss_has_a_true_outcome(harness: SinkHarness) -> None:
    await harness.sink.open()
    batches = [[make_event(n, payload=b"x" * 5000) for n in range(500)] for _ in range(8)]
    calls = [asyncio.create_task(harness.sink.publish(batch)) for batch in batches]
    done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    assert done
    await harness.break_connection()
    outcomes = await asyncio.wait_for(asyncio.gather(*calls), 5.0)
    arrived = set(ids(await harness.arrived()))
    for batch, answers in zip(batches, outcomes, strict=True):
        for event, outcome in zip(batch, answers, strict=True):
            match outcome:
                case NotSent():
                    assert event.id not in arrived
                case Unknown():
                    assert outcome.reason
                case _:
                    assert outcome is CONFIRMED
                    assert event.id in arrived


async def test_close_answers_what_is_in_flight_and_may_be_called_twice(harness: SinkHarness) -> None:
    await harness.sink.open()
    harness.stall(True)
    call = asyncio.create_task(harness.sink.publish(make_events(3)))
    await asyncio.sleep(0)
    in_flight = not call.done()
    await harness.sink.close()
    outcomes = await asyncio.wait_for(call, 5.0)
    assert all(isinstance(outcome, Unknown) for outcome in outcomes) or not in_flight
    assert not harness.sink.is_open
    await harness.sink.close()


async def test_a_broker_that_stood_still_for_a_while_gets_every_event_once(harness: SinkHarness) -> None:
    sink = harness.impatient or harness.sink
    await sink.open()
    # Marked as replays, so that no broker drops what comes twice.
    events = [make_event(number, headers={REPLAYED: "true"}) for number in range(50)]
    for part in range(0, 50, 10):
        harness.stall(True)
        call = asyncio.create_task(sink.publish(events[part : part + 10]))
        await asyncio.sleep(0.6 * IMPATIENCE if harness.impatient else 0)
        harness.stall(False)
        assert list(await asyncio.wait_for(call, LIMIT)) == [CONFIRMED] * 10
    assert sink.is_open
    assert order(harness, await harness.arrived()) == order(harness, events)


async def test_a_broker_that_does_not_answer_is_left_after_the_time_out(harness: SinkHarness) -> None:
    sink = harness.impatient
    if sink is None:
        pytest.skip("nothing is ever in flight")
    await sink.open()
    harness.stall(True)
    began = time.monotonic()
    calls = [asyncio.create_task(sink.publish(make_events(10))) for _ in range(3)]
    outcomes = await asyncio.wait_for(asyncio.gather(*calls), LIMIT)
    took = time.monotonic() - began
    assert IMPATIENCE * 0.9 < took < IMPATIENCE * 3
    assert {type(outcome) for each in outcomes for outcome in each} <= {Unknown, NotSent}
    assert isinstance(outcomes[0][0], Unknown)
    assert not outcomes[0][0].poisoned
    assert not sink.is_open


async def test_a_sink_says_why_what_it_published_waits(harness: SinkHarness) -> None:
    await harness.sink.open()
    assert harness.sink.stalled is None
    if harness.impatient is None:
        return
    assert await harness.sink.publish([make_event()]) == [CONFIRMED]
    harness.stall(True)
    # What was confirmed waits for nothing, however long the broker is silent.
    await asyncio.sleep(1.5)
    assert harness.sink.stalled is None
    call = asyncio.create_task(harness.sink.publish(make_events(3)))
    await asyncio.sleep(0.2)
    assert harness.sink.stalled is None
    await until(lambda: harness.sink.stalled is not None)
    assert harness.sink.is_open
    harness.stall(False)
    assert list(await asyncio.wait_for(call, LIMIT)) == [CONFIRMED] * 3
    assert harness.sink.stalled is None


async def test_open_without_its_target_points_to_the_command_that_declares_it(harness: SinkHarness) -> None:
    if harness.lacking is None:
        pytest.skip("this sink needs nothing on its broker")
    with pytest.raises(TopologyError, match="pgbridge topology --apply"):
        await harness.lacking.open()
    assert not harness.lacking.is_open


async def test_topology_shows_what_is_missing_and_declares_it_only_when_told(harness: SinkHarness) -> None:
    if harness.lacking is None:
        assert await harness.sink.topology(apply=True) == []
        return
    for _ in range(2):
        assert "missing" in {each.state for each in await harness.lacking.topology(apply=False)}
    assert "declared" in {each.state for each in await harness.lacking.topology(apply=True)}
    assert {each.state for each in await harness.lacking.topology(apply=False)} == {"present"}
    await harness.lacking.open()
    assert harness.lacking.is_open
    await harness.lacking.close()


async def test_a_broker_that_does_not_answer_is_told_without_the_password(harness: SinkHarness) -> None:
    if harness.unreachable is None:
        pytest.skip("this sink has no broker")
    for attempt in (harness.unreachable.open(), harness.unreachable.topology(apply=True)):
        with pytest.raises(BrokerUnavailableError) as caught:
            await attempt
        assert "hunter2" not in str(caught.value)
        assert "127.0.0.1:1" in str(caught.value)
