"""Order per key from the publish to the reply, over processes that are stopped and killed and handlers that fail."""

import asyncio
import json
import signal
from collections import defaultdict
from pathlib import Path

from bridge.brokers.contract import CONFIRMED
from bridge.brokers.registry import broker_of
from bridge.event import Event
from bridge.settings import PostgresSettings, load
from tests.support.daemons import Daemon, run_command
from tests.support.events import make_event
from tests.support.shop import Replies
from tests.support.until import until

KEYS = 15
SETTINGS = """
name = "shop"
[postgres]
dsn = {dsn}
{sink}
[workers.{name}]
handler = "tests.support.worker_handlers:stumble"
subscribe = ["shop.order.placed"]
ordered = true
concurrency = 8
max_attempts = 100
retry_initial = "20ms"
retry_max = "100ms"
reply = "shop.rendered"
{more}
[observe]
log_format = "json"
"""


async def test_replies_come_in_the_order_of_each_key(
    shop: PostgresSettings, place: tuple[str, str], unique: str, replies: Replies, tmp_path: Path
) -> None:
    sink_table, more = place
    dsn = json.dumps(shop.dsn.get_secret_value())
    text = SETTINGS.format(dsn=dsn, sink=sink_table, name=unique, more=more)
    processes = [Daemon(tmp_path / f"process-{n}", text, "run", unique, module="workers.cli") for n in range(4)]
    done = run_command("topology", "--apply", "--config", str(processes[0].config))
    assert done.returncode == 0, done.stdout + done.stderr
    settings = load(processes[0].config, environ={}).sinks["e"]
    sink = broker_of(settings).sink(settings)
    await sink.open()
    published: dict[str, list[int]] = defaultdict(list)
    count = 0

    async def publish() -> None:
        nonlocal count
        events: list[Event] = []
        for _ in range(120):
            key = f"key-{count % KEYS}"
            published[key].append(count)
            events.append(make_event(topic="shop.order.placed", key=key, payload=[key, count]))
            count += 1
        assert list(await sink.publish(events)) == [CONFIRMED] * len(events)

    async def has(number: int) -> bool:
        return len(await asyncio.to_thread(replies)) >= number

    try:
        for process in processes[:2]:
            process.start()
        for process in processes[:2]:
            await asyncio.to_thread(process.wait_for, "worker.started")
        await publish()
        await until(lambda: has(30), "a part is done")
        if "rabbitmq" in sink_table:  # the others wait for half a minute after a kill, see the fault suite
            processes[0].kill()
        else:
            processes[0].signal(signal.SIGTERM)
        await publish()
        processes[2].start()
        await until(lambda: has(120), "the others go on")
        processes[1].signal(signal.SIGTERM)
        await publish()
        processes[3].start()
        await until(lambda: has(360), "all is done", limit=60)
    finally:
        for process in processes:
            if process.process is not None:
                await asyncio.to_thread(process.stop)
        await sink.close()
    came: dict[str, list[int]] = defaultdict(list)
    for key, number in replies():
        came[key].append(number)
    assert came == published
    assert any(line["action"] == "event.retried" for process in processes for line in process.lines())
