"""What a worker tells its broker, when, and what follows where the broker does not take it."""

import asyncio
import time
from types import SimpleNamespace

import psycopg
import pytest
from structlog.testing import capture_logs
from tenacity import wait_fixed

from bridge.brokers.contract import Failure
from bridge.errors import BrokerUnavailableError, RefusedError, TopologyError
from bridge.event import REPLAYED, Event
from bridge.settings import PostgresSettings
from tests.support.events import make_event
from tests.support.scripted_queue import ScriptedQueue
from tests.support.until import until
from tests.support.working import echo, fail, replies, settings_of, working
from workers.handler import Reject, Result, Retry
from workers.inbox import Inbox
from workers.worker import Worker


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


async def test_health_tells_what_could_not_be_settled_until_the_broker_is_back(
    shop: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first pause is drawn at random from nothing to a tenth of a second: too short to be sure to look in it.
    monkeypatch.setattr("workers.worker.OUTAGE_BACKOFF", wait_fixed(0.5))
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
            assert await queue.outcomes(1) == [("retry", 1.0)]
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


async def test_dead_letters_are_offered_again_after_as_long_as_the_broker_has_refused_them(
    shop: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ordered worker holds a key for that: a short refusal must not cost a minute, nor a long one a flood."""
    now = 1000.0
    monkeypatch.setattr("workers.attempt.time", SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter))
    queue = ScriptedQueue(failures={"dead_letter": [RefusedError("queue invoices.dead is full") for _ in range(99)]})
    event, delays = make_event(payload=1), []
    async with working(fail, shop, queue, max_attempts=1):
        for count in range(1, 10):
            queue.add(event)
            [*_, (verb, delay)] = await queue.outcomes(count)
            assert verb == "retry"
            assert isinstance(delay, float)
            delays.append(delay)
            now += delay
    assert delays == [1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


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
