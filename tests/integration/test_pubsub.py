"""What is Pub/Sub's own about the sink: keys, batches, limits, refusals, and topics that keep nothing.

Google's emulator plays the service; where it knows no refusal or limit, a scripted server does.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from bridge.brokers.contract import CONFIRMED, Never, NotSent, Outcome, Unknown
from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.brokers.pubsub.sink import PubSubSink
from bridge.errors import SettingsError, TopologyError
from bridge.event import Event
from tests.support.events import make_event
from tests.support.pubsub import PubSubReader, delete, pubsub_settings
from tests.support.scripted_pubsub import ScriptedPubSub
from tests.support.servers import PubSubEmulator
from tests.support.until import until


def kinds(outcomes: Sequence[Outcome]) -> list[str]:
    return [type(outcome).__name__ for outcome in outcomes]


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedPubSub]:
    async with ScriptedPubSub() as server:
        yield server


async def opened(address: str, topic: str = "events", **changes: Any) -> PubSubSink:
    sink = PubSubSink(pubsub_settings(address, topic, **changes))
    await sink.open()
    return sink


async def test_a_request_has_one_key_and_a_key_one_request_in_flight(scripted: ScriptedPubSub) -> None:
    sink = await opened(scripted.address)
    events = [make_event(key=f"k{n % 20}", payload=b"%d" % n) for n in range(2000)]
    calls = [asyncio.create_task(sink.publish(events[n : n + 100])) for n in range(0, 2000, 100)]
    for call in calls:
        assert list(await call) == [CONFIRMED] * 100
    await sink.close()
    assert all(len({message.ordering_key for message in request}) == 1 for request in scripted.requests)
    assert max(scripted.most_at_once.values()) == 1
    for key in {event.key for event in events}:
        of_key = [message.data for message in scripted.confirmed if message.ordering_key == key]
        assert of_key == [event.payload for event in events if event.key == key]


async def test_what_waits_behind_a_request_of_its_key_shares_the_next_one(scripted: ScriptedPubSub) -> None:
    release = asyncio.Event()

    async def answer(messages: Sequence[Any]) -> None:
        await release.wait()

    scripted.answer = answer
    sink = await opened(scripted.address)
    calls = [asyncio.create_task(sink.publish([make_event(key="k")])) for _ in range(50)]
    await scripted.requests_reach(1)
    release.set()
    await asyncio.gather(*calls)
    await sink.close()
    assert [len(request) for request in scripted.requests] == [1, 49]


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, [1000, 1000, 500]),
        ({"batch_messages": 900}, [900, 900, 700]),
        ({"batch_bytes": 100_000}, None),
        ({"ordering": False}, [1000, 1000, 500]),
    ],
    ids=["count", "own count", "bytes", "no ordering"],
)
async def test_requests_are_cut_by_count_and_bytes(
    scripted: ScriptedPubSub, changes: dict[str, Any], sizes: list[int] | None
) -> None:
    sink = await opened(scripted.address, **changes)
    key = "k" if changes.get("ordering") is False else None
    await sink.publish([make_event(key=key, payload=b"x" * 100) for _ in range(2500)])
    await sink.close()
    found = sorted((len(request) for request in scripted.requests), reverse=True)
    limit = changes.get("batch_bytes", 2_000_000)
    assert sum(found) == 2500
    assert all(sum(message.ByteSize() for message in request) <= limit for request in scripted.requests)
    assert found == sizes if sizes else len(found) > 5
    assert {message.ordering_key for message in scripted.confirmed} == {""}


async def test_with_a_delay_calls_share_a_request(scripted: ScriptedPubSub) -> None:
    sink = await opened(scripted.address, batch_delay=0.1)
    outcomes = await asyncio.gather(*(sink.publish([make_event(key=key)]) for key in ("k", "k", None, None)))
    assert [list(each) for each in outcomes] == [[CONFIRMED]] * 4
    await sink.close()
    assert sorted(len(request) for request in scripted.requests) == [2, 2]


async def test_of_a_refused_request_only_the_message_at_fault_is_given_up(scripted: ScriptedPubSub) -> None:
    async def answer(messages: Sequence[Any]) -> grpc.StatusCode | None:
        poisoned = any(message.data == b"7" for message in messages)
        return grpc.StatusCode.INVALID_ARGUMENT if poisoned else None

    scripted.answer = answer
    sink = await opened(scripted.address)
    outcomes = await sink.publish([make_event(key="k", payload=b"%d" % n) for n in range(20)])
    assert kinds(outcomes) == ["Confirmed"] * 7 + ["Never"] + ["Confirmed"] * 12
    assert [message.data for message in scripted.confirmed] == [b"%d" % n for n in range(20) if n != 7]
    await sink.close()


async def test_a_throttled_key_holds_back_its_later_events_and_no_other_key(scripted: ScriptedPubSub) -> None:
    throttled = asyncio.Event()

    async def answer(messages: Sequence[Any]) -> grpc.StatusCode | None:
        if messages[0].ordering_key == "hot" and not throttled.is_set():
            return grpc.StatusCode.RESOURCE_EXHAUSTED
        if messages[0].ordering_key == "slow":
            await throttled.wait()
        return None

    scripted.answer = answer
    sink = await opened(scripted.address)
    first = asyncio.create_task(
        sink.publish([make_event(key="hot", payload=b"1"), make_event(key="hot", payload=b"2"), make_event(key="slow")])
    )
    await scripted.requests_reach(2)

    # The first call waits for its slow key, so the relay cannot know yet that "hot" failed.
    async def only_hot_is_held_back() -> bool:
        outcomes = await sink.publish([make_event(key="hot", payload=b"3"), make_event(key="cold", payload=b"4")])
        return kinds(outcomes) == ["NotSent", "Confirmed"]

    await until(only_hot_is_held_back)
    throttled.set()
    assert kinds(await first) == ["Refused", "NotSent", "Confirmed"]
    assert sink.is_open
    assert b"3" not in [message.data for message in scripted.confirmed]
    assert (
        kinds(await sink.publish([make_event(key="hot", payload=b"1"), make_event(key="hot", payload=b"2")]))
        == ["Confirmed"] * 2
    )
    await sink.close()


async def test_a_time_out_is_unknown_and_closes_the_sink(scripted: ScriptedPubSub) -> None:
    async def answer(messages: Sequence[Any]) -> None:
        await asyncio.Event().wait()

    scripted.answer = answer
    sink = await opened(scripted.address, publish_timeout=0.2)
    first = asyncio.create_task(sink.publish([make_event(key="k")]))
    await scripted.requests_reach(1)
    behind = await sink.publish([make_event(key="k"), make_event(key="k")])
    assert isinstance((await first)[0], Unknown)
    assert kinds(behind) == ["NotSent"] * 2
    assert not sink.is_open
    assert len(scripted.requests) == 1
    await sink.close()


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNAUTHENTICATED", "NOT_FOUND"])
async def test_what_a_person_must_put_right_is_tried_again_until_then(scripted: ScriptedPubSub, code: str) -> None:
    async def answer(messages: Sequence[Any]) -> grpc.StatusCode | None:
        return grpc.StatusCode[code]

    scripted.answer = answer
    sink = await opened(scripted.address)
    (outcome,) = await sink.publish([make_event(key="k")])
    assert isinstance(outcome, NotSent)
    assert code in outcome.reason
    assert not sink.is_open
    await sink.close()


@pytest.mark.parametrize(
    ("event", "code", "names"),
    [
        (make_event(key="k" * 1025), "too_large", "1024"),
        (make_event(key="ü" * 513), "too_large", "1024"),
        (make_event(headers={"h": "v" * 1025}), "too_large", "'h' has 1025"),
        (make_event(headers={"h" * 257: "v"}), "too_large", "256"),
        (make_event(headers={f"h{n}": "v" for n in range(100)}), "too_large", "100"),
        (make_event(headers={"": "v"}), "malformed", "''"),
        (make_event(headers={"google": "v"}), "malformed", "google"),
        (make_event(headers={"x-pgbridge-for": "v"}), "malformed", "x-pgbridge-for"),
        (make_event(headers={"CloudPubSubDeadLetterSourceTopic": "v"}), "malformed", "CloudPubSub"),
        (make_event(payload=b"x" * 100_001), "too_large", "max_message_bytes"),
    ],
    ids=[
        "key",
        "key in bytes",
        "value",
        "name",
        "count",
        "empty name",
        "google's name",
        "a queue's name",
        "the service's name",
        "payload",
    ],
)
async def test_an_event_beyond_a_limit_is_refused_before_it_is_sent(
    scripted: ScriptedPubSub, event: Event, code: str, names: str
) -> None:
    sink = await opened(scripted.address)
    refused, other = await sink.publish([event, make_event(key="other")])
    assert isinstance(refused, Never)
    assert refused.code == code
    assert names in refused.reason
    assert other is CONFIRMED
    assert len(scripted.confirmed) == 1
    await sink.close()


async def test_events_at_the_limits_pass(pubsub_emulator: PubSubEmulator, unique: str) -> None:
    sink = PubSubSink(pubsub_settings(pubsub_emulator.address, unique, max_message_bytes=9_800_000))
    await sink.topology(apply=True)
    await sink.open()
    widest = {f"h{n}".ljust(256, "x"): "v" * 1024 for n in range(80)}
    events = [make_event(key="k" * 1024, payload=b"x" * 9_800_000), make_event(key="k", payload=b"", headers=widest)]
    assert list(await sink.publish(events)) == [CONFIRMED] * 2
    await sink.close()


async def test_the_trace_travels_under_both_names_and_subscriptions_can_filter_by_topic(
    pubsub_emulator: PubSubEmulator, unique: str
) -> None:
    sink = PubSubSink(pubsub_settings(pubsub_emulator.address, unique))
    await sink.topology(apply=True)
    reader = PubSubReader(pubsub_emulator.address, unique)
    await reader.subscribe()
    await sink.open()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    event = make_event(key="k", headers={"traceparent": trace})
    assert list(await sink.publish([event])) == [CONFIRMED]
    (message,) = await reader.messages()
    flat = dict(message.attributes)
    assert flat["traceparent"] == flat["googclient_traceparent"] == trace
    assert (flat["ce-type"], flat["ce-id"], flat["ce-subject"]) == (event.topic, event.id, "k")
    assert flat["content-type"] == "application/json"
    assert message.ordering_key == "k"
    await sink.close()


async def test_a_topic_that_keeps_nothing_is_a_loud_warning(
    pubsub_emulator: PubSubEmulator, unique: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = PubSubSink(pubsub_settings(pubsub_emulator.address, unique, retention=0))
    (declared,) = await sink.topology(apply=True)
    assert declared.state == "differs"
    assert "WARNING: no subscription and no retention" in declared.detail
    await sink.open()
    assert "pubsub.messages_not_kept" in capsys.readouterr().out
    await sink.close()
    await PubSubReader(pubsub_emulator.address, unique).subscribe()
    assert [each.state for each in await sink.topology(apply=False)] == ["present"]


async def test_another_retention_is_told_and_applied(pubsub_emulator: PubSubEmulator, unique: str) -> None:
    await PubSubSink(pubsub_settings(pubsub_emulator.address, unique)).topology(apply=True)
    sink = PubSubSink(pubsub_settings(pubsub_emulator.address, unique, retention=86400))
    (declared,) = await sink.topology(apply=False)
    assert (declared.state, declared.detail) == ("differs", "keeps messages for 7 d; --apply sets 1 d")
    assert [each.state for each in await sink.topology(apply=True)] == ["declared"]
    assert [each.state for each in await sink.topology(apply=False)] == ["present"]


async def test_a_topic_deleted_under_the_sink_stops_it_until_it_is_declared_again(
    pubsub_emulator: PubSubEmulator, unique: str
) -> None:
    settings = pubsub_settings(pubsub_emulator.address, unique)
    sink = PubSubSink(settings)
    await sink.topology(apply=True)
    await sink.open()
    await delete(settings, f"topics/{unique}")
    (outcome,) = await sink.publish([make_event(key="k")])
    assert isinstance(outcome, NotSent)
    with pytest.raises(TopologyError, match="pgbridge topology --apply"):
        await sink.open()
    await sink.topology(apply=True)
    await sink.open()
    assert list(await sink.publish([make_event(key="k")])) == [CONFIRMED]
    await sink.close()


@pytest.mark.parametrize(
    "given", ["hunter2", '{"type": "hunter2"}', json.dumps({"type": "service_account", "private_key": "hunter2"})]
)
async def test_bad_credentials_are_told_without_their_words(given: str) -> None:
    settings = PubSubSettings.model_validate(
        {"type": "pubsub", "project": "shop", "credentials": given, "emulator_host": ""}
    )
    with pytest.raises(SettingsError) as caught:
        await PubSubSink(settings).open()
    assert "hunter2" not in str(caught.value)
    assert "credentials" in str(caught.value)
