"""What a worker's spans say of its attempts, and which events belong to the trace of what they follow from."""

import asyncio
from collections.abc import Iterator

import psycopg
import pytest
from opentelemetry import trace

from bridge.event import Event
from bridge.process.spans import Spans
from bridge.settings import PostgresSettings, SinkSettings
from tests.support.collector import SAMPLED, TRACE, Collector, Span, collecting
from tests.support.events import make_event
from tests.support.working import fail, working
from workers.handler import Reject, Result
from workers.traced import AttemptSpans


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting(monkeypatch) as collector:
        yield collector


@pytest.fixture
def spans(collector: Collector) -> Iterator[AttemptSpans]:
    made = Spans("shop", "test")
    yield AttemptSpans("invoices", SinkSettings(type="memory"), made)
    made.close()


def traced(payload: object = 1) -> Event:
    return make_event(payload=payload, headers={"traceparent": SAMPLED})


def attempts(collector: Collector, count: int) -> list[Span]:
    """The first spans of attempts."""
    found: list[Span] = []

    def enough(arrived: list[Span]) -> bool:
        found[:] = sorted((one for one in arrived if one.name == "process invoices"), key=lambda one: one.began)
        return len(found) >= count

    collector.wait_for(enough)
    return found


async def test_each_attempt_is_a_span_that_says_what_became_of_it(
    shop: PostgresSettings, collector: Collector, spans: AttemptSpans
) -> None:
    event = traced()
    async with working(fail, shop, spans=spans, max_attempts=2, retry_initial="20ms") as queue:
        queue.add(event)
        await queue.outcomes(1)
        await asyncio.sleep(0.02)  # until it is due
        queue.add(event, attempt=2)
        await queue.outcomes(2)
    first, second = attempts(collector, 2)
    assert {first.parent_id, second.parent_id} == {"b7ad6b7169203331"}
    assert [one.attributes["pgbridge.attempt"] for one in (first, second)] == [1, 2]
    assert [one.attributes["pgbridge.outcome"] for one in (first, second)] == ["retried", "dead_lettered"]
    assert {one.attributes["error.type"] for one in (first, second)} == {"error"}
    assert {one.failed for one in (first, second)} == {"ValueError: the printer is out of paper"}
    assert first.attributes["pgbridge.retry_after_seconds"] <= 0.02


async def test_a_reply_that_refuses_fails_its_span_and_that_of_the_attempt(
    shop: PostgresSettings, collector: Collector, spans: AttemptSpans
) -> None:
    async def run(event: Event) -> Result:
        return {"refuse": "P0001"}

    async with working(run, shop, spans=spans, reply="shop.rendered", max_attempts=1) as queue:
        queue.add(traced())
        await queue.outcomes(1)
    (attempt,) = attempts(collector, 1)
    (reply,) = [one for one in collector.spans if one.name == "reply shop.rendered"]
    assert reply.parent_id == attempt.span_id
    assert (reply.attributes["error.type"], attempt.attributes["error.type"]) == ("ReplyError", "error")
    assert reply.failed == attempt.failed == "shop.rendered refuses the result: no such order (SQLSTATE P0001)"


async def test_only_events_that_a_traced_reply_emits_belong_to_its_trace(
    shop: PostgresSettings, bridge_database: str, collector: Collector, spans: AttemptSpans
) -> None:
    """They come back over connections that others use before and after."""

    async def run(event: Event) -> Result:
        return {"of": event.json()}

    async with working(run, shop, spans=spans, reply="shop.rendered", concurrency=4) as queue:
        for number in range(40):
            event = make_event(payload=number)
            kind = number % 4
            text = {1: SAMPLED, 2: f"{SAMPLED[:-1]}0"}.get(kind)
            queue.add(event if text is None else event._replace(headers={"traceparent": text}))
        assert await queue.outcomes(40) == [("ack", None)] * 40
    with psycopg.connect(bridge_database) as connection:
        rows = connection.execute(
            "select (payload::jsonb ->> 'of')::int, headers ->> 'traceparent' from bridge.outbox"
        ).fetchall()
    assert len(rows) == 40
    assert {number for number, header in rows if header is not None} == set(range(1, 40, 4))
    collector.wait_for(lambda arrived: sum(one.name == "reply shop.rendered" for one in arrived) == 10)
    replied = [one for one in collector.spans if one.name == "reply shop.rendered"]
    assert {header for _, header in rows if header} == {f"00-{TRACE}-{one.span_id}-01" for one in replied}


async def test_the_span_is_current_in_the_handler_and_nowhere_else(
    shop: PostgresSettings, collector: Collector, spans: AttemptSpans
) -> None:
    inside: list[str] = []

    async def run(event: Event) -> Result:
        inside.append(f"{trace.get_current_span().get_span_context().span_id:016x}")
        if event.json() == "reject":
            raise Reject("no")
        return {}

    async with working(run, shop, spans=spans, concurrency=1) as queue:
        for event in (traced(), make_event(payload=2), traced("reject"), make_event(payload=3)):
            queue.add(event)
        await queue.outcomes(4)
    first, second = attempts(collector, 2)
    assert inside == [first.span_id, "0" * 16, second.span_id, "0" * 16]
    assert second.attributes["error.type"] == "rejected"
