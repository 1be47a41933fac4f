"""A paused worker: nothing new begins in any of its processes, what runs finishes, and nothing is lost or reordered."""

import asyncio
import json
from collections import defaultdict
from pathlib import Path

import pytest

from bridge.brokers.contract import CONFIRMED
from bridge.brokers.registry import broker_of
from bridge.event import Event
from bridge.settings import PostgresSettings, load
from tests.support.commands import command
from tests.support.daemons import Daemon
from tests.support.events import make_event
from tests.support.messages import execute
from tests.support.scripted_queue import ScriptedQueue
from tests.support.shop import Replies
from tests.support.until import until
from tests.support.working import settings_of, working
from workers import pausing
from workers.handler import Result
from workers.inbox import Inbox
from workers.worker import Worker

SETTINGS = """
name = "shop"
[postgres]
dsn = {dsn}
{sink}
[workers.{name}]
handler = "tests.support.worker_handlers:echo"
subscribe = ["shop.order.placed"]
ordered = {ordered}
concurrency = 4
rate = "100/s"
reply = "shop.rendered"
{more}
[observe]
log_format = "json"
"""


async def pause(dsn: str, name: str) -> None:
    await execute(dsn, "select bridge.set_pause('worker', '', %s, 'ann@host', 'stocktaking')", name)


async def resume(dsn: str, name: str) -> None:
    await execute(dsn, "select bridge.end_pause('worker', '', %s)", name)


@pytest.mark.parametrize("ordered", ["true", "false"])
async def test_two_processes_paused_under_load_lose_and_reorder_nothing_and_stay_paused_over_a_restart(
    shop: PostgresSettings,
    bridge_database: str,
    place: tuple[str, str],
    unique: str,
    replies: Replies,
    tmp_path: Path,
    ordered: str,
) -> None:
    sink_table, more = place
    if ordered == "false":
        more = ""
    # As superuser, so that `pgbridge pause` may use the same file; what the workers' login may is test_inbox.py's.
    text = SETTINGS.format(
        dsn=json.dumps(bridge_database), sink=sink_table, name=unique, more=more, ordered=ordered
    )  # fmt: skip
    processes = [Daemon(tmp_path / f"process-{n}", text, "run", unique, module="workers.cli") for n in range(2)]
    config = ("--config", str(processes[0].config))
    await command("topology", "--apply", *config)
    settings = load(processes[0].config, environ={}).sinks["e"]
    sink = broker_of(settings).sink(settings)
    await sink.open()
    published: dict[str, list[int]] = defaultdict(list)
    try:
        for process in processes:
            process.start()
        for process in processes:
            await asyncio.to_thread(process.wait_for, "worker.started")
        events: list[Event] = []
        for number in range(600):
            key = f"key-{number % 20}"
            published[key].append(number)
            events.append(make_event(topic="shop.order.placed", key=key, payload=[key, number]))
        assert list(await sink.publish(events)) == [CONFIRMED] * len(events)
        await until(lambda: len(replies()) > 50, "they work")
        await pause(bridge_database, unique)
        for process in processes:
            line = await asyncio.to_thread(process.wait_for, "worker.paused", 5.0)
            assert "stocktaking" in line["reason"]
            await asyncio.to_thread(process.wait_for, "worker.resting")
        done = len(replies())
        assert done < 600, "paused in the middle"
        [(open_claims,)] = await execute(
            bridge_database, "select count(*) from bridge.inbox where finished_at is null and claim is not null"
        )
        assert open_claims == 0, "what ran has finished, and nothing else begins"
        assert await asyncio.to_thread(processes[0].stop) == 0
        processes[0].start()
        await asyncio.to_thread(processes[0].wait_for, "worker.resting")
        assert len(replies()) == done
        await command("resume", "--worker", unique, *config)
        await asyncio.to_thread(processes[1].wait_for, "worker.resumed", 5.0)
        await until(lambda: len(replies()) >= 600, "all is done", limit=60)
    finally:
        for process in processes:
            if process.process is not None:
                await asyncio.to_thread(process.stop)
        await sink.close()
    came: dict[str, list[int]] = defaultdict(list)
    for key, number in replies():
        came[key].append(number)
    if ordered == "true":
        assert came == published
    assert {key: sorted(numbers) for key, numbers in came.items()} == published, "each once"


async def test_a_handler_that_runs_finishes_and_what_was_not_begun_goes_back(
    shop: PostgresSettings, bridge_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pausing, "PAUSE_INTERVAL", 0.05)
    begun, finish = asyncio.Event(), asyncio.Event()

    async def run(event: Event) -> Result:
        begun.set()
        await finish.wait()
        return {"of": event.json()}

    async with working(run, shop, concurrency=1) as queue:
        queue.redelivers = True
        queue.add(make_event(payload=1))
        queue.add(make_event(payload=2))
        await begun.wait()
        await pause(bridge_database, "invoices")
        begun.clear()
        await until(lambda: queue.stopped == 1, "it stopped to consume")
        finish.set()
        assert await queue.outcomes(1) == [("ack", None)]
        finish.clear()
        await until(lambda: queue.closed == 1, "it rests")
        assert not begun.is_set()
        assert queue.opened == 1
        await resume(bridge_database, "invoices")
        await begun.wait()
        finish.set()
        assert [verb for verb, _ in await queue.outcomes(2)] == ["ack", "ack"]
        assert queue.opened == 2


async def test_a_worker_that_is_paused_stops_at_once(shop: PostgresSettings, bridge_database: str) -> None:
    await pause(bridge_database, "invoices")

    async def run(event: Event) -> Result:
        raise AssertionError("it is paused")

    queue = ScriptedQueue()
    queue.add(make_event(payload=1))
    one = Worker(
        "invoices", settings_of(), run, lambda: queue, Inbox("invoices", shop, concurrency=1, reply="shop.rendered")
    )
    stop = asyncio.Event()
    task = asyncio.create_task(one.run(stop))
    await until(lambda: one.health().role == "working", "it has started")
    health = one.health()
    assert health.problems == ()
    assert "worker invoices: paused since" in health.paused[0]
    assert queue.opened == 0
    stop.set()
    async with asyncio.timeout(5):
        await task
