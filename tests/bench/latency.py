"""From the event's time, which the database takes just before the commit, to the worker's handler, over RabbitMQ.

All processes share one machine's clock: pgbench commits at a steady rate, the bridge and the worker run as an
operator runs them. The same to a bare consumer, which reads frames and nothing else, shows the worker's own share.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psycopg

from tests.bench.bridge import running, wait_until
from tests.bench.brokers import declare
from tests.bench.handlers import FILE, RECORD
from tests.bench.rabbit import quorum_queue
from tests.bench.registry import theme
from tests.bench.results import Row, Target, at_most
from tests.bench.rounds import interleave, say
from tests.bench.sql import PGBENCH
from tests.bench.world import TOPIC, World
from tests.servers.daemons import Daemon

WARM_UP = 1.0
"""Seconds at the beginning that are left out."""
SCRIPT = f"""\\set key random(1, 1000)
select bridge.emit('{TOPIC}.0', jsonb_build_object('t', extract(epoch from clock_timestamp())::float8,
  'text', repeat('x', 150)), 'key-' || :key);
"""
TARGETS: dict[int, tuple[Target, Target]] = {1000: (at_most(3.0), at_most(15.0))}
"""For p50 and p99, in ms, by events a second."""

Latencies = list[float]


def percentile(values: Sequence[float], part: float) -> float:
    """The least value that at least `part` of the values do not exceed. Raises ValueError when there are none."""
    if not values:
        raise ValueError("no event arrived")
    return sorted(values)[max(0, -int(-len(values) * part // 1) - 1)]


def emit_at(world: World, dsn: str, rate: int, seconds: float) -> None:
    """Commits one event a transaction at this rate, from pgbench's own process. Raises RuntimeError when it fails."""
    script = world.folder / "emit.pgbench"
    script.write_text(SCRIPT)
    clients = 1 if rate <= 100 else 8 if rate <= 1000 else 32
    command = [str(PGBENCH), "-n", "-M", "prepared", "-c", str(clients), "-j", "1", "-R", str(rate)]
    command += ["-T", str(int(seconds)), "-f", str(script), dsn]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"pgbench ended with {done.returncode}: {done.stderr[-1500:]}")


def _read(file: Path) -> Latencies:
    """Milliseconds, without the warm-up."""
    records = list(RECORD.iter_unpack(file.read_bytes())) if file.exists() else []
    first = min((emitted for emitted, _ in records), default=0.0)
    return [(arrived - emitted) * 1000 for emitted, arrived in records if emitted >= first + WARM_UP]


def _emitted(dsn: str) -> int:
    with psycopg.connect(dsn) as connection:
        row = connection.execute("select count(*) from bridge.outbox").fetchone()
    assert row is not None
    return int(row[0])


def to_handler(world: World, rate: int, seconds: float) -> Latencies:
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
        emit_at(world, dsn, rate, seconds)
        wait_until(lambda: _handled(dsn) >= _emitted(dsn), "the last event's handler", 60.0)
        process.stop()
    return _read(file)


def _handled(dsn: str) -> int:
    with psycopg.connect(dsn) as connection:
        row = connection.execute("select count(*) from bridge.inbox where finished_at is not null").fetchone()
    assert row is not None
    return int(row[0])


def to_consumer(world: World, rate: int, seconds: float) -> Latencies:
    """With the bridge and a consumer that only looks at the time in each body."""
    dsn, name = world.database(), world.unique("consumer")
    file = world.folder / f"{name}.records"
    with quorum_queue(world) as target, running(world, dsn, target.sink):
        command = [sys.executable, "-m", "tests.bench.peers.consumer", target.url, target.queue, str(file)]
        consumer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert consumer.stdout is not None
            if consumer.stdout.readline().strip() != "consuming":
                raise RuntimeError("the consumer did not start")
            emit_at(world, dsn, rate, seconds)
            emitted = _emitted(dsn)
            consumer.send_signal(signal.SIGUSR1)
            wait_until(lambda: file.exists() and file.stat().st_size >= RECORD.size * emitted, "the last event", 60.0)
        finally:
            consumer.kill()
            consumer.wait()
    return _read(file)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@theme("latency")
def latency(world: World) -> Sequence[Row]:
    """At 10 and 1,000 events a second to the handler; at 10,000, beyond one worker process, to the bare consumer.

    The emit rate is pgbench's; arrivals are those of a Poisson process.
    """
    rows: list[Row] = []
    seconds = 4.0 if world.quick else 15.0
    for rate in (10, 1000):
        handler, consumer = partial(to_handler, world, rate, seconds), partial(to_consumer, world, rate, seconds)
        rows += _compare(world, rate, {"ours": handler, BARE: consumer})
    rows += _compare(world, 10_000, {"ours": partial(to_consumer, world, 10_000, seconds)})
    return rows


BARE = "a bare consumer"


def _compare(world: World, rate: int, contenders: dict[str, Callable[[], Latencies]]) -> list[Row]:
    """One row for p50 and one for p99."""
    high: dict[str, list[float]] = {name: [] for name in contenders}

    def p50(name: str) -> float:
        values = contenders[name]()
        high[name].append(percentile(values, 0.99))
        return statistics.median(values)

    say(f"  {rate} events a second")
    found = interleave(world.rounds, {name: partial(p50, name) for name in contenders})
    where = "handler" if BARE in contenders else BARE
    error = "; ".join(f"{name}: {told}" for name, told in found.errors.items())
    peer = BARE if BARE in contenders else ""
    both = (found.values, high)
    return [
        Row(
            f"latency: {rate}/s to {where}, {what}",
            "ms",
            values["ours"],
            values.get(BARE, ()),
            peer,
            TARGETS[rate][index] if rate in TARGETS else None,
            error,
        )
        for index, (what, values) in enumerate(zip(("p50", "p99"), both, strict=True))
    ]


@theme("doorbell")
def doorbell(world: World) -> Sequence[Row]:
    """From emit(), while a bridge sleeps, to the NOTIFY that would wake it; beside a bare pg_notify."""
    dsn = world.database()
    count = 50 if world.quick else 500
    with psycopg.connect(dsn, autocommit=True) as ringer, psycopg.connect(dsn, autocommit=True) as listener:
        ringer.execute("insert into bridge.bell (name, asleep) values ('bench', true)")
        listener.execute("listen bridge_bell")
        now = "extract(epoch from clock_timestamp())::float8"

        def p50(ring: str) -> float:
            taken = []
            for _ in range(count):
                row = ringer.execute(f"select {now}, {ring}", prepare=True).fetchone()
                heard = [time.time() for _ in listener.notifies(timeout=5.0, stop_after=1)]
                assert row is not None
                taken.append((heard[0] - float(row[0])) * 1000)
            return statistics.median(taken)

        found = interleave(
            world.rounds,
            {
                "ours": lambda: p50("bridge.emit('bench.ring', '{}'::jsonb)"),
                "pg_notify": lambda: p50("pg_notify('bridge_bell', '')"),
            },
        )
    return [found.row("doorbell: emit() to NOTIFY, p50", "ms", "pg_notify")]
