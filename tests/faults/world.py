"""Everything that runs: servers, proxies before them, two bridges of one name, two processes of each of three workers,
writers, the audits."""

import asyncio
import contextlib
import json
import random
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psycopg

from bridge.brokers.contract import Letter, Verdict
from bridge.brokers.registry import broker_of
from bridge.postgres.schema import migrate
from bridge.settings.load import load as load_settings
from tests.faults.audit import Audit
from tests.faults.brokers import SECOND, Broker
from tests.faults.fates import MAX_ATTEMPTS, TIMEOUT
from tests.faults.health import Watch
from tests.faults.load import SCHEMA, Ledger, Writer
from tests.faults.outcomes import ORDERED, WORKERS
from tests.support.daemons import Daemon, run_command
from tests.support.proxy import Proxy
from tests.support.servers import PostgresServer, free_port

KEYS = [f"key-{number}" for number in range(20)]
WRITERS = 5
POSTGRES = {"max_connections": "90"}
"""Settings of the server: few enough slots that they can be used up quickly."""
_SETTINGS = """
name = "faults"
[postgres]
dsn = "{dsn}"
connect_timeout = 3
[outbox]
page_size = 50
[sinks.events]
{events}
publish_timeout = 5
[sinks.second]
{second}
publish_timeout = 5
pipelined = false
[[routes]]
topic = "#"
sink = "events"
{routes}
"""
_WORKER = """
[workers.{worker}]
handler = "tests.faults.handlers:{worker}"
subscribe = {topics}
sink = "events"
concurrency = 8
prefetch = 16
timeout = {timeout}
max_attempts = {max_attempts}
retry_initial = "200ms"
retry_max = "1s"
reply = "shop.counted"
listen = "127.0.0.1:{port}"
{more}
[workers.{worker}.options]
worker = "{worker}"
notes = "{notes}"
"""
_ROUTE = """[[routes]]
topic = "{topic}"
sink = "second"
"""
_ENDS = (0, 69, 128 + signal.SIGTERM, -signal.SIGKILL, -signal.SIGTERM)
"""Exit codes of a daemon that was stopped (once or twice), killed, or could not reach a server at its start."""


@dataclass
class World:
    """What faults are done to."""

    postgres: PostgresServer
    broker: Broker
    database_wire: Proxy
    broker_wire: Proxy
    second_wire: Proxy
    worker_wire: Proxy
    """Between the workers and the broker; the others are the bridges'."""
    bridges: list[Daemon]
    workers: list[Daemon]
    watch: Watch
    notes: Path
    """The folder of the workers' notes, see `handlers.Place`."""
    ledger: Ledger
    audits: Sequence[Audit]
    """The first takes everything."""
    dsn: str
    """Past the proxy, as writers and the audits connect."""
    random: random.Random
    busy: set[str] = field(default_factory=set)
    """Targets of faults that are going on."""
    wrong_ends: list[str] = field(default_factory=list)
    """Daemons that ended as they never should: by a traceback, or saying that our settings are wrong."""
    workers_stop: asyncio.Event = field(default_factory=asyncio.Event)
    keeping_workers: list[asyncio.Task[None]] = field(default_factory=list)
    _names: int = 0

    async def stop_workers(self) -> None:
        """Returns once they have stopped."""
        self.workers_stop.set()
        await asyncio.gather(*self.keeping_workers)

    async def letters(self) -> dict[str, list[Letter]]:
        """The dead letters of each worker."""
        sink = load_settings(self.workers[0].config, {}).sinks["events"]
        found: dict[str, list[Letter]] = {}
        for worker in WORKERS:
            found[worker] = []
            dead = broker_of(sink).dead_letters(sink, worker)
            assert dead is not None
            await dead.walk(partial(_keep, found[worker]))
        return found

    def next_name(self, prefix: str) -> str:
        """A name that no other key begins with."""
        self._names += 1
        return f"{prefix}-{self._names}"

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

    def dead_letters(self) -> set[tuple[str, str]]:
        """Event and sink of what a bridge gave up; the sink is empty for what no route took."""
        with psycopg.connect(self.dsn, connect_timeout=5) as connection:
            found = connection.execute("select event_id::text, coalesce(sink, '') from bridge.dead_letter").fetchall()
        return {(str(event_id), str(sink)) for event_id, sink in found}


async def _keep(into: list[Letter], letter: Letter) -> Verdict:
    into.append(letter)
    return "keep"


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


async def _keep_running(world: World, daemon: Daemon, stop: asyncio.Event) -> None:
    """As systemd with Restart=always."""
    while not stop.is_set():
        code = None if daemon.process is None else daemon.process.poll()
        if code not in (None, *_ENDS):
            world.wrong_ends.append(f"{daemon.folder.name}: {code}")
        if daemon.process is None or code is not None:
            daemon.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await stop.wait()
    if daemon.process is not None:
        send(daemon, signal.SIGCONT)
        if (code := await asyncio.to_thread(daemon.stop, 60.0)) not in _ENDS:
            world.wrong_ends.append(f"{daemon.folder.name}: {code} at its stop")


def _workers(port: int, notes: Path, ordered: str) -> str:
    """Their part of the settings; of a process that listens at this port. `ordered`: what makes a worker ordered."""
    return "".join(
        _WORKER.format(
            worker=worker,
            topics=json.dumps(topics),
            timeout=TIMEOUT,
            max_attempts=MAX_ATTEMPTS,
            port=port,
            notes=notes,
            more=ordered if worker == ORDERED else "",
        )
        for worker, topics in WORKERS.items()
    )


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
    postgres: PostgresServer, broker: Broker, folder: Path, seed: int, pause: float = 0.04
) -> AsyncIterator[tuple[World, Callable[[], None]]]:
    """The world under load, and what ends the load; the servers are the caller's."""
    dsn = postgres.create_database("faults")
    await asyncio.to_thread(migrate, dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(SCHEMA)
        for key in KEYS:
            connection.execute("insert into shop.counter values (%s)", (key,))
    server = broker.server
    async with (
        Proxy(postgres.host, postgres.port) as database_wire,
        Proxy(server.host, server.port) as broker_wire,
        Proxy(server.host, server.port) as second_wire,
        Proxy(server.host, server.port) as worker_wire,
    ):
        settings = partial(
            _SETTINGS.format,
            dsn=dsn.replace(str(postgres.port), str(database_wire.port)),
            routes="".join(_ROUTE.format(topic=topic) for topic in SECOND),
            second=broker.settings("second", second_wire.port),
        )
        for_bridges = settings(events=broker.settings("events", broker_wire.port))
        for_workers = settings(events=broker.settings("events", worker_wire.port))
        bridges = [Daemon(folder / f"bridge-{number}", for_bridges) for number in (1, 2)]
        ports = {f"{worker}-{number}": free_port() for worker in WORKERS for number in (1, 2)}
        notes = folder / "notes"
        (notes / "begun").mkdir(parents=True)
        (notes / "shipped").touch()
        workers = [
            Daemon(
                folder / name,
                for_workers + _workers(port, notes, broker.ordered),
                "run",
                name[:-2],
                module="workers.cli",
            )
            for name, port in ports.items()
        ]
        declared = await asyncio.to_thread(run_command, "topology", "--apply", "--config", str(workers[0].config))
        assert declared.returncode == 0, declared.stdout + declared.stderr
        ledger = Ledger()
        audits = broker.audits()
        world = World(
            postgres,
            broker,
            database_wire,
            broker_wire,
            second_wire,
            worker_wire,
            bridges,
            workers,
            Watch(ports),
            notes,
            ledger,
            audits,
            dsn,
            random.Random(seed),
        )
        stop, load_ended = asyncio.Event(), asyncio.Event()
        writers = [Writer(dsn, ledger, KEYS, seed * 1000 + number, pause) for number in range(WRITERS)]
        async with _none_left_behind(*bridges, *workers), asyncio.TaskGroup() as tasks:
            taking = [tasks.create_task(audit.run()) for audit in audits]
            for audit in audits:
                await audit.ready.wait()
            watching = tasks.create_task(world.watch.run())
            keeping = [tasks.create_task(_keep_running(world, daemon, stop)) for daemon in bridges]
            world.keeping_workers += [
                tasks.create_task(_keep_running(world, daemon, world.workers_stop)) for daemon in workers
            ]
            writing = [tasks.create_task(writer.run(load_ended)) for writer in writers]
            try:
                yield world, load_ended.set
            finally:
                load_ended.set()
                stop.set()
                world.workers_stop.set()
                await asyncio.wait([*keeping, *world.keeping_workers, *writing])
                for task in (*taking, watching):
                    task.cancel()
