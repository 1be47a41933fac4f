"""A worker over a queue that the test scripts, with its inbox on a real PostgreSQL."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import psycopg

from bridge.event import Event
from bridge.settings import PostgresSettings, WorkerSettings
from tests.support.scripted_queue import ScriptedQueue
from workers.handler import Result, Run
from workers.inbox import Inbox
from workers.metrics import REGISTRY
from workers.traced import AttemptSpans
from workers.worker import Worker


def settings_of(**values: Any) -> WorkerSettings:
    return WorkerSettings(handler="a:b", **{"shutdown_limit": "10s", "retry_initial": "1s", **values})


@contextlib.asynccontextmanager
async def working(
    run: Run,
    shop: PostgresSettings,
    queue: ScriptedQueue | None = None,
    *,
    spans: AttemptSpans | None = None,
    **values: Any,
) -> AsyncIterator[ScriptedQueue]:
    """A worker that runs until the block ends, and then must stop in order."""
    settings = settings_of(**values)
    queue = queue or ScriptedQueue()
    inbox = Inbox("invoices", shop, concurrency=settings.concurrency, reply="shop.rendered", holds=settings.holds)
    worker = Worker("invoices", settings, run, lambda: queue, inbox, spans=spans)
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


def figure(name: str, worker: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"pgbridge_worker_{name}", {"worker": worker, **labels})
