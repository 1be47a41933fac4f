"""The runtime over a queue that the test scripts, with the inbox on a real PostgreSQL."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr
from structlog.testing import capture_logs

from bridge.brokers.contract import Failure
from bridge.errors import BrokerUnavailableError, DatabaseUnavailableError, LoginError
from bridge.event import Event, Malformed
from bridge.settings import PostgresSettings, WorkerSettings
from tests.support.events import make_event
from tests.support.proxy import Proxy
from tests.support.scripted_queue import ScriptedQueue
from tests.support.servers import PostgresServer
from tests.support.until import until
from workers.effects import effect
from workers.handler import Reject, Result, Retry, Run
from workers.inbox import Claim, Inbox
from workers.worker import Worker


def settings_of(**values: Any) -> WorkerSettings:
    return WorkerSettings(handler="a:b", **{"shutdown_limit": "10s", "retry_initial": "1s", **values})


@contextlib.asynccontextmanager
async def working(
    run: Run, shop: PostgresSettings, queue: ScriptedQueue | None = None, **values: Any
) -> AsyncIterator[ScriptedQueue]:
    """A worker that runs until the block ends, and then must stop in order."""
    settings = settings_of(**values)
    queue = queue or ScriptedQueue()
    inbox = Inbox("invoices", shop, concurrency=settings.concurrency, reply="shop.rendered")
    worker = Worker("invoices", settings, run, lambda: queue, inbox)
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    await asyncio.wait([task, asyncio.create_task(queue.changed.wait())], return_when=asyncio.FIRST_COMPLETED)
    try:
        yield queue
    finally:
        stop.set()
        async with asyncio.timeout(30):
            await task


def replies(dsn: str) -> list[Any]:
    with psycopg.connect(dsn) as connection:
        return [row[0] for row in connection.execute("SELECT result FROM shop.invoice").fetchall()]


async def echo(event: Event) -> Result:
    return {"of": event.json()}


async def fail(event: Event) -> Result:
    raise ValueError("the printer is out of paper")


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


async def test_an_event_that_another_process_has_comes_back_soon_without_an_attempt(shop: PostgresSettings) -> None:
    event = make_event(payload=7)
    other = Inbox("invoices", shop, concurrency=1)
    await other.open()
    try:
        claim = await other.claim(event.id)
        assert isinstance(claim, Claim)
        async with working(echo, shop) as queue:
            queue.add(event)
            [(verb, delay)] = await queue.outcomes(1)
            assert verb == "retry"
            assert isinstance(delay, float)
            assert 0 < delay <= 5
        await other.release(claim, counted=0)
        claim = await other.claim(event.id)
        assert isinstance(claim, Claim)
        assert claim.attempt == 1
    finally:
        await other.close()


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
        {"id": "order-17", "source": event.source, "key": f"{event.inbox_id}:charge"} for event in (ours, theirs)
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
        assert await queue.outcomes(1) == [("dead_letter", Failure("rejected", "the order was cancelled"))]
    assert replies(bridge_database) == []


async def test_a_handler_may_say_when_it_wants_the_event_again(shop: PostgresSettings) -> None:
    async def later(event: Event) -> Result:
        raise Retry("the bank is closed", after=3600)

    async with working(later, shop) as queue:
        queue.add(make_event(payload=1))
        assert await queue.outcomes(1) == [("retry", 3600)]


async def test_failures_climb_the_ladder_and_end_in_a_dead_letter_with_the_trace(shop: PostgresSettings) -> None:
    event = make_event(payload=1)
    async with working(fail, shop, max_attempts=4, retry_initial="1s") as queue:
        for count in range(4):
            # The broker's count is higher: deliveries that found the event busy raised it.
            queue.add(event, attempt=count + 40)
            await queue.outcomes(count + 1)
        outcomes = await queue.outcomes(4)
    assert [verb for verb, _ in outcomes] == ["retry", "retry", "retry", "dead_letter"]
    for rung, (_, delay) in zip([1, 2, 4], outcomes, strict=False):
        assert isinstance(delay, float)
        assert rung * 0.5 < delay <= rung
    failure = outcomes[-1][1]
    assert isinstance(failure, Failure)
    assert (failure.code, failure.reason) == ("error", "ValueError: the printer is out of paper")
    assert "in fail" in failure.trace


async def test_a_dead_letter_that_is_replayed_has_all_its_attempts_again(shop: PostgresSettings) -> None:
    event = make_event(payload=1)
    async with working(fail, shop, max_attempts=2) as queue:
        for count in range(4):
            queue.add(event)
            await queue.outcomes(count + 1)
    assert [verb for _, verb, _ in queue.settled] == ["retry", "dead_letter", "retry", "dead_letter"]


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


async def claims(inbox: Inbox, event_id: str) -> bool:
    return isinstance(await inbox.claim(event_id), Claim)


async def test_an_event_that_kills_its_process_again_and_again_is_dead_lettered_unrun(
    shop: PostgresSettings, bridge_database: str
) -> None:
    event = make_event(payload=1)
    for _ in range(3):
        dying = Inbox("invoices", shop, concurrency=1)
        await dying.open()
        # The server learns a moment later that the session before has ended.
        await until(partial(claims, dying, event.id), "the event is claimed")
        await dying.close()
    async with working(echo, shop, max_attempts=3) as queue:
        queue.add(event)
        while (await queue.outcomes(len(queue.settled) or 1))[-1][0] == "retry":
            count = len(queue.settled)
            queue.add(event)
            await queue.outcomes(count + 1)
        (_, verb, failure) = queue.settled[-1]
    assert verb == "dead_letter"
    assert isinstance(failure, Failure)
    assert failure.code == "attempts_exhausted"
    assert "3 attempts were begun and none ended" in failure.reason
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
    async with working(hang, shop, shutdown_limit="50ms") as queue:
        queue.add(event)
        await started.wait()
    assert [verb for _, verb, _ in queue.settled] == ["give_back"]
    async with working(echo, shop) as queue:
        with capture_logs() as lines:
            queue.add(event)
            await queue.outcomes(1)
            await until(lambda: any(line["event"] == "event.handled" for line in lines))
    assert [line["attempt"] for line in lines if line["event"] == "event.handled"] == [1]


async def test_a_lost_broker_is_told_once_and_connected_again(shop: PostgresSettings, bridge_database: str) -> None:
    with capture_logs() as lines:
        async with working(echo, shop) as queue:
            queue.add(make_event(payload=1))
            await queue.outcomes(1)
            queue.lose(refusals=3)
            queue.add(make_event(payload=2))
            await queue.outcomes(2)
            await until(lambda: any(line["event"] == "queue.restored" for line in lines))
    actions = [line["event"] for line in lines]
    assert actions.count("queue.lost") == actions.count("queue.restored") == 1
    assert next(line for line in lines if line["event"] == "queue.restored")["seconds"] > 0
    assert queue.opened == 5
    assert len(replies(bridge_database)) == 2


async def test_a_login_that_is_refused_after_the_start_is_waited_out(
    shop: PostgresSettings, bridge_database: str
) -> None:
    with capture_logs() as lines:
        async with working(echo, shop) as queue:
            queue.lose(refusals=2, refusal=LoginError("the password was changed"))
            queue.add(make_event(payload=1))
            await queue.outcomes(1)
    told = [(line["event"], line["reason"]) for line in lines if line["event"] in ("queue.lost", "queue.refusing")]
    assert told == [("queue.lost", "the connection is lost"), ("queue.refusing", "the password was changed")]
    assert len(replies(bridge_database)) == 1


async def test_work_done_while_the_broker_was_lost_is_not_done_again(
    shop: PostgresSettings, bridge_database: str
) -> None:
    gate = asyncio.Event()
    event = make_event(payload=1)

    async def slow(event: Event) -> Result:
        await gate.wait()
        return {"of": event.json()}

    with capture_logs() as lines:
        async with working(slow, shop) as queue:
            queue.add(event)
            await until(lambda: bool(queue._in_hand))
            queue.lose()
            await until(lambda: queue.opened == 2)
            gate.set()
            # The reply is visible before the worker knows that it is done.
            await until(lambda: any(line["event"] == "event.unsettled" for line in lines))
            queue.add(event, attempt=2)
            assert await queue.outcomes(1) == [("ack", None)]
    assert replies(bridge_database) == [{"of": 1}]


async def test_an_outage_of_the_database_loses_nothing_and_counts_no_attempt(
    shop: PostgresSettings, bridge_database: str, postgres: PostgresServer
) -> None:
    gate = asyncio.Event()
    runs: list[str] = []

    async def slow(event: Event) -> Result:
        runs.append(event.id)
        await gate.wait()
        return {"of": event.json()}

    async with Proxy("127.0.0.1", postgres.port) as proxy:
        dsn = make_conninfo(shop.dsn.get_secret_value(), port=proxy.port)
        behind = PostgresSettings(dsn=SecretStr(dsn), connect_timeout=2.0)
        with capture_logs() as lines:
            async with working(slow, behind, concurrency=2, max_attempts=1) as queue:
                queue.add(make_event(payload=0))
                await until(lambda: len(runs) == 1)
                proxy.refuse = True
                proxy.cut()
                queue.add(make_event(payload=1))  # cannot be claimed
                gate.set()  # the first cannot be finished
                await until(lambda: any(line["event"] == "database.lost" for line in lines))
                assert queue.settled == []
                proxy.refuse = False
                assert await queue.outcomes(2) == [("ack", None)] * 2
    assert sorted(reply["of"] for reply in replies(bridge_database)) == [0, 1]
    assert len(runs) == 2
    actions = [line["event"] for line in lines]
    assert actions.count("database.lost") == actions.count("database.restored") == 1


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
    async with working(charge_then_fail_once, shop) as queue:
        queue.add(event)
        await queue.outcomes(1)
        queue.add(event)
        assert [verb for verb, _ in await queue.outcomes(2)] == ["retry", "ack"]
    assert charged == [f"{event.id}:charge"]


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


async def test_a_broker_that_does_not_answer_fails_the_start(shop: PostgresSettings) -> None:
    inbox = Inbox("invoices", shop, concurrency=1)
    worker = Worker("invoices", settings_of(), echo, lambda: ScriptedQueue(refusals=1), inbox)
    with pytest.raises(BrokerUnavailableError):
        await worker.run(asyncio.Event())


async def test_a_database_that_does_not_answer_fails_the_start(unique: str) -> None:
    nowhere = PostgresSettings(dsn=SecretStr("postgresql://nobody@127.0.0.1:1/none"), connect_timeout=2.0)
    worker = Worker("w", settings_of(), echo, ScriptedQueue, Inbox("w", nowhere, concurrency=1))
    with pytest.raises(DatabaseUnavailableError):
        await worker.run(asyncio.Event())


async def test_two_processes_of_one_worker_share_an_event_delivered_to_both(
    shop: PostgresSettings, bridge_database: str
) -> None:
    events = [make_event(payload=n) for n in range(30)]
    async with working(echo, shop) as one, working(echo, shop) as other:
        for event in events:
            one.add(event)
            other.add(event)
        outcomes = [*await one.outcomes(30), *await other.outcomes(30)]
    assert {verb for verb, _ in outcomes} <= {"ack", "retry"}
    assert sorted(reply["of"] for reply in replies(bridge_database)) == list(range(30))
