"""From the commit to the worker's handler, over RabbitMQ.

All processes share one machine's clock: pgbench commits at a steady rate and logs when each commit returned to it;
the bridge and the worker run as an operator runs them. `commit` counts from there, `emit()` from inside the
transaction, the commit's own wait for the disk included. The same to a bare consumer, which reads frames and nothing
else, shows the worker's own share.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psycopg
from psycopg import sql

from tests.bench.bridge import running, wait_until
from tests.bench.brokers import declare
from tests.bench.handlers import FILE, RECORD
from tests.bench.rabbit import quorum_queue
from tests.bench.registry import theme
from tests.bench.results import Row, Target, within
from tests.bench.rounds import interleave, say, take_turns
from tests.bench.sql import PGBENCH, prepare
from tests.bench.world import TOPIC, World
from tests.support.daemons import Daemon

BARE = "a bare consumer"
WARM_UP = 1.0
"""Seconds at the beginning that are left out."""
SCRIPT = f"""\\set key random(1, 1000)
\\set n :n + 1
select bridge.emit('{TOPIC}.0', jsonb_build_object('t', extract(epoch from clock_timestamp())::float8,
  'client', :client_id::int, 'n', :n::int, 'text', repeat('x', 120)), 'key-' || :key);
"""
TARGETS: dict[int, tuple[Target, Target]] = {1000: (within(2.0), within(3.0))}
"""For p50 and p99, beside the bare consumer, by events a second."""


class Arrivals(NamedTuple):
    """Milliseconds on the way, of every event behind the warm-up."""

    from_emit: list[float]
    from_commit: list[float]


def percentile(values: Sequence[float], part: float) -> float:
    """The least value that at least `part` of the values do not exceed. Raises ValueError when there are none."""
    if not values:
        raise ValueError("no event arrived")
    return sorted(values)[max(0, -int(-len(values) * part // 1) - 1)]


def emit_at(world: World, dsn: str, rate: int, seconds: float) -> Path:
    """Commits one event a transaction at this rate, from pgbench's own process. Gives its log.

    Raises RuntimeError when it fails.
    """
    folder = world.folder / world.unique("emit")
    folder.mkdir()
    (folder / "script").write_text(SCRIPT)
    clients = 1 if rate <= 100 else 8 if rate <= 1000 else 32
    command = [str(PGBENCH), "-n", "-M", "prepared", "-c", str(clients), "-j", "1", "-R", str(rate), "-D", "n=0"]
    command += ["-T", str(int(seconds)), "-l", "--log-prefix", str(folder / "log"), "-f", str(folder / "script"), dsn]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"pgbench ended with {done.returncode}: {done.stderr[-1500:]}")
    (log,) = folder.glob("log.*")
    return log


def commits(log: Path) -> dict[tuple[int, int], float]:
    """When each commit returned, by client and its count from 1; the columns are those of pgbench's documentation."""
    found = {}
    for line in log.read_text().splitlines():
        client, number, _, _, seconds, microseconds, *_ = line.split()
        found[int(client), int(number)] = int(seconds) + int(microseconds) / 1e6
    return found


def arrivals(records: Path, log: Path) -> Arrivals:
    """Joins what arrived with what was committed."""
    committed = commits(log)
    start = min(committed.values(), default=0.0) + WARM_UP
    counted = [
        ((arrived - emitted) * 1000, (arrived - committed[client, number]) * 1000)
        for emitted, arrived, client, number in RECORD.iter_unpack(records.read_bytes())
        if (client, number) in committed and emitted >= start
    ]
    return Arrivals([emitted for emitted, _ in counted], [committed for _, committed in counted])


def emitted(dsn: str) -> int:
    with psycopg.connect(dsn) as connection:
        row = connection.execute("select count(*) from bridge.outbox").fetchone()
    assert row is not None
    return int(row[0])


def to_handler(world: World, rate: int, seconds: float) -> Arrivals:
    """With the bridge and one worker process, its inbox included."""
    dsn, name = world.database(), world.unique("worker")
    file = world.folder / f"{name}.records"
    sink: dict[str, str | int] = {"type": "rabbitmq", "url": world.rabbitmq.url, "exchange": name}
    worker = f'[workers.{name}]\nhandler = "tests.bench.handlers:note"\nsubscribe = ["bench.#"]\nconcurrency = 32\n'
    declare(world, dsn, sink, more=worker)
    with (
        running(world, dsn, sink, more=worker) as bridge,
        _environment(FILE, str(file)),
        Daemon(world.folder / name, bridge.config.read_text(), "run", name, module="workers.cli") as process,
    ):
        process.wait_for("worker.started")
        log = emit_at(world, dsn, rate, seconds)
        wait_until(lambda: _handled(dsn) >= emitted(dsn), "the last event's handler", 60.0)
        process.stop()
    return arrivals(file, log)


def _handled(dsn: str) -> int:
    with psycopg.connect(dsn) as connection:
        row = connection.execute("select count(*) from bridge.inbox where finished_at is not null").fetchone()
    assert row is not None
    return int(row[0])


class Consumer:
    """A consumer that only looks at the time in each body."""

    def __init__(self, process: subprocess.Popen[str], records: Path) -> None:
        self._process = process
        self.records = records

    def wait_for(self, events: int) -> None:
        """Until it has noted so many. Raises TimeoutError."""
        self._process.send_signal(signal.SIGUSR1)
        size = RECORD.size * events
        wait_until(lambda: self.records.exists() and self.records.stat().st_size >= size, "the last event", 60.0)


@contextmanager
def consuming(world: World, url: str, queue: str) -> Iterator[Consumer]:
    """A process that consumes this queue as long as the block runs."""
    records = world.folder / f"{world.unique('consumer')}.records"
    command = [sys.executable, "-m", "tests.bench.peers.consumer", url, queue, str(records)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "consuming":
            raise RuntimeError("the consumer did not start")
        yield Consumer(process, records)
    finally:
        process.kill()
        process.wait()


def to_consumer(world: World, rate: int, seconds: float) -> Arrivals:
    """With the bridge and a consumer that only looks at the time in each body."""
    dsn = world.database()
    with (
        quorum_queue(world) as target,
        running(world, dsn, target.sink),
        consuming(world, target.url, target.queue) as consumer,
    ):
        log = emit_at(world, dsn, rate, seconds)
        consumer.wait_for(emitted(dsn))
    return arrivals(consumer.records, log)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@theme("latency")
def latency(world: World) -> Sequence[Row]:
    """At 10, 300 and 1,000 events a second to the handler; at 10,000, beyond one worker process, to the bare consumer.

    The emit rate is pgbench's; arrivals are those of a Poisson process.
    """
    rows: list[Row] = []
    seconds = 2.0 if world.quick else 8.0
    for rate in (10, 1000) if world.quick else (10, 300, 1000):
        handler, consumer = partial(to_handler, world, rate, seconds), partial(to_consumer, world, rate, seconds)
        rows += _compare(world, rate, {"ours": handler, BARE: consumer})
    rows += _compare(world, 10_000, {"ours": partial(to_consumer, world, 10_000, seconds)})
    return rows


def _compare(world: World, rate: int, contenders: dict[str, Callable[[], Arrivals]]) -> list[Row]:
    """Rows for p50 and p99, from the commit and from emit()."""
    say(f"  {rate} events a second")
    found = take_turns(world.rounds, contenders, lambda one: percentile(one.from_commit, 0.5))
    where = "handler" if BARE in contenders else "consumer"
    peer = BARE if BARE in contenders else ""
    rows = []
    for start in ("commit", "emit()"):
        for index, part in enumerate((0.5, 0.99)):
            target = TARGETS[rate][index] if rate in TARGETS and start == "commit" else None
            what = f"latency: {rate}/s, {start} to {where}, p{part * 100:g}"
            rows.append(found.each(partial(_percentile, start, part)).row(what, "ms", peer, target))
    return rows


def _percentile(start: str, part: float, one: Arrivals) -> float:
    return percentile(one.from_commit if start == "commit" else one.from_emit, part)


RING = """
insert into {} (customer, amount, note, placed_at) values (1, 12.5, '', clock_timestamp())
returning extract(epoch from placed_at)::float8
"""


@theme("doorbell")
def doorbell(world: World) -> Sequence[Row]:
    """From emit(), while a bridge sleeps, to the NOTIFY that would wake it; beside an insert with a NOTIFY."""
    dsn = prepare(world)
    count = 50 if world.quick else 500
    with psycopg.connect(dsn, autocommit=True) as ringer, psycopg.connect(dsn, autocommit=True) as listener:
        ringer.execute("update bridge.bell set asleep = true")
        listener.execute("listen bridge_bell")
        listener.execute("listen bench_orders")

        def p50(table: str) -> float:
            insert = sql.SQL(RING).format(sql.Identifier(table))
            taken = []
            for _ in range(count):
                row = ringer.execute(insert, prepare=True).fetchone()
                heard = [time.time() for _ in listener.notifies(timeout=5.0, stop_after=1)]
                assert row is not None
                taken.append((heard[0] - float(row[0])) * 1000)
            return percentile(taken, 0.5)

        found = interleave(world.rounds, {"ours": lambda: p50("emit"), "insert + NOTIFY": lambda: p50("bare_notify")})
    return [found.row("doorbell: emit() to NOTIFY, p50", "ms", "insert + NOTIFY")]
