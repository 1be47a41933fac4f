"""Whatever an event carries, Pub/Sub confirms it as it is, or the sink says why not; and what follows goes on."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta

import pytest
from google.pubsub_v1 import types
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.brokers.contract import CONFIRMED, Never
from bridge.brokers.pubsub.connection import connect
from bridge.brokers.pubsub.message import from_message
from bridge.brokers.pubsub.sink import PubSubSink
from bridge.event import Event, Malformed
from tests.support.events import make_event
from tests.support.pubsub import PROJECT, PubSubReader, pubsub_settings
from tests.support.servers import PubSubEmulator
from tests.support.until import LIMIT

any_text = st.one_of(
    st.text(max_size=40),
    st.text(" \t\r\n\0.*\ud800\ufffe", max_size=10),
    st.sampled_from(["x" * 1024, "x" * 1025, "ü" * 512, "ü" * 513, "🎉" * 256]),
)
names = st.one_of(
    any_text,
    st.sampled_from(
        [
            *["goog", "googclient_traceparent", "GOOG", "CloudPubSubDeadLetterSourceDeliveryCount", "traceparent"],
            *["content-type", "Content-Type", "ce-id", "CE-ID", "x-pgbridge-for", "x-pgbridge-code", "replayed"],
            *["n" * 256, "n" * 257, "ü" * 128, "ü" * 129],
        ]
    ),
)
events = st.builds(
    lambda **fields: make_event(**fields),
    topic=st.one_of(any_text, st.just("shop.order.inserted")).filter(bool),
    key=st.one_of(st.none(), any_text),
    payload=st.one_of(st.binary(max_size=100), st.just(bytes(100_001))),
    headers=st.one_of(
        st.dictionaries(names, any_text, max_size=4),
        st.sampled_from([{f"h{n}": "v" for n in range(count)} for count in (84, 85, 100)]),
    ),
)


class Bench:
    """A sink on a topic of its own, and what reads the topic; hypothesis calls from outside any loop."""

    def __init__(self, server: PubSubEmulator, topic: str) -> None:
        self._topic = topic
        self._reader = PubSubReader(server.address, topic)
        self._settings = pubsub_settings(server.address, topic)
        self._sink = PubSubSink(self._settings)

    async def start(self) -> None:
        await self._sink.topology(apply=True)
        await self._reader.subscribe()
        self._connection = await connect(self._settings)

    async def stop(self) -> None:
        await self._sink.close()
        await self._connection.close()

    async def next(self) -> Event | Malformed:
        subscription = f"projects/{PROJECT}/subscriptions/{self._topic}-reader"
        pull = types.PullRequest.pb()(subscription=subscription, max_messages=1, return_immediately=True)
        async with asyncio.timeout(LIMIT):
            while not (received := (await self._connection.call(self._connection.pull, pull)).received_messages):
                await asyncio.sleep(0.001)
        ids = [received[0].ack_id]
        acknowledge = types.AcknowledgeRequest.pb()(subscription=subscription, ack_ids=ids)
        await self._connection.call(self._connection.acknowledge, acknowledge)
        return from_message(received[0].message)

    async def survives(self, event: Event) -> None:
        await self._sink.open()
        (outcome,) = await asyncio.wait_for(self._sink.publish([event]), LIMIT)
        if outcome is CONFIRMED:
            assert await self.next() == event
        else:
            assert isinstance(outcome, Never), outcome
            assert self._sink.is_open
        plain = make_event()
        assert list(await asyncio.wait_for(self._sink.publish([plain]), LIMIT)) == [CONFIRMED]
        assert await self.next() == plain


@pytest.fixture
def bench(pubsub_emulator: PubSubEmulator, unique: str) -> Iterator[tuple[asyncio.Runner, Bench]]:
    with asyncio.Runner() as runner:
        bench = Bench(pubsub_emulator, unique)
        runner.run(bench.start())
        yield runner, bench
        runner.run(bench.stop())


@settings(max_examples=250, deadline=timedelta(seconds=10), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(event=events)
def test_any_event_arrives_as_it_is_or_is_refused_and_the_next_one_arrives(
    bench: tuple[asyncio.Runner, Bench], event: Event
) -> None:
    runner, server = bench
    runner.run(server.survives(event))
