"""Whatever an event holds, RabbitMQ takes it, or the sink says why not, and the next event goes on."""

import asyncio
from collections import Counter
from datetime import UTC, datetime
from typing import TypeVar

import aio_pika
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from bridge.brokers.contract import CONFIRMED, Confirmed, Never, Outcome, Unknown
from bridge.brokers.rabbitmq import frames
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.sink import RabbitMQSink
from bridge.event import Event
from tests.support.events import make_event
from tests.support.servers import RabbitMQServer

pytestmark = pytest.mark.rabbitmq

T = TypeVar("T")


def mostly(usual: st.SearchStrategy[T], rare: st.SearchStrategy[T]) -> st.SearchStrategy[T]:
    """Rare enough that a whole event is seldom refused for it (`one_of` would take both alike)."""
    return st.sampled_from([*[usual] * 11, rare]).flatmap(lambda chosen: chosen)


utf8 = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
# At both ends of a short string's limit, and beyond; the last has no UTF-8.
odd = st.sampled_from(["", "x" * 255, "ü" * 127, "\0" * 255, "*", "#.#", "a..b", "x" * 129, "x" * 256, "\ud800"])
# What RabbitMQ, its plugins or its other protocols read somewhere.
known_names = st.sampled_from(
    [
        *("CC", "BCC", "cc", "Bcc", "x-death", "x-first-death-queue", "x-delivery-count", "x-acquired-count"),
        *("x-delay", "x-deaths", "x-match", "x-message-ttl", "x-opt-delivery", "x-stream-filter-value"),
        *("x-basic-type", "x-basic-expiration", "user-id", "expiration", "message-id", "hash-on", "routing_key"),
        *("content-type", "delivery_mode", "traceparent", "cloudEvents:id", "cloudEvents_id"),
    ]
)
names = mostly(st.one_of(known_names, utf8, st.just("x" * 128)), odd)
values = st.one_of(utf8, st.sampled_from(["", "0", "-1", "1e5000", "true", "null", "[]", '{"a": 1}', "x" * 20_000]))
events = st.builds(
    Event,
    id=mostly(st.uuids().map(str), odd),
    topic=mostly(
        st.lists(st.sampled_from(["shop", "ü", "*", "#", ""]), max_size=12).map(".".join).filter(bool), utf8 | odd
    ),
    payload=mostly(
        st.binary(max_size=200), st.sampled_from([131_063, 131_064, 131_065, 400_000, 500_000, 500_001]).map(bytes)
    ),
    key=mostly(st.none() | utf8, st.sampled_from([1024, 130_000, 140_000]).map(lambda size: size * "k")),
    source=mostly(st.just("/shop/test"), utf8 | odd),
    time=st.datetimes(min_value=datetime(1970, 1, 1), timezones=st.just(UTC)),
    content_type=mostly(st.sampled_from(["application/json", "text/plain", ""]), utf8 | odd),
    headers=st.dictionaries(names, mostly(values, odd), max_size=3),
)


class Tried:
    """A sink to three kinds of queues, and what became of the events that were given to it one by one."""

    def __init__(self, url: str, exchange: str) -> None:
        self._url = url
        self._exchange = exchange
        self._sink = RabbitMQSink(
            RabbitMQSettings(type="rabbitmq", url=SecretStr(url), exchange=exchange, max_message_bytes=500_000)
        )
        self.outcomes: Counter[type[Outcome]] = Counter()

    async def open(self) -> None:
        await self._sink.topology(apply=True)
        async with await aio_pika.connect(self._url) as connection:
            channel = await connection.channel()
            for kind in ("classic", "quorum", "stream"):
                queue = await channel.declare_queue(
                    f"{self._exchange}-{kind}", durable=True, arguments={"x-queue-type": kind}
                )
                await queue.bind(self._exchange, "#")
        await self._sink.open()

    async def give(self, event: Event) -> None:
        (outcome,) = await self._sink.publish([event])
        self.outcomes[type(outcome)] += 1
        match outcome:
            case Confirmed():
                pass
            case Never():
                assert outcome.code in ("malformed", "too_large")
                assert outcome.reason
            case _:
                assert isinstance(outcome, Unknown)
                assert outcome.poisoned, outcome.reason
                assert not self._sink.is_open
                await self._sink.open()
        assert await self._sink.publish([make_event()]) == [CONFIRMED]

    async def close(self) -> int:
        """How many messages the classic queue holds."""
        await self._sink.close()
        async with await aio_pika.connect(self._url) as connection:
            channel = await connection.channel()
            queue = await channel.declare_queue(f"{self._exchange}-classic", passive=True)
            count = queue.declaration_result.message_count or 0
            for kind in ("classic", "quorum", "stream"):
                await channel.queue_delete(f"{self._exchange}-{kind}")
            return count


@pytest.mark.parametrize(
    ("foreseen", "examples"), [(frames.ROUTING_HEADERS, 400), (frozenset(), 200)], ids=["as it is", "unforeseen"]
)
def test_any_event_alone_is_confirmed_or_refused_with_a_reason_and_the_next_is_confirmed(
    rabbitmq: RabbitMQServer,
    unique: str,
    monkeypatch: pytest.MonkeyPatch,
    foreseen: frozenset[str],
    examples: int,
) -> None:
    # Without these names the encoder lets pass what closes a channel, as it would what nobody has thought of.
    monkeypatch.setattr(frames, "ROUTING_HEADERS", foreseen)
    frames._field_name.cache_clear()
    with asyncio.Runner() as runner:
        tried = Tried(rabbitmq.url, unique)
        runner.run(tried.open())

        @given(events)
        @settings(max_examples=examples)
        def each(event: Event) -> None:
            runner.run(tried.give(event))

        each()
        held = runner.run(tried.close())
    frames._field_name.cache_clear()
    assert held == tried.outcomes.total() + tried.outcomes[Confirmed]
    assert tried.outcomes[Confirmed] > examples // 2
    assert tried.outcomes[Never] > 0
    # What the encoder knows of is all that closes a channel.
    assert (tried.outcomes[Unknown] == 0) == bool(foreseen)
