"""The runtime over a queue that the test scripts, with the inbox on a real PostgreSQL."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from functools import partial
from types import MappingProxyType
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr
from structlog.testing import capture_logs

from bridge.brokers.contract import Failure
from bridge.errors import BrokerUnavailableError, DatabaseUnavailableError, LoginError, RefusedError, TopologyError
from bridge.event import REPLAYED, Event, Malformed
from bridge.settings import PostgresSettings, WorkerSettings
from tests.support.events import make_event
from tests.support.proxy import Proxy
from tests.support.scripted_queue import ScriptedQueue
from tests.support.servers import PostgresServer
from tests.support.until import until
from workers.effects import effect
from workers.handler import Reject, Result, Retry, Run, handler
from workers.inbox import Claim, ClaimLostError, Inbox, NotNow
from workers.metrics import OUTCOMES, REGISTRY
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


async def test_a_dead_letter_that_is_replayed_has_all_its_attempts_again(shop: PostgresSettings) -> None:
    event = make_event(1)
    async with working(fail, shop, max_attempts=2, retry_initial="10ms") as queue:
        for replay in range(3):
            marks = {REPLAYED: f"replay {replay}"} if replay else {}
            for _ in range(2):
                queue.add(event._replace(headers=marks))
                await queue.outcomes(len(queue.settled) + 1)
    assert [verb for _, verb, _ in queue.settled] == ["retry", "dead_letter"] * 3


async def test_a_repeat_of_an_event_that_was_given_up_is_acknowledged_and_runs_nothing(shop: PostgresSettings) -> None:
    """A bridge that lost a confirm publishes again, and nothing tells how late the second message comes."""
    runs = 0

    async def refuse(event: Event) -> Result:
        nonlocal runs
        runs += 1
        raise Reject("no")

    first = make_event(1)
    again = first._replace(headers={REPLAYED: "\x00 \ud800 a mark that anyone may have written" + "x" * 1000})
    with capture_logs() as lines:
        async with working(refuse, shop) as queue:
            for given_up, event in enumerate((first, again)):
                queue.add(event)
                await queue.outcomes(3 * given_up + 1)
                # Until then the letter is owed, as far as the inbox knows, and a repeat brings it once more.
                await until(
                    lambda: sum(line["event"] == "event.dead_lettered" for line in lines) > given_up  # noqa: B023
                )
                for repeat in (first, event):
                    queue.add(repeat)
                    await queue.outcomes(len(queue.settled) + 1)
    assert [verb for _, verb, _ in queue.settled] == ["dead_letter", "ack", "ack"] * 2
    assert runs == 2


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
    return isinstance(await inbox.claim_alone(event_id), Claim)


async def test_an_event_that_kills_its_process_again_and_again_is_dead_lettered_unrun(
    shop: PostgresSettings, bridge_database: str
) -> None:
    event = make_event(payload=1)
    for _ in range(3):
        dying = Inbox("invoices", shop, concurrency=1, backoff=[0.01])
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
    async with working(charge_then_fail_once, shop, retry_initial="10ms") as queue:
        queue.add(event)
        await queue.outcomes(1)
        queue.add(event)
        assert [verb for verb, _ in await queue.outcomes(2)] == ["retry", "ack"]
    assert charged == [f"invoices:{event.id}:charge"]


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


@pytest.mark.parametrize("verb", ["ack", "retry", "dead_letter"])
@pytest.mark.parametrize("error", [BrokerUnavailableError("no answer"), TopologyError("lacks a queue"), OSError("bug")])
async def test_a_delivery_that_cannot_be_settled_ends_the_connection_and_comes_again(
    shop: PostgresSettings, verb: str, error: Exception
) -> None:
    runs: list[str] = []

    async def run(event: Event) -> Result:
        runs.append(event.id)
        if verb == "retry" and len(runs) == 1:
            raise Retry
        if verb == "dead_letter":
            raise Reject("never")
        return {}

    queue = ScriptedQueue(failures={verb: [error]}, redelivers=True)
    with capture_logs() as lines:
        async with working(run, shop, queue, retry_initial="10ms"):
            queue.add(make_event(payload=1))
            [(settled, _)] = await queue.outcomes(1)
    assert settled == ("dead_letter" if verb == "dead_letter" else "ack")
    # What became of it is on record: it did not run again only because the broker did not take it.
    assert len(runs) == (2 if verb == "retry" else 1)
    assert queue.opened == 2
    kind = "event.crashed" if isinstance(error, OSError) else "event.unsettled"
    assert [line["event"] for line in lines].count(kind) == 1


async def test_health_tells_what_could_not_be_settled_until_the_broker_is_back(shop: PostgresSettings) -> None:
    queue = ScriptedQueue(redelivers=True)
    inbox = Inbox("invoices", shop, concurrency=4, reply="shop.rendered")
    worker = Worker("invoices", settings_of(), echo, lambda: queue, inbox)
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    await until(lambda: worker.health().role == "working", "the worker works")
    assert worker.health().problems == ()
    queue.failures["ack"] = [BrokerUnavailableError("the ack has no answer")]
    queue.refusals = 2
    queue.add(make_event(payload=1))
    await until(lambda: "the ack has no answer" in str(worker.health().problems), "health tells it")
    queue.failures.clear()
    await queue.outcomes(1)
    await until(lambda: worker.health().problems == (), "health is well again")
    stop.set()
    await task


async def test_health_forgets_a_refused_dead_letter_that_another_process_brought_to_the_broker(
    shop: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.attempt.REFUSED_DELAY", 0.2)
    queue = ScriptedQueue(failures={"dead_letter": [RefusedError("queue invoices.dead is full")]})
    inbox = Inbox("invoices", shop, concurrency=4, reply="shop.rendered")
    worker = Worker("invoices", settings_of(max_attempts=1), fail, lambda: queue, inbox)
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    await until(lambda: worker.health().role == "working", "the worker works")
    queue.add(make_event(payload=1))
    await until(lambda: "invoices.dead is full" in str(worker.health().problems), "health tells it")
    # It was offered again by another process, so this one hears no more of it.
    await until(lambda: worker.health().problems == (), "health is well again", limit=5)
    stop.set()
    await task


async def test_what_is_in_hand_and_in_no_task_fails_the_health_and_comes_again(
    shop: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No way into it is known; were there one, the worker would go deaf while everything looks well."""
    monkeypatch.setattr("workers.worker.LOOK_INTERVAL", 0.05)
    queue = ScriptedQueue(stranded=2)
    inbox = Inbox("invoices", shop, concurrency=4, reply="shop.rendered")
    worker = Worker("invoices", settings_of(), echo, lambda: queue, inbox)
    stop = asyncio.Event()
    with capture_logs() as lines:
        task = asyncio.create_task(worker.run(stop))
        await until(lambda: "nothing works on 2 deliveries" in str(worker.health().problems), "health tells it")
        await until(lambda: queue.opened == 2 and worker.health().problems == (), "they were given back")
        stop.set()
        await task
    assert [line["deliveries"] for line in lines if line["event"] == "worker.stranded"] == [2]


async def test_what_runs_for_long_or_waits_for_a_slot_is_not_taken_for_stranded(
    shop: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.worker.LOOK_INTERVAL", 0.01)
    gate, first = asyncio.Event(), make_event(payload=1)

    async def hold(event: Event) -> Result:
        if event.id == first.id:
            await gate.wait()
        return {"of": event.json()}

    async with working(hold, shop) as queue:
        queue.add(first)
        # Thirty waits of a few looks each, with one in hand.
        for count in range(30):
            queue.add(make_event(payload=2))
            await queue.outcomes(count + 1)
            await asyncio.sleep(0.03)
        gate.set()
        await queue.outcomes(31)
        assert queue.opened == 1


async def test_a_broker_that_settles_nothing_is_not_asked_without_a_pause(shop: PostgresSettings) -> None:
    queue = ScriptedQueue(failures={"ack": [BrokerUnavailableError("no") for _ in range(1000)]}, redelivers=True)
    async with working(echo, shop, queue):
        queue.add(make_event(payload=1))
        await asyncio.sleep(2)
        # The pauses grow to seconds: 0.1 s, 0.2 s, 0.4 s, ... drawn at random.
        assert 2 <= queue.opened < 40
        queue.failures.clear()
        await queue.outcomes(1)


async def test_a_dead_letter_that_the_broker_refuses_is_offered_again_and_nothing_runs_for_that(
    shop: PostgresSettings,
) -> None:
    runs: list[str] = []

    async def fail_once_each(event: Event) -> Result:
        runs.append(event.id)
        raise ValueError("the real error")

    event = make_event(payload=1)
    queue = ScriptedQueue(failures={"dead_letter": [RefusedError("queue invoices.dead is full")]})
    with capture_logs() as lines:
        async with working(fail_once_each, shop, queue, max_attempts=1):
            queue.add(event)
            assert await queue.outcomes(1) == [("retry", 60.0)]
            queue.add(event)
            _, (verb, failure) = await queue.outcomes(2)
            assert queue.opened == 1
            queue.add(event._replace(headers={REPLAYED: "once"}))
            await queue.outcomes(3)
    assert verb == "dead_letter"
    assert isinstance(failure, Failure)
    assert (failure.reason, failure.attempts) == ("ValueError: the real error", 1)
    assert "fail_once_each" in failure.trace
    assert len(runs) == 2
    [refused] = [line for line in lines if line["event"] == "event.letter_refused"]
    assert "invoices.dead is full" in refused["reason"]


async def test_an_event_whose_claim_was_lost_at_an_effect_runs_again(
    shop: PostgresSettings, bridge_database: str
) -> None:
    runs: list[str] = []

    async def charge(event: Event) -> Result:
        runs.append(event.id)
        if len(runs) == 1:
            # As a kill of PostgreSQL right after the claim does, whose commit need not wait for the disk.
            with psycopg.connect(bridge_database, autocommit=True) as admin:
                admin.execute("delete from bridge.inbox")
        async with effect("charge") as charge:
            charge.result = {"id": "ch_1"}
        return {}

    event = make_event(payload=1)
    async with working(charge, shop) as queue:
        queue.add(event)
        assert await queue.outcomes(1) == [("retry", 1.0)]
        queue.add(event)
        assert await queue.outcomes(2) == [("retry", 1.0), ("ack", None)]


async def test_an_event_whose_claim_was_lost_is_not_given_up_by_who_lost_it(
    shop: PostgresSettings, bridge_database: str
) -> None:
    taken_over = Inbox("invoices", shop, concurrency=1)
    await taken_over.open()

    async def reject_late(event: Event) -> Result:
        # Our session ends, as that of a process that stood still, and another process has the event.
        with psycopg.connect(bridge_database, autocommit=True) as admin:
            admin.execute("update bridge.inbox set claim = null")
        await taken_over.claim(event.id)
        raise Reject("no such customer")

    event = make_event(payload=1)
    async with working(reject_late, shop) as queue:
        queue.add(event)
        assert await queue.outcomes(1) == [("retry", 1.0)]
    await taken_over.close()


async def test_an_event_that_is_delivered_twice_to_one_process_runs_once_at_a_time(shop: PostgresSettings) -> None:
    gate = asyncio.Event()
    runs: list[str] = []

    async def slow(event: Event) -> Result:
        runs.append(event.id)
        await gate.wait()
        return {}

    event = make_event(payload=1)
    async with working(slow, shop) as queue:
        queue.add(event)
        await until(lambda: len(runs) == 1)
        queue.add(event)
        assert await queue.outcomes(1) == [("retry", 1.0)]
        gate.set()
        await queue.outcomes(2)
    assert len(runs) == 1


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


async def test_a_delay_is_kept_although_the_broker_brings_the_event_sooner_and_costs_no_attempt(
    shop: PostgresSettings, bridge_database: str
) -> None:
    runs: list[str] = []

    async def later(event: Event) -> Result:
        runs.append(event.id)
        if len(runs) == 1:
            raise Retry("the bank is closed", after=3 * 3600)
        return {"of": 1}

    event = make_event(payload=1)
    with capture_logs() as lines:
        async with working(later, shop) as queue:
            queue.add(event)
            await queue.outcomes(1)
            for number in range(3):
                queue.add(event)
                outcomes = await queue.outcomes(2 + number)
            assert len(runs) == 1
            with psycopg.connect(bridge_database, autocommit=True) as admin:
                admin.execute("update bridge.inbox set due_at = due_at - interval '3 hours'")
            queue.add(event)
            await queue.outcomes(5)
            await until(lambda: any(line["event"] == "event.handled" for line in lines))
    for verb, delay in outcomes:
        assert verb == "retry"
        assert isinstance(delay, float | int)
        assert 3 * 3600 - 60 < delay <= 3 * 3600
    assert [line["attempt"] for line in lines if line["event"] == "event.handled"] == [2]


async def test_an_event_whose_attempt_died_with_its_process_runs_with_nothing_beside_it(
    shop: PostgresSettings, bridge_database: str
) -> None:
    poison = make_event(payload="poison")
    dying = Inbox("invoices", shop, concurrency=1)
    await dying.open()
    assert isinstance(await dying.claim(poison.id), Claim)
    await dying.close()
    running: set[str] = set()
    beside: list[set[str]] = []
    gate = asyncio.Event()

    async def run(event: Event) -> Result:
        running.add(event.id)
        if event.id == poison.id:
            beside.append(set(running))
        else:
            await gate.wait()
        running.discard(event.id)
        return {}

    async with working(run, shop, concurrency=8, retry_initial="600ms") as queue:
        queue.add(poison)
        # First it waits for its backoff, so that a process that starts again and again does other work, too.
        [(verb, _)] = await queue.outcomes(1)
        assert verb == "retry"
        for _ in range(4):
            queue.add(make_event(payload=1))
        await until(lambda: len(running) == 4)
        with psycopg.connect(bridge_database, autocommit=True) as admin:
            admin.execute("update bridge.inbox set due_at = clock_timestamp() where due_at is not null")
        queue.add(poison)
        await until(lambda: len(queue._in_hand) == 6)
        for _ in range(3):
            queue.add(make_event(payload=1))
        await asyncio.sleep(0.1)
        assert not beside
        gate.set()
        await queue.outcomes(9)
    assert beside == [{poison.id}]


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


async def test_an_attempt_is_not_over_while_its_thread_runs(shop: PostgresSettings) -> None:
    go_on = threading.Event()
    running = 0
    most = 0
    lock = threading.Lock()

    @handler("shop.#")
    def blocking(event: Event) -> Result:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        go_on.wait(20)
        with lock:
            running -= 1
        return {}

    event = make_event(payload=1)
    async with working(blocking, shop, timeout="50ms", retry_initial="10ms") as queue:
        queue.add(event)
        await until(lambda: running == 1)
        queue.add(event)
        # The first has run for longer than it may, and still runs.
        assert await queue.outcomes(1) == [("retry", 1.0)]
        await asyncio.sleep(0.2)
        assert len(queue.settled) == 1
        go_on.set()
        [_, (verb, delay)] = await queue.outcomes(2)
        assert (verb, most) == ("retry", 1)
        assert isinstance(delay, float)
        assert delay <= 0.01


async def test_a_thread_that_never_ends_does_not_keep_the_worker_and_its_event_is_not_released(
    shop: PostgresSettings,
) -> None:
    go_on = threading.Event()
    started = threading.Event()

    @handler("shop.#")
    def blocking(event: Event) -> Result:
        started.set()
        go_on.wait(30)
        return {}

    event = make_event(payload=1)
    other = Inbox("invoices", shop, concurrency=1)
    await other.open()
    async with working(blocking, shop, shutdown_limit="400ms") as queue:
        queue.add(event)
        await asyncio.to_thread(started.wait, 10)
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 2
    assert queue.settled == []
    # The process lives, and so do its thread and its claim's attempt: whoever claims it must come back later.
    claim = await other.claim(event.id)
    assert isinstance(claim, NotNow)
    go_on.set()
    await other.close()


async def test_an_effect_in_a_thread_is_recorded(shop: PostgresSettings, bridge_database: str) -> None:
    @handler("shop.#")
    def charge(event: Event) -> Result:
        with effect("charge") as charge:
            charge.result = {"key": charge.idempotency_key}
        return dict(charge.result)

    event = make_event(payload=1)
    async with working(charge, shop) as queue:
        queue.add(event)
        assert await queue.outcomes(1) == [("ack", None)]
    assert replies(bridge_database) == [{"key": f"invoices:{event.id}:charge"}]


def add_slow_reply(dsn: str, seconds: float) -> None:
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(
            f"CREATE FUNCTION shop.slow(event_id uuid, result jsonb) RETURNS void SECURITY DEFINER LANGUAGE plpgsql"
            f" AS $$ BEGIN IF result ? 'slow' THEN PERFORM pg_sleep({seconds}); END IF; END $$".encode()
        )


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


async def test_slow_replies_keep_no_other_event_from_being_claimed(
    shop: PostgresSettings, bridge_database: str
) -> None:
    add_slow_reply(bridge_database, 60)
    quick = make_event(payload=0)
    inbox = Inbox("invoices", shop, concurrency=4, reply="shop.slow")
    other = Inbox("invoices", shop, concurrency=4, reply="shop.slow")
    await inbox.open()
    await other.open()
    claims = [await inbox.claim(make_event(payload=n).id) for n in range(4)]
    finishing = [
        asyncio.ensure_future(inbox.finish(claim, {"slow": True})) for claim in claims if isinstance(claim, Claim)
    ]

    async def all_reply() -> bool:
        with psycopg.connect(bridge_database) as connection:
            row = connection.execute("select count(*) from pg_stat_activity where wait_event = 'PgSleep'").fetchone()
        return row == (4,)

    await until(all_reply)
    async with asyncio.timeout(3):
        claim = await inbox.claim(quick.id)
        assert isinstance(claim, Claim)
        await inbox.finish(claim, {})
        # Nor does one that meets an event that is being finished wait for its reply.
        for busy in claims:
            assert isinstance(busy, Claim)
            assert await other.claim(busy.event_id) == NotNow("busy")
    for each in finishing:
        each.cancel()
    await asyncio.gather(*finishing, return_exceptions=True)
    await inbox.close()
    await other.close()


async def test_a_database_that_falls_silent_is_told_by_health_and_comes_back_while_nothing_happens(
    shop: PostgresSettings, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.session.HEARTBEAT", 0.5)
    monkeypatch.setattr("workers.worker.HEARTBEAT", 0.2)
    async with Proxy("127.0.0.1", postgres.port) as proxy:
        dsn = make_conninfo(shop.dsn.get_secret_value(), port=proxy.port)
        behind = PostgresSettings(dsn=SecretStr(dsn), connect_timeout=2.0)
        queue = ScriptedQueue()
        worker = Worker("invoices", settings_of(), echo, lambda: queue, Inbox("invoices", behind, concurrency=4))
        stop = asyncio.Event()
        task = asyncio.create_task(worker.run(stop))
        await until(lambda: worker.health().role == "working", "the worker works")
        proxy.blackhole = True
        await until(lambda: "database" in str(worker.health().problems), "health tells it")
        proxy.blackhole = False
        await until(lambda: worker.health().problems == (), "health is well again")
        queue.add(make_event(payload=1))
        await queue.outcomes(1)
        stop.set()
        await task


async def test_a_stop_ends_in_time_although_the_database_is_silent(
    shop: PostgresSettings, postgres: PostgresServer
) -> None:
    async with Proxy("127.0.0.1", postgres.port) as proxy:
        dsn = make_conninfo(shop.dsn.get_secret_value(), port=proxy.port)
        behind = PostgresSettings(dsn=SecretStr(dsn), connect_timeout=2.0)
        async with working(echo, behind, shutdown_limit="2s") as queue:
            proxy.blackhole = True
            queue.add(make_event(payload=1))
            await until(lambda: bool(queue._in_hand))
            stopping = time.monotonic()
        assert time.monotonic() - stopping < 4


async def test_a_process_that_stands_still_frees_its_events(
    shop: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.session._SETTINGS", ("set idle_session_timeout = '300ms'",))
    event = make_event(payload=1)
    # Nobody beats for it, as for a process under SIGSTOP.
    frozen = Inbox("invoices", shop, concurrency=1)
    await frozen.open()
    claim = await frozen.claim(event.id)
    assert isinstance(claim, Claim)
    other = Inbox("invoices", shop, concurrency=1, backoff=[0.01])
    await other.open()
    await until(partial(claims, other, event.id), "the event is free")
    with pytest.raises(ClaimLostError):
        await frozen.finish(claim, {})
    await frozen.beat()
    assert isinstance(await frozen.claim(make_event(payload=2).id), Claim)
    await frozen.close()
    await other.close()


def figure(name: str, worker: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"pgbridge_worker_{name}", {"worker": worker, **labels})


async def test_metrics_tell_what_a_worker_has_in_hand_and_what_became_of_it(
    shop: PostgresSettings, unique: str
) -> None:
    gate = asyncio.Event()

    async def slow(event: Event) -> Result:
        await gate.wait()
        if event.json() == 2:
            raise Reject("no")
        return {}

    queue = ScriptedQueue()
    worker = Worker(unique, settings_of(), slow, lambda: queue, Inbox(unique, shop, concurrency=4))
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
    queue.lose(refusals=3)
    await until(lambda: figure("broker_up", unique) == 0)
    await until(lambda: figure("broker_up", unique) == 1)
    stop.set()
    await task
    names = {metric.name for metric in REGISTRY.collect()}
    assert not [name for name in names if not name.startswith(("pgbridge_worker_", "process_"))]


async def test_a_handler_whose_time_is_up_while_it_waits_for_the_database_has_lost_no_attempt(
    shop: PostgresSettings, postgres: PostgresServer
) -> None:
    runs: list[str] = []
    event = make_event(payload=1)
    async with Proxy("127.0.0.1", postgres.port) as proxy:

        async def charge(event: Event) -> Result:
            runs.append(event.id)
            if len(runs) == 1:
                proxy.refuse = True
                proxy.cut()
            async with effect("charge") as charge:
                charge.result = {}
            return {}

        dsn = make_conninfo(shop.dsn.get_secret_value(), port=proxy.port)
        behind = PostgresSettings(dsn=SecretStr(dsn), connect_timeout=2.0)
        with capture_logs() as lines:
            async with working(charge, behind, max_attempts=1, timeout="1s") as queue:
                queue.add(event)
                await until(lambda: any(line["event"] == "database.lost" for line in lines))
                # Until the handler's time is up, which nothing tells.
                await asyncio.sleep(1.5)
                proxy.refuse = False
                assert await queue.outcomes(1) == [("give_back", None)]
                queue.add(event)
                assert await queue.outcomes(2) == [("give_back", None), ("ack", None)]
    assert len(runs) == 2
