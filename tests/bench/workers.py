"""What a worker costs: an empty handler over a full queue of RabbitMQ, beside other consumers that do the same inserts.

Every contender meets a queue of its own that the bridge has filled, and a database of its own. What it has finished is
read from there: nobody measures himself.
"""

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import LiteralString

import psycopg
from psycopg import sql

from tests.bench.bridge import drain, settings_of
from tests.bench.brokers import declare
from tests.bench.peers import run
from tests.bench.peers.inserts import CONCURRENCY, PREFETCH
from tests.bench.processor import Look, microseconds, processor_time
from tests.bench.rabbit import Target, quorum_queue
from tests.bench.registry import theme
from tests.bench.results import Interleaved, Row, at_least, at_most
from tests.bench.rounds import take_turns
from tests.bench.world import Log, World
from tests.support.daemons import Daemon

SETUP = """
create schema bench;
create table bench.replies (event_id uuid primary key, result jsonb not null);
create function bench.reply(event_id uuid, result jsonb) returns void language sql as
  'insert into bench.replies values ($1, $2)';
-- The peers' inbox; with room in its pages, as ours has.
create table bench.inbox (
  worker text not null, event_id uuid not null,
  started_at timestamptz not null default clock_timestamp(), finished_at timestamptz,
  primary key (worker, event_id)) with (fillfactor = 80);
"""
WORKER = """
[workers.{name}]
handler = "tests.bench.handlers:{handler}"
subscribe = ["bench.#"]
concurrency = {concurrency}
prefetch = {prefetch}
"""
OURS, PEERS = "bridge.inbox", "bench.inbox"
"""Where who notes what he has finished."""
FASTSTREAM, AIO_PIKA = "FastStream", "aio-pika"
LIMIT = 180.0
"""Seconds that a contender may take."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run our worker; the peers beside it differ only in the reply."""

    name: str
    reply: bool
    faststream: float
    """Times the peer's rate, at least."""
    aio_pika: float
    processor_time: float
    """Microseconds an event, at most."""
    settings: str = ""
    """Further lines of the worker's table."""


VARIANTS = (
    Variant("without a reply", False, 4.0, 2.5, 200.0),
    Variant("with a reply", True, 3.0, 2.0, 300.0),
    Variant("with a reply, effects = false", True, 3.0, 2.0, 300.0, "effects = false\n"),
)


@dataclass(frozen=True, slots=True)
class Consumed:
    """One queue, consumed to its end."""

    rate: float
    """Events a second, from the first that was finished to the last, by the database's clock."""
    processor_time: float
    """Microseconds an event of the process that consumed."""


def ours(world: World, log: Log, variant: Variant) -> Consumed:
    """`pgbridge-worker run`, as an operator runs it."""
    more = variant.settings + ('reply = "bench.reply"\n' if variant.reply else "")
    dsn, consumed = consume(world, log, "ok" if variant.reply else "nothing", more)
    _expect_replies(dsn, log.events if variant.reply else 0)
    return consumed


def consume(world: World, log: Log, handler: str, more: str, left: int = 0) -> tuple[str, Consumed]:
    """One process of ours over a queue of its own, with this handler of handlers.py; `more`: further settings. `left`
    events are not finished: they are in hand at the end, and in the queue once the process has stopped.

    Gives the database, too.
    """
    dsn, name = _database(world), world.unique("worker")
    queue = Target(world.rabbitmq.url, exchange=name, queue=name)
    more = WORKER.format(name=name, handler=handler, concurrency=CONCURRENCY, prefetch=PREFETCH) + more
    declare(world, dsn, queue.sink, more=more)
    drain(world, log, queue.sink)
    queue.expect(log.events)
    settings = settings_of("bench", dsn, queue.sink) + more
    with Daemon(world.folder / name, settings, "run", name, module="workers.cli") as process:
        assert process.process is not None
        consumed = _watch(dsn, OURS, log.events - left, process.process, process.log)
        code = process.stop()
        if code != 0:
            raise RuntimeError(f"the worker ended with {code}: {process.log.read_text()[-1500:]}")
    queue.expect(left)
    return dsn, consumed


def peer(world: World, log: Log, module: str, reply: bool) -> Consumed:
    """A consumer of peers/, in the peers' venv."""
    dsn = _database(world)
    output = world.folder / f"{world.unique(module)}.log"
    with quorum_queue(world) as queue:
        drain(world, log, queue.sink)
        queue.expect(log.events)
        way = "reply" if reply else "none"
        with run.running(module, queue.url, queue.queue, dsn, way, log=output) as process:
            consumed = _watch(dsn, PEERS, log.events, process, output)
        queue.expect(0)
    _expect_replies(dsn, log.events if reply else 0)
    return consumed


def _database(world: World) -> str:
    dsn = world.database()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(SETUP)
    return dsn


def _watch(dsn: str, inbox: LiteralString, events: int, process: subprocess.Popen[bytes], log: Path) -> Consumed:
    """Looks at a consumer until it has finished so many events, and its process rests.

    Raises RuntimeError when it ends, TimeoutError when it takes too long.
    """
    table = sql.Identifier(*inbox.split("."))
    count = sql.SQL("select count(*) from {} where finished_at is not null").format(table)
    span = sql.SQL("select extract(epoch from max(finished_at) - min(finished_at))::float8 from {}").format(table)
    first: Look | None = None
    deadline = time.monotonic() + LIMIT
    with psycopg.connect(dsn, autocommit=True) as connection:
        while True:
            finished = int(_value(connection, count))
            if finished and first is None:
                first = Look(finished, processor_time(process.pid))
            if finished >= events:
                break
            if process.poll() is not None:
                raise RuntimeError(f"the consumer ended: {log.read_text(errors='replace')[-1500:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{finished} of {events} events were finished within {LIMIT:g} s")
            # Seldom enough to cost the database nothing; the times come from its own clock.
            time.sleep(0.02 if first is None else 0.1)
        seconds = _value(connection, span)
    last = Look(events, _at_rest(process.pid))
    assert first is not None
    return Consumed((events - 1) / seconds, microseconds(first, last))


def _at_rest(pid: int) -> float:
    """Seconds of processor time, once the last acknowledgements have left and nothing more is done, or, for one that
    goes on trying, after a second."""
    before = processor_time(pid)
    for _ in range(10):
        time.sleep(0.1)
        now = processor_time(pid)
        if now - before < 0.001:
            break
        before = now
    return now


def _expect_replies(dsn: str, wanted: int) -> None:
    """Raises RuntimeError where there are more or fewer."""
    with psycopg.connect(dsn) as connection:
        replies = int(_value(connection, sql.SQL("select count(*) from bench.replies").format()))
    if replies != wanted:
        raise RuntimeError(f"{replies} replies were called for {wanted} events")


def _value(connection: psycopg.Connection[tuple[object, ...]], query: sql.Composed) -> float:
    row = connection.execute(query).fetchone()
    assert row is not None
    return float(str(row[0]))


@theme("workers")
def workers(world: World) -> Sequence[Row]:
    """Each variant of ours with the peers that do the same, in the same rounds."""
    log = world.log(2_000 if world.quick else 6_000)
    contenders: dict[str, Callable[[], Consumed]] = {}
    for variant in VARIANTS:
        contenders[variant.name] = partial(ours, world, log, variant)
        for name, module in ((FASTSTREAM, "faststream_worker"), (AIO_PIKA, "aio_pika_worker")):
            contenders[beside(name, variant)] = partial(peer, world, log, module, variant.reply)
    found = take_turns(world.rounds, contenders, lambda consumed: consumed.rate)
    rates, times = found.each(lambda consumed: consumed.rate), found.each(lambda consumed: consumed.processor_time)
    return [row for variant in VARIANTS for row in rows(variant, rates, times)]


def beside(peer: str, variant: Variant) -> str:
    """The contender that a variant is measured beside; variants with the same reply share it."""
    return f"{peer}, the same inserts{' and reply' if variant.reply else ''}"


def rows(variant: Variant, rates: Interleaved[float], times: Interleaved[float]) -> Sequence[Row]:
    """What a variant reached: its rate beside each peer's, and its processor time."""
    title = f"workers: {variant.name}"
    faststream, aio_pika = beside(FASTSTREAM, variant), beside(AIO_PIKA, variant)
    return [
        rates.row(f"{title}, {FASTSTREAM}", "events/s", faststream, at_least(variant.faststream), ours=variant.name),
        rates.row(f"{title}, {AIO_PIKA}", "events/s", aio_pika, at_least(variant.aio_pika), ours=variant.name),
        times.row(f"{title}, processor time", "us/event", aio_pika, at_most(variant.processor_time), ours=variant.name),
    ]
