"""The runtime over a queue that the test scripts, with the inbox on a real PostgreSQL: what becomes of an event."""

import asyncio
from datetime import timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from bridge.brokers.contract import Failure
from bridge.event import Event, Malformed
from bridge.settings import PostgresSettings
from tests.support.events import make_event
from tests.support.scripted_queue import ScriptedQueue
from tests.support.until import rows_become, until
from tests.support.working import echo, fail, figure, replies, settings_of, working
from workers.effects import effect
from workers.handler import Reject, Result, Retry
from workers.inbox import Inbox
from workers.metrics import OUTCOMES, REGISTRY
from workers.worker import Worker


def add_slow_reply(dsn: str, seconds: float) -> None:
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(
            f"CREATE FUNCTION shop.slow(event_id uuid, result jsonb) RETURNS void SECURITY DEFINER LANGUAGE plpgsql"
            f" AS $$ BEGIN IF result ? 'slow' THEN PERFORM pg_sleep({seconds}); END IF; END $$".encode()
        )


async def test_a_handled_event_is_replied_and_then_acknowledged(shop: PostgresSettings, bridge_database: str) -> None:
    async with working(echo, shop) as queue:
        queue.add(make_event(payload=7))
        assert await queue.outcomes(1) == [("ack", None)]
        assert replies(bridge_database) == [{"of": 7}]


async def test_a_repeated_event_is_acknowledged_and_nothing_runs(shop: PostgresSettings, bridge_database: str) -> None:
    event = make_event(payload=7)
    async with working(echo, shop) as queue:
        queue.add(event)
        await queue.outcomes(1)
        queue.add(event._replace(id=event.id.upper()))
        assert await queue.outcomes(2) == [("ack", None)] * 2
    assert replies(bridge_database) == [{"of": 7}]


async def test_what_is_not_an_event_is_dead_lettered_as_malformed(shop: PostgresSettings) -> None:
    async with working(echo, shop) as queue:
        queue.add(Malformed("the message has no attribute ce-id"))
        outcomes = await queue.outcomes(1)
    assert outcomes == [("dead_letter", Failure("malformed", "the message has no attribute ce-id"))]


async def test_an_id_that_is_no_uuid_is_one_event_per_source_and_the_reply_gets_its_inbox_id(
    shop: PostgresSettings, bridge_database: str
) -> None:
    ours, theirs = (make_event(payload=1, id="order-17", source=source) for source in ("/ours", "/theirs"))

    async def charge(event: Event) -> Result:
        async with effect("charge") as begun:
            return {"id": event.id, "source": event.source, "key": begun.idempotency_key}

    async with working(charge, shop, concurrency=1) as queue:
        for event in (ours, theirs, ours):
            queue.add(event)
        assert await queue.outcomes(3) == [("ack", None)] * 3
    assert replies(bridge_database) == [
        {"id": "order-17", "source": event.source, "key": f"invoices:{event.inbox_id}:charge"}
        for event in (ours, theirs)
    ]
    with psycopg.connect(bridge_database) as connection:
        known_as = connection.execute("SELECT event_id::text FROM shop.invoice").fetchall()
    assert known_as == [(ours.inbox_id,), (theirs.inbox_id,)]


async def test_a_rejected_event_is_dead_lettered_at_its_first_attempt(
    shop: PostgresSettings, bridge_database: str
) -> None:
    async def reject(event: Event) -> Result:
        raise Reject("the order was cancelled")

    async with working(reject, shop) as queue:
        queue.add(make_event(payload=1))
        assert await queue.outcomes(1) == [("dead_letter", Failure("rejected", "the order was cancelled", attempts=1))]
    assert replies(bridge_database) == []


async def test_a_handler_may_say_when_it_wants_the_event_again(shop: PostgresSettings) -> None:
    async def later(event: Event) -> Result:
        raise Retry("the bank is closed", after=3600)

    async with working(later, shop) as queue:
        queue.add(make_event(payload=1))
        assert await queue.outcomes(1) == [("retry", 3600)]


async def test_failures_climb_the_ladder_and_end_in_a_dead_letter_with_the_trace(shop: PostgresSettings) -> None:
    event = make_event(payload=1)
    async with working(fail, shop, max_attempts=4, retry_initial="100ms") as queue:
        for count in range(4):
            # The broker's count is higher: deliveries that found the event busy raised it.
            queue.add(event, attempt=count + 40)
            await queue.outcomes(count + 1)
        outcomes = await queue.outcomes(4)
    assert [verb for verb, _ in outcomes] == ["retry", "retry", "retry", "dead_letter"]
    for rung, (_, delay) in zip([1, 2, 4], outcomes, strict=False):
        assert isinstance(delay, float)
        assert rung * 0.05 < delay <= rung * 0.1
    failure = outcomes[-1][1]
    assert isinstance(failure, Failure)
    assert (failure.code, failure.reason) == ("error", "ValueError: the printer is out of paper")
    assert "in fail" in failure.trace
    assert failure.attempts == 4


async def test_a_handler_that_runs_too_long_is_cancelled_and_told_as_a_timeout(shop: PostgresSettings) -> None:
    cancelled = asyncio.Event()

    async def hang(event: Event) -> Result:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return None

    async with working(hang, shop, timeout="50ms", max_attempts=1) as queue:
        queue.add(make_event(payload=1))
        [(verb, failure)] = await queue.outcomes(1)
    assert cancelled.is_set()
    assert verb == "dead_letter"
    assert isinstance(failure, Failure)
    assert failure.code == "timeout"
    assert "workers.invoices.timeout, 0.05 s" in failure.reason


@pytest.mark.parametrize("error", [TimeoutError("bank"), asyncio.CancelledError(), ExceptionGroup("g", [ValueError()])])
async def test_whatever_a_handler_raises_is_an_attempt_that_failed(
    shop: PostgresSettings, error: BaseException
) -> None:
    async def broken(event: Event) -> Result:
        raise error

    async with working(broken, shop, max_attempts=1) as queue:
        queue.add(make_event(payload=1))
        [(verb, failure)] = await queue.outcomes(1)
    assert verb == "dead_letter"
    assert isinstance(failure, Failure)
    assert failure.code == "error"


@pytest.mark.parametrize("result", [[1], "text", {"x": object()}, {"x": float("nan")}, {"refuse": "P0001"}])
async def test_a_result_that_cannot_be_replied_is_an_attempt_that_failed(
    shop: PostgresSettings, bridge_database: str, result: Any
) -> None:
    async def wrong(event: Event) -> Result:
        return result  # type: ignore[no-any-return]

    async with working(wrong, shop) as queue:
        queue.add(make_event(payload=1))
        [(verb, _)] = await queue.outcomes(1)
    assert verb == "retry"
    assert replies(bridge_database) == []


async def test_no_more_handlers_run_at_once_than_the_concurrency(shop: PostgresSettings) -> None:
    running: set[str] = set()
    most = 0
    gate = asyncio.Event()

    async def count(event: Event) -> Result:
        nonlocal most
        running.add(event.id)
        most = max(most, len(running))
        await gate.wait()
        running.discard(event.id)
        return None

    async with working(count, shop, concurrency=3) as queue:
        for _ in range(10):
            queue.add(make_event(payload=1))
        await until(lambda: len(running) == 3)
        gate.set()
        await queue.outcomes(10)
    assert most == 3


async def test_a_stop_lets_running_handlers_finish_and_starts_no_more(
    shop: PostgresSettings, bridge_database: str
) -> None:
    gate = asyncio.Event()
    started = asyncio.Event()

    async def slow(event: Event) -> Result:
        started.set()
        await gate.wait()
        return {"of": event.json()}

    async with working(slow, shop, concurrency=2) as queue:
        queue.add(make_event(payload=1))
        await started.wait()
        asyncio.get_running_loop().call_later(0.1, gate.set)
    assert [verb for _, verb, _ in queue.settled] == ["ack"]
    assert replies(bridge_database) == [{"of": 1}]


async def test_what_runs_beyond_the_shutdown_limit_is_given_back_without_an_attempt(
    shop: PostgresSettings, bridge_database: str
) -> None:
    started = asyncio.Event()

    async def hang(event: Event) -> Result:
        started.set()
        await asyncio.Event().wait()
        return None

    event = make_event(payload=1)
    async with working(hang, shop, shutdown_limit="2s") as queue:
        queue.add(event)
        await started.wait()
    assert [verb for _, verb, _ in queue.settled] == ["give_back"]
    async with working(echo, shop) as queue:
        with capture_logs() as lines:
            queue.add(event)
            await queue.outcomes(1)
            await until(lambda: any(line["event"] == "event.handled" for line in lines))
    assert [line["attempt"] for line in lines if line["event"] == "event.handled"] == [1]


async def test_an_effect_in_a_handler_is_recorded_in_the_inbox(shop: PostgresSettings) -> None:
    charged: list[str] = []

    async def charge_then_fail_once(event: Event) -> Result:
        async with effect("charge") as charge:
            if charge.result is None:
                charged.append(charge.idempotency_key)
                charge.result = {"id": "ch_1"}
        if len(charged) == 1 and not queue.settled:
            raise ConnectionError("after the charge")
        return {"charge": charge.result["id"]}

    event = make_event(payload=1)
    async with working(charge_then_fail_once, shop, retry_initial="10ms") as queue:
        queue.add(event)
        await queue.outcomes(1)
        queue.add(event)
        assert [verb for verb, _ in await queue.outcomes(2)] == ["retry", "ack"]
    assert charged == [f"invoices:{event.id}:charge"]


async def test_an_effect_whose_outcome_nobody_knows_any_more_is_a_dead_letter_until_somebody_says(
    shop: PostgresSettings, bridge_database: str
) -> None:
    """A new attempt under a key that the other side has forgotten would charge twice, and one under a new key, too."""
    asked: list[str] = []

    async def charge(event: Event) -> Result:
        async with effect("charge", max_age=timedelta(hours=23)) as charge:
            if charge.result is None:
                asked.append(charge.idempotency_key)
                raise ConnectionError("no answer")
        return {"charge": charge.result["id"]}

    event = make_event(payload=1)
    key = f"invoices:{event.id}:charge"
    async with working(charge, shop, retry_initial="10ms", max_attempts=5) as queue:
        queue.add(event)
        assert [verb for verb, _ in await queue.outcomes(1)] == ["retry"]
        with psycopg.connect(bridge_database) as admin:
            admin.execute(
                "UPDATE bridge.inbox SET effects ="
                " jsonb_set(effects, '{charge,started_at}', to_jsonb(clock_timestamp() - interval '1 day'))"
            )
        queue.add(event)
        [_, (verb, failure)] = await queue.outcomes(2)
        assert verb == "dead_letter"
        assert isinstance(failure, Failure)
        assert (failure.code, failure.attempts) == ("unknown_effect", 2)
        assert f"was begun 1 day, 0:00:00 ago under the key {key}, no result is on record" in failure.reason
        # A claim that finds the row locked, as it is while this is noted, is told to come back later.
        await rows_become(bridge_database, "SELECT ended_at IS NOT NULL FROM bridge.inbox", [(True,)])
        with psycopg.connect(bridge_database) as admin:
            settle = "SELECT bridge.settle_effect('invoices', %s, %s, %s)"
            assert admin.execute(settle, [event.id, key, '{"id": "ch_1"}']).fetchone() == (True,)
        queue.add(event._replace(headers={"replayed": "once"}))
        [*_, (verb, _)] = await queue.outcomes(3)
        assert verb == "ack"
    assert asked == [key]
    assert replies(bridge_database) == [{"charge": "ch_1"}]


async def test_an_effect_that_would_be_another_under_the_same_key_is_a_dead_letter_with_both(
    shop: PostgresSettings,
) -> None:
    prices = iter([1999, 2999])

    async def charge(event: Event) -> Result:
        async with effect("charge", given={"amount": next(prices), "currency": "eur"}):
            raise ConnectionError("no answer")

    event = make_event(payload=1)
    async with working(charge, shop, retry_initial="10ms", max_attempts=5) as queue:
        for n in (1, 2):
            queue.add(event)
            outcomes = await queue.outcomes(n)
    [(first, _), (verb, failure)] = outcomes
    assert (first, verb) == ("retry", "dead_letter")
    assert isinstance(failure, Failure)
    assert failure.code == "changed_effect"
    assert failure.reason.endswith("and it was given something else: amount 1999 then, 2999 now")


async def test_a_result_that_jsonb_does_not_take_is_kept_as_nearly_as_it_does(shop: PostgresSettings) -> None:
    """It is known only once the effect has happened, and then another attempt must not bring it about again."""
    charged: list[str] = []

    async def charge(event: Event) -> Result:
        async with effect("charge") as charge:
            if charge.result is None:
                charged.append(charge.idempotency_key)
                charge.result = {"id": "ch_1", "amount": Decimal("9.90"), "memo": "a\0b"}
                raise ConnectionError("after the charge")
        return dict(charge.result)

    with capture_logs() as lines:
        async with working(charge, shop, retry_initial="10ms") as queue:
            event = make_event(payload=1)
            queue.add(event)
            await queue.outcomes(1)
            queue.add(event)
            assert [verb for verb, _ in await queue.outcomes(2)] == ["retry", "ack"]
    assert len(charged) == 1
    [warned] = [line for line in lines if line["event"] == "effect.result_changed"]
    assert (warned["key"], warned["log_level"]) == (charged[0], "warning")
    assert "9.90" not in str(warned)


async def test_a_log_line_names_event_topic_and_attempt_and_never_the_payload(shop: PostgresSettings) -> None:
    event = make_event(payload="s3cret payload")
    with capture_logs() as lines:
        async with working(echo, shop) as queue:
            queue.add(event)
            await queue.outcomes(1)
            await until(lambda: any(line["event"] == "event.handled" for line in lines))
    handled = next(line for line in lines if line["event"] == "event.handled")
    assert (handled["event_id"], handled["topic"], handled["attempt"]) == (event.id, event.topic, 1)
    assert handled["duration_ms"] >= 0
    assert "s3cret" not in str(lines)
    assert [line["event"] for line in lines if line["event"].startswith("worker.")] == [
        "worker.started",
        "worker.stopped",
    ]


async def test_a_result_that_is_a_mapping_is_replied(shop: PostgresSettings, bridge_database: str) -> None:
    async def mapping(event: Event) -> Result:
        return MappingProxyType({"of": MappingProxyType({"n": event.json()})})

    async with working(mapping, shop) as queue:
        queue.add(make_event(payload=7))
        assert await queue.outcomes(1) == [("ack", None)]
    assert replies(bridge_database) == [{"of": {"n": 7}}]


@pytest.mark.parametrize("reply", [None, "shop.rendered"])
async def test_a_result_that_cannot_be_stored_fails_alone(shop: PostgresSettings, reply: str | None) -> None:
    gate = asyncio.Event()
    strange: list[Any] = [{"x": "a\0b"}, {"x": object()}, {"x": "\ud800"}, {1: {2, 3}}]

    async def run(event: Event) -> Result:
        await gate.wait()
        number = event.json()
        return strange[number] if number < len(strange) else MappingProxyType({})

    settings = settings_of(concurrency=16)
    queue = ScriptedQueue()
    worker = Worker("invoices", settings, run, lambda: queue, Inbox("invoices", shop, concurrency=16, reply=reply))
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    for number in range(12):
        queue.add(make_event(payload=number))
    await until(lambda: len(queue._in_hand) == 12)
    gate.set()
    outcomes = await queue.outcomes(12)
    stop.set()
    await task
    assert [verb for verb, _ in outcomes].count("retry") == len(strange)
    assert [verb for verb, _ in outcomes].count("ack") == 12 - len(strange)


async def test_a_stop_within_its_limit_dead_letters_nothing_that_never_ran(shop: PostgresSettings) -> None:
    event = make_event(payload=1)
    gate = asyncio.Event()

    async def hang(event: Event) -> Result:
        await gate.wait()
        return {}

    for _ in range(5):
        async with working(hang, shop, max_attempts=2, shutdown_limit="100ms") as queue:
            queue.add(event)
            await until(lambda: bool(queue._in_hand))
        assert {verb for _, verb, _ in queue.settled} <= {"give_back"}
    gate.set()
    async with working(hang, shop, max_attempts=2) as queue:
        queue.add(event)
        assert await queue.outcomes(1) == [("ack", None)]


async def test_a_reply_that_takes_too_long_is_cancelled_and_is_an_attempt_that_failed(
    shop: PostgresSettings, bridge_database: str
) -> None:
    add_slow_reply(bridge_database, 60)

    async def slow(event: Event) -> Result:
        return {"slow": True}

    queue = ScriptedQueue()
    inbox = Inbox("invoices", shop, concurrency=4, reply="shop.slow", reply_timeout=0.2)
    worker = Worker("invoices", settings_of(max_attempts=1), slow, lambda: queue, inbox)
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    queue.add(make_event(payload=1))
    [(verb, failure)] = await queue.outcomes(1)
    stop.set()
    await task
    assert verb == "dead_letter"
    assert isinstance(failure, Failure)
    assert "shop.slow ran longer than workers.invoices.reply_timeout, 0.2 s" in failure.reason


async def test_metrics_tell_what_a_worker_has_in_hand_and_what_became_of_it(
    shop: PostgresSettings, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.worker.SAMPLE_INTERVAL", 0.05)
    gate = asyncio.Event()

    async def slow(event: Event) -> Result:
        await gate.wait()
        if event.json() == 2:
            raise Reject("no")
        return {}

    queue = ScriptedQueue()
    sampled = settings_of(listen="127.0.0.1:1")
    worker = Worker(unique, sampled, slow, lambda: queue, Inbox(unique, shop, concurrency=4))
    assert worker.health().unready == "the worker is starting"
    # Before anything happened: what appears with its first event has no rise that an alert could see.
    assert figure("events_total", unique, outcome="dead_lettered") == 0
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    await until(lambda: figure("broker_up", unique) == 1)
    assert figure("database_up", unique) == 1
    event = make_event(payload=1)
    for each in (event, event, make_event(payload=2)):
        queue.add(each)
    await queue.outcomes(1)
    await until(lambda: figure("in_hand", unique) == 2)
    gate.set()
    await queue.outcomes(3)
    await until(lambda: figure("in_hand", unique) == 0)
    counted = {outcome: figure("events_total", unique, outcome=outcome) for outcome in OUTCOMES}
    assert {outcome: count for outcome, count in counted.items() if count} == {
        "handled": 1,
        "busy": 1,
        "dead_lettered": 1,
    }
    assert figure("attempt_seconds_count", unique) == 2
    await until(lambda: figure("queue_depth", unique) == 0)
    assert worker.health().unready is None
    queue.lose(refusals=30)
    await until(lambda: figure("broker_up", unique) == 0)
    assert str(worker.health().unready).startswith(f"queue {unique}: lost")
    # How much waits is not known any more.
    await until(lambda: figure("queue_depth", unique) is None)
    queue.refusals = 0
    await until(lambda: figure("broker_up", unique) == 1)
    await until(lambda: figure("queue_depth", unique) == 0)
    stop.set()
    await task
    assert worker.health().unready == "the worker is stopping"
    names = {metric.name for metric in REGISTRY.collect()}
    assert not [name for name in names if not name.startswith(("pgbridge_worker_", "process_"))]
