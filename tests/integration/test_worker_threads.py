"""Handlers that are plain functions, and run in threads of the worker."""

import asyncio
import threading
import time

from bridge.event import Event
from bridge.settings import PostgresSettings
from tests.support.events import make_event
from tests.support.until import until
from tests.support.working import replies, working
from workers.claim import NotNow
from workers.effects import effect
from workers.handler import Result, handler
from workers.inbox import Inbox


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
