"""Whatever an event carries, NATS confirms it as it is, or the sink says why not; and what follows goes on."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats.js import JetStreamContext
from pydantic import SecretStr

from bridge.brokers.contract import CONFIRMED, Never, Unknown
from bridge.brokers.nats.connection import connect
from bridge.brokers.nats.message import event_of
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.sink import NatsSink
from bridge.event import Event
from tests.support.events import make_event
from tests.support.servers import NatsServer

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
any_text = st.one_of(
    text, st.text(max_size=40), st.text(" \t\r\n\0.*>%:$-", max_size=10), text.map(("x" * 2000).__add__)
)
names = st.one_of(
    any_text,
    st.sampled_from(
        [
            *["Nats-Msg-Id", "Nats-Expected-Stream", "Nats-Expected-Last-Msg-Id", "Nats-Expected-Last-Sequence"],
            *["Nats-Rollup", "Nats-TTL", "Nats-Schedule", "Nats-Schedule-Target", "Nats-Batch-Id", "Nats-Trace-Dest"],
            *["Nats-Required-Api-Level", "Nats-Incr", "Nats-Marker-Reason", "NATS-MSG-ID", "nats-rollup"],
            *["Status", "Description", "content-type", "Content-Type", "ce-id", "CE-ID", "x-pgbridge-for", "replayed"],
            *["traceparent", "Accept-Encoding", "%", "%25"],
        ]
    ),
)
events = st.builds(
    lambda **fields: make_event(**fields),
    topic=st.one_of(any_text, st.just("shop.order.inserted")).filter(bool),
    key=st.one_of(st.none(), any_text),
    payload=st.one_of(st.binary(max_size=100), st.just(b"+ACK\r\nPUB x 3\r\n"), st.just(bytes(100_000))),
    headers=st.dictionaries(names, any_text, max_size=4),
)


class Bench:
    """A sink on a stream of its own, and what reads the stream; hypothesis calls from outside any loop."""

    def __init__(self, server: NatsServer, stream: str) -> None:
        self._stream = stream
        self._settings = NatsSettings(type="nats", url=SecretStr(server.url), stream=stream, max_message_bytes=90_000)
        self._sink = NatsSink(self._settings)
        self._reader: JetStreamContext.PushSubscription

    async def start(self) -> None:
        await self._sink.topology(apply=True)
        self._connection = await connect(self._settings)
        self._reader = await self._connection.jetstream().subscribe(f"{self._stream}.>", ordered_consumer=True)

    async def stop(self) -> None:
        await self._sink.close()
        await self._connection.close()

    async def survives(self, event: Event) -> None:
        await self._sink.open()
        (outcome,) = await asyncio.wait_for(self._sink.publish([event]), 5.0)
        if outcome is CONFIRMED:
            assert event_of(await self._reader.next_msg(5.0)) == event
        else:
            assert isinstance(outcome, Never) or (isinstance(outcome, Unknown) and outcome.poisoned), outcome
        await self._sink.open()
        plain = make_event()
        assert list(await asyncio.wait_for(self._sink.publish([plain]), 5.0)) == [CONFIRMED]
        assert event_of(await self._reader.next_msg(5.0)) == plain


@pytest.fixture
def bench(nats_server: NatsServer, unique: str) -> Iterator[tuple[asyncio.Runner, Bench]]:
    with asyncio.Runner() as runner:
        bench = Bench(nats_server, unique)
        runner.run(bench.start())
        yield runner, bench
        runner.run(bench.stop())


@settings(max_examples=400, deadline=timedelta(seconds=10), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(event=events)
def test_any_event_arrives_as_it_is_or_is_refused_and_the_next_one_arrives(
    bench: tuple[asyncio.Runner, Bench], event: Event
) -> None:
    runner, server = bench
    runner.run(server.survives(event))
