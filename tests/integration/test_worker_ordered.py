"""A worker with `ordered = true` keeps in hand what is to be tried again, and lets others pass meanwhile."""

import asyncio

import pytest

from bridge.brokers.contract import Failure
from bridge.errors import RefusedError
from bridge.event import Event
from bridge.settings import PostgresSettings
from tests.support.events import make_event
from tests.support.scripted_queue import ScriptedQueue
from tests.support.until import until
from tests.support.working import echo, figure, replies, working
from workers.claim import Claim
from workers.handler import Reject, Result
from workers.inbox import Inbox


async def test_what_fails_is_tried_again_in_hand_until_it_is_handled(
    shop: PostgresSettings, bridge_database: str
) -> None:
    runs: list[int] = []

    async def fail_twice(event: Event) -> Result:
        runs.append(1)
        if len(runs) < 3:
            raise ValueError("not yet")
        return {"run": len(runs)}

    async with working(fail_twice, shop, ordered=True, retry_initial="10ms") as queue:
        queue.add(make_event())
        assert await queue.outcomes(1) == [("ack", None)]
    assert [verb for _, verb, _ in queue.settled] == ["ack"]
    assert replies(bridge_database) == [{"run": 3}]


async def test_what_fails_for_good_is_dead_lettered_from_the_hand(shop: PostgresSettings) -> None:
    async def fail(event: Event) -> Result:
        raise ValueError("never")

    async with working(fail, shop, ordered=True, retry_initial="10ms", max_attempts=3) as queue:
        queue.add(make_event())
        [(verb, failure)] = await queue.outcomes(1)
    assert verb == "dead_letter"
    assert isinstance(failure, Failure)
    assert failure.attempts == 3


async def test_what_waits_for_another_attempt_leaves_its_slot_to_others(shop: PostgresSettings) -> None:
    async def fail_the_first(event: Event) -> Result:
        if event.json() == "failing":
            raise ValueError("not yet")
        return {}

    async with working(fail_the_first, shop, ordered=True, concurrency=1, retry_initial="60s") as queue:
        failing = queue.add(make_event(payload="failing"))
        others = [queue.add(make_event(payload=n)) for n in range(5)]
        assert await queue.outcomes(5) == [("ack", None)] * 5
        assert [delivery for delivery, _, _ in queue.settled] == others
        assert queue.in_hand == 1
    # A stop does not wait for its next attempt, and counts none.
    assert queue.settled[5:] == [(failing, "give_back", None)]


async def test_concurrency_holds_although_waiting_ones_come_back(shop: PostgresSettings) -> None:
    running, most, runs = 0, 0, dict[str, int]()

    async def fail_once(event: Event) -> Result:
        nonlocal running, most
        running += 1
        most = max(most, running)
        runs[event.id] = runs.get(event.id, 0) + 1
        try:
            await asyncio.sleep(0.01)
        finally:
            running -= 1
        if runs[event.id] == 1:
            raise ValueError("not yet")
        return {}

    async with working(fail_once, shop, ordered=True, concurrency=3, retry_initial="20ms") as queue:
        for n in range(30):
            queue.add(make_event(payload=n))
        assert await queue.outcomes(30) == [("ack", None)] * 30
    assert most == 3
    assert set(runs.values()) == {2}


async def test_what_waits_when_the_connection_is_lost_comes_again_on_the_next(
    shop: PostgresSettings, bridge_database: str
) -> None:
    runs: list[int] = []

    async def fail_once(event: Event) -> Result:
        runs.append(1)
        if len(runs) == 1:
            raise ValueError("not yet")
        return {"run": len(runs)}

    queue = ScriptedQueue(redelivers=True)
    async with working(fail_once, shop, queue, ordered=True, retry_initial="1s") as queue:
        queue.add(make_event())
        await until(lambda: len(runs) == 1, "the first attempt has failed")
        queue.lose()
        assert await queue.outcomes(1) == [("ack", None)]
        assert queue.opened == 2
    assert replies(bridge_database) == [{"run": 2}]


async def test_an_event_that_another_process_has_waits_in_hand(shop: PostgresSettings, bridge_database: str) -> None:
    event = make_event(payload=7)
    other = Inbox("invoices", shop, concurrency=1)
    await other.open()
    try:
        claim = await other.claim(event.id)
        assert isinstance(claim, Claim)
        before = figure("events_total", "invoices", outcome="busy") or 0
        async with working(echo, shop, ordered=True) as queue:
            queue.add(event)
            await until(lambda: (figure("events_total", "invoices", outcome="busy") or 0) > before, "it is busy")
            assert queue.settled == []
            await other.release(claim, counted=0)
            assert await queue.outcomes(1) == [("ack", None)]
    finally:
        await other.close()
    assert replies(bridge_database) == [{"of": 7}]


async def test_a_dead_letter_that_is_refused_is_offered_again_from_the_hand(
    shop: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.attempt.REFUSED_DELAY", 0.05)
    runs: list[int] = []

    async def reject(event: Event) -> Result:
        runs.append(1)
        raise Reject("no such order")

    queue = ScriptedQueue(failures={"dead_letter": [RefusedError("the queue is full")] * 2})
    async with working(reject, shop, queue, ordered=True) as queue:
        queue.add(make_event())
        [(verb, _)] = await queue.outcomes(1)
    assert verb == "dead_letter"
    assert len(runs) == 1


async def test_a_stop_gives_back_what_the_rate_has_not_let_begin(shop: PostgresSettings) -> None:
    loop = asyncio.get_running_loop()
    async with working(echo, shop, rate="1/h", shutdown_limit="60s") as queue:
        queue.add(make_event(payload=1))
        queue.add(make_event(payload=2))
        assert await queue.outcomes(1) == [("ack", None)]
        await until(lambda: queue.in_hand == 1, "the second waits for its turn")
        stopped_at = loop.time()
    assert loop.time() - stopped_at < 30  # of the 45 s that running handlers have
    assert [verb for _, verb, _ in queue.settled] == ["ack", "give_back"]


async def test_handlers_begin_no_faster_than_the_rate(shop: PostgresSettings) -> None:
    begun: list[float] = []
    loop = asyncio.get_running_loop()

    async def note(event: Event) -> Result:
        begun.append(loop.time())
        return {}

    async with working(note, shop, rate="20/s", concurrency=8) as one, working(note, shop, rate="20/s") as other:
        for n in range(10):
            one.add(make_event(payload=n))
            other.add(make_event(payload=n))
        await one.outcomes(10)
        await other.outcomes(10)
    assert len(begun) == 20
    assert max(begun) - min(begun) >= 0.9 * 19 / 20
