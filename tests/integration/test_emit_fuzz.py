"""Whatever emit() takes becomes an Event, and then a message of every broker or a refusal with its reason.

The examples go to the real server: what it takes is decided by PostgreSQL's types as much as by our functions.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from bridge.brokers.contract import Unsendable
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.sink import NatsSink
from bridge.brokers.pubsub.message import Encoder as PubSubEncoder
from bridge.brokers.rabbitmq.frames import Encoder as RabbitMQEncoder
from bridge.brokers.rabbitmq.frames import RefusedEvent
from bridge.event import Event
from bridge.postgres.wire import Connection
from bridge.sources.log import LogReader, Position

NESTED = "[" * 1500 + "]" * 1500
NAMES = (
    *("CC", "BCC", "cc", "Status", "status", "Description", "Nats-Msg-Id", "nats-x", "goog", "googclient_x"),
    *("ce-id", "CE-type", "cloudEvents_id", "content-type", "Content-Type", "replayed", "traceparent", "actor"),
    *("x-death", "x-delivery-count", "x-opt-a", "x-match", "x-pgbridge-attempts", "x-request-id", "tenant", "", "a: b"),
    *("%", "%41", "é", "n" * 128, "n" * 129, "\r\n", "__proto__"),
)

# Without NUL, which psycopg itself refuses to send in a text.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=40)
long_texts = st.builds(lambda text, times: text * times, texts, st.sampled_from([1, 1, 1, 30, 200, 1000]))
scalars = st.one_of(
    st.sampled_from(["null", "true", "false", "1e5000", "-1e-300", "1e20000", "-0", "1.50", '"\\u0000"', '"\\ud800"']),
    st.integers().map(str),
    st.text(max_size=40).map(json.dumps),
    long_texts.map(json.dumps),
)


def array(values: list[str]) -> str:
    return f"[{', '.join(values)}]"


def an_object(pairs: dict[str, str]) -> str:
    return f"{{{', '.join(f'{json.dumps(name)}: {value}' for name, value in pairs.items())}}}"


values = st.recursive(
    scalars | st.just(NESTED),
    lambda inner: st.lists(inner, max_size=3).map(array) | st.dictionaries(texts, inner, max_size=3).map(an_object),
    max_leaves=5,
)
names = st.sampled_from(NAMES) | st.text(max_size=10) | st.text(st.characters(min_codepoint=33, max_codepoint=126))
headers = st.dictionaries(names, st.one_of(scalars, scalars, values), max_size=4).map(an_object)
plain_headers = st.dictionaries(st.sampled_from(["cc", "status", "tenant", "n", "%", "actor"]), scalars, max_size=4)
many_headers = st.integers(0, 3000).map(lambda count: an_object({f"h{n}": '"v"' for n in range(count)}))


class Log:
    """A session that emits, reads back in the same transaction, and takes all of it back."""

    def __init__(self, dsn: str) -> None:
        self._runner = asyncio.Runner()
        self._connection = self._runner.run(Connection.connect(dsn))

    def close(self) -> None:
        self._runner.run(self._connection.close())
        self._runner.close()

    def is_json(self, *values: str) -> bool:
        """Whether PostgreSQL takes them as jsonb. What it says of others is said before emit() is called."""
        return self._runner.run(self._is_json(values))

    async def _is_json(self, values: tuple[str, ...]) -> bool:
        try:
            for value in values:
                await self._connection.execute("select %s::jsonb", (value,))
        except (psycopg.DataError, psycopg.errors.StatementTooComplex):
            return False
        finally:
            await self._connection.rollback()
        return True

    def emit(self, topic: str, payload: str, kind: str, key: str | None, headers: str) -> Event | psycopg.Error:
        """The event as the bridge reads it, or what PostgreSQL says."""
        return self._runner.run(self._emit(topic, payload, kind, key, headers))

    async def _emit(self, topic: str, payload: str, kind: str, key: str | None, headers: str) -> Event | psycopg.Error:
        try:
            cursor = await self._connection.execute(
                f"select bridge.emit(%s::text, %s::{kind}, %s::text, %s::jsonb)::text", (topic, payload, key, headers)
            )
            [(event_id,)] = await cursor.fetchall()
            reader = LogReader(self._connection, "test", page_size=10, page_bytes=1_000_000)
            reader.start(Position(0, ()), None)
            [event] = (await reader.read()).events
            assert event.id == event_id
            return event
        except psycopg.Error as error:
            return error
        finally:
            await self._connection.rollback()


@pytest.fixture
def log(bridge_database: str) -> Iterator[Log]:
    log = Log(bridge_database)
    yield log
    log.close()


def test_what_emit_takes_is_an_event_that_every_broker_takes_or_refuses_with_a_reason(log: Log) -> None:
    rabbitmq = RabbitMQEncoder("events", 131_072, 134_217_728)
    pubsub = PubSubEncoder(ordering=True, max_payload=9_800_000)
    nats = NatsSink(NatsSettings(type="nats", url=SecretStr("nats://localhost")))
    outcomes = {"event": 0, "raised": 0, "not JSON": 0}

    # A busy machine makes examples slowly.
    @settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @example(topic="t", payload="x", kind="text", key=None, headers='{"n": 1e5000}')
    @example(topic="t", payload="x", kind="text", key=None, headers=f'{{"n": {NESTED}}}')
    @example(topic="t", payload=NESTED, kind="jsonb", key="k", headers='{"CC": "x"}')
    @example(topic="t" * 255, payload="x", kind="text", key="é" * 512, headers=f'{{"h": "{"x" * 16383}"}}')
    @example(topic="t", payload="x", kind="text", key="", headers='{"traceparent": "\\r\\nNats-Msg-Id: x"}')
    @example(topic="*.#.>.\r\n%", payload="", kind="text", key="\u0001", headers='{"%41": "", "é": null}')
    @given(
        topic=st.just("shop.order.placed") | long_texts,
        payload=st.one_of(texts, texts, values),
        kind=st.sampled_from(["jsonb", "json", "text", "text", "text"]),
        key=st.none() | long_texts,
        headers=st.one_of(headers, headers, plain_headers.map(an_object), many_headers, values),
    )
    def check(topic: str, payload: str, kind: str, key: str | None, headers: str) -> None:
        if not log.is_json(headers, *([payload] if kind != "text" else [])):
            outcomes["not JSON"] += 1
            return
        event = log.emit(topic, payload, kind, key, headers)
        if isinstance(event, psycopg.Error):
            outcomes["raised"] += 1
            assert event.sqlstate is not None, event
            assert event.sqlstate[:2] in ("22", "23", "42", "54"), event
            assert event.diag.message_hint, event
            return
        outcomes["event"] += 1
        assert (event.topic, event.key) == (topic, key)
        if kind != "jsonb":
            assert event.payload == payload.encode()
        assert all(type(name) is str and type(value) is str for name, value in event.headers.items())
        assert len(event.topic.encode()) <= 255
        assert len((event.key or "").encode()) <= 1024
        assert sum(len((name + value).encode()) for name, value in event.headers.items()) <= 16_384
        for encode in (rabbitmq.encode, nats._encode, pubsub.encode):
            with suppress(RefusedEvent, Unsendable):
                encode(event)

    check()
    # Neither is a rarity, so the test shows something.
    assert outcomes["event"] > 50, outcomes
    assert outcomes["raised"] > 50, outcomes
