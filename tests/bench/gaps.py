"""What gaps cost: ids that were handed out and rolled back, below a writer that stays open, so that none closes.

While the writer runs, anything below the mark may be its event still, and the bridge must look for it. So it carries a
backlog that stands above many gaps, and then single events.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg

from tests.bench.bridge import beside_other, between, daemon, stop, versions, watch
from tests.bench.handlers import RECORD
from tests.bench.latency import consuming, percentile
from tests.bench.processor import processor_time
from tests.bench.rabbit import other_queue, quorum_queue
from tests.bench.registry import theme
from tests.bench.results import Interleaved, Row, Target, at_least, at_most
from tests.bench.rounds import take_turns
from tests.bench.world import TOPIC, Log, World, append

NO_GAPS = "no gaps, no open writer"
LIMIT = 240.0
"""Seconds in which everything must be confirmed."""
FRESH, PAUSE = 50, 0.1
"""Events that are emitted one by one, and the seconds between them: 10 events a second for 5 seconds."""
FRESH_TOPIC = "bench.fresh"

OPEN = f"select pg_current_xact_id(), bridge.emit('{TOPIC}.0', '{{}}'::json)"
# Each block is a transaction within the transaction, whose rollback leaves the id unused; the next event's id is above.
ROLL_BACK = f"""
do $$
begin
  for number in 1..{{gaps}} loop
    begin
      perform bridge.emit('{TOPIC}.0', '{{{{}}}}'::json);
      raise exception 'roll back';
    exception when raise_exception then
      null;
    end;
    perform bridge.emit(
      '{TOPIC}.0', json_build_object('n', number, 'text', repeat('x', 170)), 'key-' || number % 1000);
  end loop;
end $$
"""
EMIT = f"select bridge.emit('{FRESH_TOPIC}', json_build_object('t', %s::float8, 'client', 0, 'n', %s::int))"


class Carried(NamedTuple):
    """A backlog and then single events, carried by one bridge."""

    rate: float
    """Confirmed events a second of the backlog above the gaps."""
    fresh: float
    """Milliseconds from the commit of a single event to a consumer, p50."""
    share: float
    """Percent of a core that the bridge took meanwhile."""


@contextmanager
def under_writer(world: World, gaps: int, events: int, python: Path | None) -> Iterator[Log]:
    """A backlog above as many gaps as events that were committed between them, all newer than a writer that is open as
    long as the block runs."""
    with database(world, python) as dsn, psycopg.connect(dsn) as writer:
        writer.execute(OPEN)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(ROLL_BACK.format(gaps=gaps))
        yield append(dsn, events, 200, 1, 1000)
        writer.rollback()


@contextmanager
def without_gaps(world: World, below: int, events: int) -> Iterator[Log]:
    """The same backlog above so many events without gaps, and no writer."""
    with database(world, None) as dsn:
        append(dsn, below, 200, 1, 1000)
        yield append(dsn, events, 200, 1, 1000)


@contextmanager
def database(world: World, python: Path | None) -> Iterator[str]:
    """One of its own, since what is emitted one by one stays in the log; it goes with the block."""
    name = world.unique("gaps")
    try:
        yield world.database(python, name)
    finally:
        world.postgres.drop_database(name)


def carry(world: World, log: Log, published: int, python: Path | None = None) -> Carried:
    """The log with a new cursor, and so from its beginning; `published` events are in the queue once it is at its end.
    Then the single events."""
    name = world.unique("bridge")
    with (
        quorum_queue(world) as target,
        psycopg.connect(log.dsn, autocommit=True) as connection,
        daemon(world, name, log.dsn, target.sink, python) as process,
    ):
        assert process.process is not None
        samples, _ = watch(connection, name, log.last, process, time.monotonic() + LIMIT)
        target.expect(published)
        with (
            other_queue(target, FRESH_TOPIC, {"x-queue-type": "quorum"}) as queue,
            consuming(world, target.url, queue) as consumer,
        ):
            began, before = time.monotonic(), processor_time(process.process.pid)
            committed = emit_fresh(connection)
            share = (processor_time(process.process.pid) - before) / (time.monotonic() - began) * 100
            consumer.wait_for(FRESH)
            ways = on_the_way(consumer.records, committed)
        stop(process)
    return Carried(1 / between(samples, log.first, log.last)[0], percentile(ways, 0.5), share)


def emit_fresh(connection: psycopg.Connection[tuple[object, ...]]) -> dict[int, float]:
    """When each commit returned, by the number of the event."""
    committed = {}
    for number in range(FRESH):
        connection.execute(EMIT, (time.time(), number), prepare=True)
        committed[number] = time.time()
        time.sleep(PAUSE)
    return committed


def on_the_way(records: Path, committed: dict[int, float]) -> list[float]:
    """Milliseconds from each event's commit to its arrival."""
    found = RECORD.iter_unpack(records.read_bytes())
    return [(arrived - committed[number]) * 1000 for _, arrived, _, number in found]


@theme("gaps")
def gaps(world: World) -> Sequence[Row]:
    """Beside the same events without gaps and without a writer: the first of them stand where the gaps were."""
    count, events = (5_000, 20_000) if world.quick else (200_000, 100_000)

    def with_gaps(python: Path | None) -> Carried:
        with under_writer(world, count, events, python) as log:
            return carry(world, log, count + events, python)

    def with_none() -> Carried:
        with without_gaps(world, count, events) as log:
            return carry(world, log, count + events)

    found = take_turns(world.rounds, {**versions(world, with_gaps), NO_GAPS: with_none}, lambda one: one.rate)
    rates, fresh = found.each(lambda one: one.rate), found.each(lambda one: one.fresh)
    title, share = f"gaps: {count} under an open writer", found.each(lambda one: one.share)
    rows = [
        (rates, title, "events/s", at_least(0.8)),
        (fresh, "gaps: fresh event, commit to consumer, p50", "ms", at_most(50)),
        (share, "gaps: processor time at 10 events/s", "% of a core", None),
    ]
    return [row for kind in rows for row in _rows(*kind)]


def _rows(found: Interleaved[float], row: str, unit: str, target: Target | None) -> list[Row]:
    return [*beside_other(found, f"{row}, the other version", unit), found.row(row, unit, NO_GAPS, target)]
