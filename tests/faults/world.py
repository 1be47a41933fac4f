"""Everything that runs: servers, proxies before them, two bridges of one name, two workers, writers, the audit."""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from bridge.postgres.schema import migrate
from tests.faults.audit import EXCHANGE, Audit
from tests.faults.load import SCHEMA, Ledger, Writer
from tests.support.daemons import Daemon, run_command
from tests.support.proxy import Proxy
from tests.support.servers import PostgresServer, RabbitMQServer

KEYS = [f"key-{number}" for number in range(20)]
WRITERS = 5
_SETTINGS = """
name = "faults"
[postgres]
dsn = "{dsn}"
connect_timeout = 3
[outbox]
page_size = 50
[sinks.events]
type = "rabbitmq"
url = "{url}"
exchange = "{exchange}"
publish_timeout = 5
heartbeat = 4
[[routes]]
topic = "#"
sink = "events"
[workers.count]
handler = "tests.faults.handlers:count"
concurrency = 8
prefetch = 16
max_attempts = 100
retry_initial = "200ms"
retry_max = "2s"
reply = "shop.counted"
"""


@dataclass
class World:
    """What faults are done to."""

    postgres: PostgresServer
    rabbitmq: RabbitMQServer
    database_wire: Proxy
    broker_wire: Proxy
    bridges: list[Daemon]
    workers: list[Daemon]
    ledger: Ledger
    audit: Audit
    dsn: str
    """Past the proxy, as writers and the audit connect."""
    random: random.Random
    busy: set[str] = field(default_factory=set)
    """Targets of faults that are going on."""

    def leader(self) -> Daemon:
        """The bridge that leads, as far as the database can tell; otherwise any."""
        try:
            with psycopg.connect(self.dsn, connect_timeout=2, options="-c statement_timeout=2000") as connection:
                row = connection.execute("select who from bridge.leader where name = 'faults'").fetchone()
        except psycopg.OperationalError:
            row = None
        pid = str(row[0]).rpartition(":")[2] if row else ""
        running = [bridge for bridge in self.bridges if bridge.process and bridge.process.poll() is None]
        leading = [bridge for bridge in running if bridge.process and str(bridge.process.pid) == pid]
        return (leading or running or self.bridges)[0]

    def replies(self) -> list[str]:
        """The events whose reply has run, once for each run."""
        with psycopg.connect(self.dsn, connect_timeout=5) as connection:
            return [str(row[0]) for row in connection.execute("select event_id from shop.reply").fetchall()]

    def dead_letters(self) -> int:
        """Events that a bridge gave up."""
        with psycopg.connect(self.dsn) as connection:
            row = connection.execute("select count(*) from bridge.dead_letter").fetchone()
        return int(row[0]) if row else 0


def send(daemon: Daemon, number: signal.Signals) -> int | None:
    """Signals a process if it runs; its pid."""
    process = daemon.process
    if process is None or process.poll() is not None:
        return None
    process.send_signal(number)
    return process.pid


def wake(daemon: Daemon, pid: int | None) -> None:
    """Lets a frozen process go on, unless it is another one by now."""
    if pid is not None and daemon.process is not None and daemon.process.pid == pid:
        send(daemon, signal.SIGCONT)


async def _keep_running(daemon: Daemon, stop: asyncio.Event) -> None:
    """As systemd with Restart=always."""
    while not stop.is_set():
        if daemon.process is None or daemon.process.poll() is not None:
            daemon.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await stop.wait()
    if daemon.process is not None:
        send(daemon, signal.SIGCONT)
        await asyncio.to_thread(daemon.stop, 60.0)


@contextlib.asynccontextmanager
async def _none_left_behind(*daemons: Daemon) -> AsyncIterator[None]:
    """Whatever ends the body, no process outlives it."""
    try:
        yield
    finally:
        for daemon in daemons:
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.kill()


@contextlib.asynccontextmanager
async def running(
    postgres: PostgresServer, rabbitmq: RabbitMQServer, folder: Path, seed: int, pause: float = 0.04
) -> AsyncIterator[tuple[World, Callable[[], None]]]:
    """The world under load, and what ends the load; the servers are the caller's."""
    dsn = postgres.create_database("faults")
    await asyncio.to_thread(migrate, dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(SCHEMA)
        for key in KEYS:
            connection.execute("insert into shop.counter values (%s)", (key,))
    async with (
        Proxy(postgres.host, postgres.port) as database_wire,
        Proxy(rabbitmq.host, rabbitmq.port) as broker_wire,
    ):
        exchange = f"{EXCHANGE}-{os.getpid()}"
        text = _SETTINGS.format(
            dsn=dsn.replace(str(postgres.port), str(database_wire.port)),
            url=rabbitmq.url.replace(str(rabbitmq.port), str(broker_wire.port)),
            exchange=exchange,
        )
        bridges = [Daemon(folder / f"bridge-{number}", text) for number in (1, 2)]
        workers = [Daemon(folder / f"worker-{number}", text, "run", "count", module="workers.cli") for number in (1, 2)]
        declared = await asyncio.to_thread(run_command, "topology", "--apply", "--config", str(bridges[0].config))
        assert declared.returncode == 0, declared.stdout + declared.stderr
        ledger = Ledger()
        audit = Audit(rabbitmq.url, exchange, f"{exchange}-audit")
        world = World(
            postgres,
            rabbitmq,
            database_wire,
            broker_wire,
            bridges,
            workers,
            ledger,
            audit,
            dsn,
            random.Random(seed),
        )
        stop, load_ended = asyncio.Event(), asyncio.Event()
        writers = [Writer(dsn, ledger, KEYS, seed * 1000 + number, pause) for number in range(WRITERS)]
        async with _none_left_behind(*bridges, *workers), asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(audit.run())
            await audit.ready.wait()
            keeping = [tasks.create_task(_keep_running(daemon, stop)) for daemon in (*bridges, *workers)]
            writing = [tasks.create_task(writer.run(load_ended)) for writer in writers]
            try:
                yield world, load_ended.set
            finally:
                load_ended.set()
                stop.set()
                await asyncio.wait([*keeping, *writing])
                taking.cancel()
