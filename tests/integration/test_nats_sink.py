"""What is NATS's own about the sink, and about the worker's consumer."""

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import nats
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import (
    AccountInfo,
    AccountLimits,
    APIStats,
    ClusterInfo,
    ConsumerConfig,
    DiscardPolicy,
    StreamConfig,
    StreamInfo,
    StreamState,
)
from pydantic import SecretStr

from bridge.brokers.contract import CONFIRMED, Failure, Never, NotSent, Refused, Subscription, Unknown
from bridge.brokers.nats.connection import connect
from bridge.brokers.nats.message import quote_headers, subject_of, topic_of, unquote_headers
from bridge.brokers.nats.queue import NatsQueue
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.sink import DEAD_LETTER_ROOM, NatsSink
from bridge.brokers.nats.topology import filters, refuses_single_messages
from bridge.event import REPLAYED, Event, matches
from tests.support.events import make_event
from tests.support.proxy import Proxy
from tests.support.servers import MAX_PAYLOAD, NatsServer
from tests.support.until import LIMIT, until


def settings_of(url: str, stream: str, publish_timeout: float = 30.0) -> NatsSettings:
    return NatsSettings(type="nats", url=SecretStr(url), stream=stream, publish_timeout=publish_timeout)


@pytest.fixture
async def jetstream(nats_server: NatsServer) -> AsyncIterator[JetStreamContext]:
    async with await nats.connect(nats_server.url) as client:
        yield client.jetstream()


@pytest.fixture
async def sink(nats_server: NatsServer, unique: str) -> AsyncIterator[NatsSink]:
    """Open, on a stream of its own, which it declared."""
    sink = NatsSink(settings_of(nats_server.url, unique))
    await sink.topology(apply=True)
    await sink.open()
    yield sink
    await sink.close()


async def stored(jetstream: JetStreamContext, stream: str) -> int:
    return (await jetstream.stream_info(stream)).state.messages


async def test_a_replayed_event_is_stored_again_although_its_id_is_known(
    sink: NatsSink, jetstream: JetStreamContext, unique: str
) -> None:
    event = make_event()
    assert await sink.publish([event, event._replace(headers={REPLAYED: "true"})]) == [CONFIRMED] * 2
    assert await stored(jetstream, unique) == 2


async def test_an_event_that_is_published_again_is_confirmed_and_stored_once(
    sink: NatsSink, jetstream: JetStreamContext, unique: str
) -> None:
    event = make_event()
    for _ in range(3):
        assert await sink.publish([event]) == [CONFIRMED]
    assert await stored(jetstream, unique) == 1


async def test_an_authors_headers_command_nothing(sink: NatsSink, jetstream: JetStreamContext, unique: str) -> None:
    names = ["Nats-Expected-Stream", "Nats-Expected-Last-Msg-Id", "Nats-Rollup", "Nats-TTL", "Nats-Schedule", "Status"]
    headers = dict.fromkeys(names, "all") | {
        "nats-msg-id": "same",
        "content-type": "mine",
        "Description": "",
        "": "x",
    }
    events = [make_event(headers=headers), make_event(headers=headers)]
    assert list(await sink.publish(events)) == [CONFIRMED] * 2
    message = await jetstream.get_msg(unique, 2)
    assert unquote_headers(message.headers or {}).items() >= headers.items()
    assert (message.headers or {})["content-type"] == "application/json"


async def test_a_full_stream_fails_for_now(sink: NatsSink, jetstream: JetStreamContext, unique: str) -> None:
    config = (await jetstream.stream_info(unique)).config
    await jetstream.update_stream(config.evolve(max_msgs=2))
    outcomes = await sink.publish([make_event() for _ in range(4)])
    assert list(outcomes[:2]) == [CONFIRMED] * 2
    assert [type(outcome) for outcome in outcomes[2:]] == [Refused] * 2
    await jetstream.update_stream(config.evolve(max_msgs=-1))
    assert await sink.publish([make_event()]) == [CONFIRMED]


@pytest.mark.parametrize(
    ("changes", "pipelines"),
    [
        ({}, True),
        ({"max_msg_size": 1000, "max_age": 3600}, True),
        ({"max_msgs": 5}, False),
        ({"max_bytes": 100_000}, False),
        ({"max_msgs": 5, "discard": DiscardPolicy.OLD}, True),
        ({"max_msgs_per_subject": 1}, True),
        ({"max_msgs_per_subject": 1, "discard_new_per_subject": True}, False),
    ],
    ids=["no limit", "size and age", "messages", "bytes", "old ones go", "per subject, old ones go", "per subject"],
)
async def test_a_stream_that_may_refuse_single_messages_is_known(
    nats_server: NatsServer, jetstream: JetStreamContext, unique: str, changes: dict[str, Any], pipelines: bool
) -> None:
    sink = NatsSink(settings_of(nats_server.url, unique))
    await sink.topology(apply=True)
    config = (await jetstream.stream_info(unique)).config
    await jetstream.update_stream(config.evolve(**changes))
    await sink.open()
    assert sink.pipelines == pipelines
    await sink.close()


async def test_a_limit_that_is_set_later_is_known_from_its_first_refusal(
    sink: NatsSink, jetstream: JetStreamContext, unique: str
) -> None:
    config = (await jetstream.stream_info(unique)).config
    await jetstream.update_stream(config.evolve(max_msgs=1))
    assert sink.pipelines
    await sink.publish([make_event(), make_event()])
    assert not sink.pipelines


@pytest.mark.parametrize(
    ("permissions", "limits", "pipelines"),
    [("", "enabled", True), ("", "{ max_file: 100M }", False), ('publish: { deny: "$JS.API.INFO" }', "enabled", False)],
    ids=["no limit", "limit", "may not ask"],
)
async def test_an_account_with_a_limit_may_refuse_single_messages(
    tmp_path: Path, unique: str, permissions: str, limits: str, pipelines: bool
) -> None:
    user = f"{{ user: u, password: p, permissions: {{ {permissions} }} }}"
    account = f"accounts {{ A: {{ jetstream: {limits}, users: [{user}] }} }}"
    with NatsServer(tmp_path, lines=[account]) as server:
        sink = NatsSink(settings_of(f"nats://u:p@127.0.0.1:{server.port}", unique))
        await sink.topology(apply=True)
        await sink.open()
        assert sink.pipelines == pipelines
        assert list(await sink.publish([make_event()])) == [CONFIRMED]
        await sink.close()


def test_a_cluster_may_lose_single_messages() -> None:
    limits = AccountLimits(-1, -1, -1, -1, -1, -1, -1, False)
    account = AccountInfo(0, 0, 0, 0, limits, APIStats(0, 0))
    config, state = StreamConfig(name="s"), StreamState(0, 0, 0, 0, 0)
    alone, clustered = ClusterInfo(leader="a"), ClusterInfo(leader="a", name="c")
    assert not refuses_single_messages(StreamInfo(config, state, cluster=alone), account)
    assert refuses_single_messages(StreamInfo(config, state, cluster=clustered), account)


async def test_a_message_that_ends_the_connection_is_named_poison_in_the_servers_words(
    tmp_path: Path, unique: str
) -> None:
    with NatsServer(tmp_path, lines=["max_control_line 1024"]) as server:
        sink = NatsSink(settings_of(server.url, unique))
        await sink.topology(apply=True)
        await sink.open()
        (outcome,) = await sink.publish([make_event(topic="x" * 1500)])
        assert isinstance(outcome, Unknown)
        assert outcome.poisoned
        assert "maximum control line exceeded" in outcome.reason
        assert not sink.is_open
        await sink.open()
        assert list(await sink.publish([make_event()])) == [CONFIRMED]
        await sink.close()


async def test_a_connection_that_the_server_ended_leaves_no_task_and_no_exception_behind(
    tmp_path: Path, unique: str
) -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    with NatsServer(tmp_path, lines=["max_control_line 1024"]) as server:
        sink = NatsSink(settings_of(server.url, unique))
        await sink.topology(apply=True)
        for _ in range(3):
            await sink.open()
            batch = [make_event(payload=bytes(20_000)) for _ in range(1000)]
            batch[500] = make_event(topic="x" * 1500)
            assert isinstance((await sink.publish(batch))[500], Unknown)
            await sink.close()
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_a_limit_that_the_server_lowered_meanwhile_is_poison_once_and_then_too_large(
    tmp_path: Path, unique: str
) -> None:
    with NatsServer(tmp_path) as server:
        sink = NatsSink(settings_of(server.url, unique))
        await sink.topology(apply=True)
        await sink.open()
        configuration = server.folder / "nats.conf"
        text = configuration.read_text()
        assert str(MAX_PAYLOAD) in text
        configuration.write_text(text.replace(str(MAX_PAYLOAD), "100000"))
        os.kill(server.pid, signal.SIGHUP)
        await until(lambda: "Reloaded: max_payload" in server.log.read_text())
        event = make_event(payload=bytes(200_000))
        (outcome,) = await sink.publish([event])
        assert isinstance(outcome, Unknown)
        assert outcome.poisoned
        assert "maximum payload violation" in outcome.reason
        await sink.open()
        refused, other = await sink.publish([event, make_event()])
        assert isinstance(refused, Never)
        assert refused.code == "too_large"
        assert other is CONFIRMED
        await sink.close()


async def test_an_ending_that_no_message_is_to_blame_for_poisons_nothing(tmp_path: Path, unique: str) -> None:
    with NatsServer(tmp_path) as server:
        sink = NatsSink(settings_of(server.url, unique))
        await sink.topology(apply=True)
        await sink.open()
        server.freeze()
        call = asyncio.create_task(sink.publish([make_event()]))
        await asyncio.sleep(0.1)
        server.kill()
        (outcome,) = await call
        assert isinstance(outcome, Unknown)
        assert not outcome.poisoned
        await sink.close()


async def test_a_message_beyond_the_streams_own_limit_can_never_be_sent(
    sink: NatsSink, jetstream: JetStreamContext, unique: str
) -> None:
    config = (await jetstream.stream_info(unique)).config
    await jetstream.update_stream(config.evolve(max_msg_size=1000))
    (outcome,) = await sink.publish([make_event(payload=b"x" * 2000)])
    assert isinstance(outcome, Never)
    assert outcome.code == "too_large"


async def test_a_stream_that_is_gone_fails_for_now(sink: NatsSink, jetstream: JetStreamContext, unique: str) -> None:
    await jetstream.delete_stream(unique)
    (outcome,) = await sink.publish([make_event()])
    assert isinstance(outcome, Refused)


async def test_a_topic_too_long_for_a_subject_fails_and_the_connection_stays(sink: NatsSink) -> None:
    outcomes = await sink.publish([make_event(topic="🎉" * 255), make_event(topic="🎉" * 200), make_event()])
    refused, *others = outcomes
    assert isinstance(refused, Never)
    assert refused.code == "malformed"
    assert others == [CONFIRMED] * 2


async def test_a_header_in_the_name_of_an_own_attribute_is_refused(sink: NatsSink) -> None:
    refused, other = await sink.publish([make_event(headers={"ce-id": "another"}), make_event()])
    assert isinstance(refused, Never)
    assert refused.code == "malformed"
    assert "'ce-id'" in refused.reason
    assert other is CONFIRMED


async def test_batches_beyond_the_room_for_writing_wait_and_keep_their_order(
    sink: NatsSink, jetstream: JetStreamContext, unique: str
) -> None:
    batches = [[make_event(payload=bytes(1_000_000), key=f"{batch}.{n}") for n in range(6)] for batch in range(5)]
    outcomes = await asyncio.gather(*(sink.publish(batch) for batch in batches))
    assert [list(each) for each in outcomes] == [[CONFIRMED] * 6] * 5
    keys = [(await jetstream.get_msg(unique, sequence)).headers or {} for sequence in range(1, 31)]
    assert [headers["ce-subject"] for headers in keys] == [f"{batch}.{n}" for batch in range(5) for n in range(6)]


async def test_a_frozen_server_leaves_the_outcome_unknown_and_close_ends(tmp_path: Path, unique: str) -> None:
    with NatsServer(tmp_path) as server:
        sink = NatsSink(settings_of(server.url, unique, publish_timeout=1.0))
        await sink.topology(apply=True)
        await sink.open()
        server.freeze()
        # More than the kernel's buffers and the sink's room hold.
        batch = [make_event(payload=bytes(4_000_000)) for _ in range(15)]
        outcomes = await asyncio.wait_for(sink.publish(batch), LIMIT)
        assert isinstance(outcomes[0], Unknown)
        assert isinstance(outcomes[-1], NotSent)
        await asyncio.wait_for(sink.close(), LIMIT)
        server.thaw()
        await sink.open()
        assert list(await sink.publish([make_event()])) == [CONFIRMED]
        await sink.close()


async def test_a_stream_that_would_lose_or_repeat_events_differs(
    nats_server: NatsServer, jetstream: JetStreamContext, unique: str
) -> None:
    await jetstream.add_stream(StreamConfig(name=unique, subjects=[f"{unique}.>"], duplicate_window=1))
    (declaration,) = await NatsSink(settings_of(nats_server.url, unique)).topology(apply=True)
    assert declaration.state == "differs"
    assert "duplicate window" in declaration.detail


async def test_after_a_round_trip_the_server_knows_what_was_subscribed_before(
    nats_server: NatsServer, unique: str
) -> None:
    async with Proxy(nats_server.host, nats_server.port) as proxy, await nats.connect(nats_server.url) as other:
        connection = await connect(settings_of(f"nats://127.0.0.1:{proxy.port}", unique))
        # Some twenty bytes at a time: a ping that goes ahead is answered long before the rest has arrived.
        proxy.rate_to_server = 1000
        subject = f"{unique}.{'x' * 200}"
        await connection.client.subscribe(subject, cb=answer)
        await connection.round_trip()
        # Raises NoRespondersError where nobody has subscribed.
        assert (await other.request(subject, timeout=LIMIT)).data == b"here"
        await connection.close()


async def answer(message: Msg) -> None:
    await message.respond(b"here")


def subscription(worker: str, topics: Sequence[str], ack_wait: float = 3.0) -> Subscription:
    return Subscription(worker, topics, 10, [1.0], max_attempts=3, ack_wait=ack_wait)


async def test_what_only_the_filters_take_is_not_delivered(
    nats_server: NatsServer, sink: NatsSink, unique: str
) -> None:
    queue = NatsQueue(settings_of(nats_server.url, unique), subscription(unique, ["#.paid", "a.*", "*.b"]))
    await queue.topology(apply=True)
    topics = ["shop.order.paid", "shop.order.lost", "paid", "a.x", "x.b", "x.y", "shop.paid"]
    await sink.publish([make_event(topic=topic) for topic in topics])
    await queue.open()
    deliveries = aiter(queue.deliveries())
    seen = []
    for _ in range(5):
        delivery = await asyncio.wait_for(anext(deliveries), LIMIT)
        assert isinstance(delivery.event, Event)
        seen.append(delivery.event.topic)
        await delivery.ack()
    await queue.close()
    assert seen == ["shop.order.paid", "paid", "a.x", "x.b", "shop.paid"]


async def test_a_header_named_status_is_an_authors_own_to_a_worker(
    nats_server: NatsServer, sink: NatsSink, jetstream: JetStreamContext, unique: str
) -> None:
    queue = NatsQueue(settings_of(nats_server.url, unique), subscription(unique, ["#"]))
    await queue.topology(apply=True)
    await queue.open()
    event = make_event(payload=b"", headers={"Status": "404", "Description": "gone"})
    await sink.publish([event])
    # As a version before this one stored it.
    raw = {
        name.replace("%53", "S"): value for name, value in ((await jetstream.get_msg(unique, 1)).headers or {}).items()
    }
    await jetstream.publish(f"{unique}.shop.order.inserted", b"", headers=raw | {"Nats-Msg-Id": "another"})
    deliveries = aiter(queue.deliveries())
    for _ in range(2):
        delivery = await asyncio.wait_for(anext(deliveries), 5.0)
        assert delivery.event == event
        await delivery.ack()
    await queue.close()


async def test_a_header_of_dead_letters_is_refused(sink: NatsSink) -> None:
    refused, other = await sink.publish([make_event(headers={"x-pgbridge-code": "mine"}), make_event()])
    assert isinstance(refused, Never)
    assert refused.code == "malformed"
    assert "'x-pgbridge-code'" in refused.reason
    assert other is CONFIRMED


async def test_a_consumer_with_other_settings_differs_and_apply_changes_it(
    nats_server: NatsServer, sink: NatsSink, unique: str
) -> None:
    settings = settings_of(nats_server.url, unique)
    await NatsQueue(settings, subscription(unique, ["shop.#"])).topology(apply=True)
    changed = NatsQueue(settings, subscription(unique, ["shop.order.#"], ack_wait=9.0))
    assert "differs" in {each.state for each in await changed.topology(apply=False)}
    assert "differs" not in {each.state for each in await changed.topology(apply=True)}
    assert {each.state for each in await changed.topology(apply=False)} == {"present"}


async def test_a_deleted_consumer_ends_the_deliveries(
    nats_server: NatsServer, sink: NatsSink, jetstream: JetStreamContext, unique: str
) -> None:
    queue = NatsQueue(settings_of(nats_server.url, unique), subscription(unique, ["#"]))
    await queue.topology(apply=True)
    await queue.open()
    waiting = asyncio.ensure_future(anext(aiter(queue.deliveries())))
    await sink.publish([make_event()])
    await (await asyncio.wait_for(waiting, LIMIT)).ack()
    await jetstream.delete_consumer(unique, unique)
    with pytest.raises(Exception, match="Consumer Deleted"):
        await asyncio.wait_for(anext(aiter(queue.deliveries())), LIMIT)
    await queue.close()


async def test_the_largest_message_that_the_sink_takes_can_be_dead_lettered(
    nats_server: NatsServer, sink: NatsSink, jetstream: JetStreamContext, unique: str
) -> None:
    queue = NatsQueue(settings_of(nats_server.url, unique), subscription(unique, ["#"]))
    await queue.topology(apply=True)
    # Headers take some of the room: the first size that is not refused is the largest.
    size = MAX_PAYLOAD - DEAD_LETTER_ROOM
    while await sink.publish([make_event(payload=bytes(size))]) != [CONFIRMED]:
        size -= 1
    await queue.open()
    delivery = await asyncio.wait_for(anext(aiter(queue.deliveries())), LIMIT)
    await delivery.dead_letter(Failure("error", "🎉" * 1000, "x y\n" * 10_000))
    message = await jetstream.get_msg(f"{unique}_dead", 1)
    assert message.data == bytes(size)
    assert unquote_headers(message.headers or {})["x-pgbridge-reason"] == "🎉" * 300
    await queue.close()


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@given(st.lists(words, min_size=1, max_size=5).map(".".join))
def test_every_topic_comes_back_from_its_subject(topic: str) -> None:
    subject = subject_of("events", topic)
    assert topic_of(subject) == topic
    assert all(word and word.isascii() and word.isprintable() for word in subject.split("."))
    assert not set(" *>") & set(subject)


@given(st.dictionaries(words.filter(bool), words))
def test_every_header_comes_back(headers: dict[str, str]) -> None:
    quoted = quote_headers(headers)
    assert all(f"{name}{value}".isascii() and f"{name}{value}".isprintable() for name, value in quoted.items())
    assert unquote_headers(quoted) == headers


patterns = st.lists(st.sampled_from(["a", "b", "*", "#"]), min_size=1, max_size=4).map(".".join)
topics = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=5).map(".".join)


@given(st.lists(patterns, min_size=1, max_size=4), topics)
def test_the_filters_take_what_the_patterns_take(subscribed: list[str], topic: str) -> None:
    if any(matches(pattern, topic) for pattern in subscribed):
        found = [each.split(".") for each in filters("events", subscribed)]
        assert any(_takes(each, subject_of("events", topic).split(".")) for each in found)


def _takes(subject_filter: list[str], subject: list[str]) -> bool:
    """NATS's own rule."""
    if subject_filter[-1] == ">":
        fixed = subject_filter[:-1]
        return len(subject) > len(fixed) and all(a in ("*", b) for a, b in zip(fixed, subject, strict=False))
    return len(subject_filter) == len(subject) and all(
        a in ("*", b) for a, b in zip(subject_filter, subject, strict=True)
    )


async def test_no_two_filters_overlap_in_the_servers_eyes(
    sink: NatsSink, jetstream: JetStreamContext, unique: str
) -> None:
    for number, subscribed in enumerate(
        [["#"], ["a.#", "a.b"], ["a.*", "*.b"], ["a.#.#", "#.b"], ["a.*.c", "a.b.#", "x", "a b.ü"], ["*", "*.*", "#.a"]]
    ):
        name = f"c{number}"
        config = ConsumerConfig(durable_name=name, filter_subjects=filters(unique, subscribed))
        assert (await jetstream.add_consumer(unique, config)).name == name
