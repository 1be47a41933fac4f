"""Whole worker processes, started as an operator starts them, over a real broker and a real database."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aio_pika
import psycopg
import pytest

from bridge.brokers.registry import broker_of
from bridge.event import AMQP_PREFIX, Event, attributes
from bridge.settings import PostgresSettings, Settings, load
from tests.support.events import make_event
from tests.support.servers import RabbitMQServer
from tests.support.until import until
from workers.build import subscription


class Processes:
    """Worker processes of one settings file; all are ended with the test."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        log = self.config.with_name(f"worker-{len(self.running)}.log").open("wb")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", "workers.cli", "run", "echo", "--config", str(self.config)], stderr=log
            )
        self.running.append(process)
        return process

    def logs(self) -> str:
        return "\n".join(file.read_text() for file in sorted(self.config.parent.glob("worker-*.log")))


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path / "bridge.toml")
    yield made
    for process in made.running:
        if process.poll() is None:
            process.kill()
        process.wait()


def write_settings(path: Path, shop: PostgresSettings, url: str, exchange: str) -> Settings:
    path.write_text(
        f"""
        name = "shop"
        [postgres]
        dsn = {json.dumps(shop.dsn.get_secret_value())}
        [sinks.events]
        type = "rabbitmq"
        url = {json.dumps(url)}
        exchange = "{exchange}"
        [workers.echo]
        handler = "tests.support.worker_handlers:echo"
        concurrency = 8
        prefetch = 16
        reply = "shop.rendered"
        """
    )
    return load(path, environ={})


async def publish(url: str, exchange_name: str, events: Sequence[Event]) -> None:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange(exchange_name)
        for event in events:
            message = aio_pika.Message(
                event.payload,
                message_id=event.id,
                content_type=event.content_type,
                headers=dict(attributes(event, AMQP_PREFIX)),
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            )
            await exchange.publish(message, event.topic, mandatory=True)


def replies(dsn: str) -> list[int]:
    with psycopg.connect(dsn) as connection:
        return [row[0]["of"] for row in connection.execute("SELECT result FROM shop.invoice").fetchall()]


@pytest.mark.rabbitmq
async def test_every_event_is_replied_exactly_once_although_workers_are_killed(
    shop: PostgresSettings, bridge_database: str, rabbitmq: RabbitMQServer, unique: str, processes: Processes
) -> None:
    async with await aio_pika.connect(rabbitmq.url) as connection:
        channel = await connection.channel()
        await channel.declare_exchange(unique, "topic", durable=True)
    settings = write_settings(processes.config, shop, rabbitmq.url, unique)
    own = settings.workers["echo"]
    queue: Any = broker_of(settings.sinks["events"]).queue(
        settings.sinks["events"], subscription("echo", own, ["shop.order.placed"])
    )
    await queue.topology(apply=True)

    victims = [processes.start(), processes.start()]
    # Else the first might do it all before the second has started.
    await until(lambda: processes.logs().count('"worker.started"') == 2)
    await publish(
        rabbitmq.url, unique, [make_event(topic="shop.order.placed", payload=number) for number in range(400)]
    )
    for number, victim in enumerate(victims, 1):
        await until(lambda least=100 * number: len(replies(bridge_database)) >= least, limit=60)  # type: ignore[misc]
        victim.send_signal(signal.SIGKILL)
        processes.start()
    await until(lambda: len(set(replies(bridge_database))) == 400, limit=60)
    # A process that is still starting has no handler for the signal yet.
    await until(lambda: processes.logs().count('"worker.started"') == 4)

    for process in processes.running[2:]:
        process.terminate()
    codes = [await asyncio.to_thread(process.wait, 30) for process in processes.running[2:]]
    assert codes == [0, 0], processes.logs()
    assert Counter(replies(bridge_database)) == Counter(range(400))
    assert "worker.stopped" in processes.logs()


def run_command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "workers.cli", *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_the_workers_are_listed_for_people_and_for_programs(shop: PostgresSettings, tmp_path: Path) -> None:
    write_settings(tmp_path / "bridge.toml", shop, "amqp://guest@127.0.0.1:1", "events")
    listed = run_command("list", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert "tests.support.worker_handlers:echo" in listed.stdout
    assert json.loads(run_command("list", "--json", cwd=tmp_path).stdout) == [
        {
            "name": "echo",
            "handler": "tests.support.worker_handlers:echo",
            "topics": ["shop.order.placed"],
            "sink": "events",
            "concurrency": 8,
            "reply": "shop.rendered",
        }
    ]


@pytest.mark.parametrize(
    ("words", "change", "code", "said"),
    [
        (["run", "ecko"], None, 2, "there is no worker 'ecko' in the settings; known: echo"),
        (["run"], None, 2, "Missing argument 'NAME'"),
        (["run", "echo"], ("worker_handlers:echo", "worker_handlers:ecko"), 78, "has no @handler named ecko"),
        (["run", "echo"], ("concurrency = 8", "options = {x = 1}"), 78, "workers.echo.options.x: unknown key"),
        (["run", "echo"], ("concurrency = 8", "concurency = 8"), 78, "did you mean concurrency?"),
        (["run", "echo"], None, 69, "127.0.0.1"),
        (["run", "echo"], ("shop.rendered", "shop.missing"), 69, "there is no function shop.missing(uuid, jsonb)"),
    ],
)
def test_a_mistake_ends_with_its_exit_code_and_one_plain_message(
    shop: PostgresSettings, tmp_path: Path, words: list[str], change: tuple[str, str] | None, code: int, said: str
) -> None:
    config = tmp_path / "bridge.toml"
    write_settings(config, shop, "amqp://guest:s3cret@127.0.0.1:1", "events")
    if change is not None:
        config.write_text(config.read_text().replace(*change))
    ended = run_command(*words, cwd=tmp_path)
    assert ended.returncode == code, ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "s3cret" not in ended.stderr
