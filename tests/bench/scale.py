"""Whether the cost of an event stays the same: long backlogs, far databases, large payloads, many topics and keys."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import psycopg

from tests.bench.bridge import Drained, Sample, drain
from tests.bench.delay import delayed
from tests.bench.rabbit import quorum_queue
from tests.bench.registry import theme
from tests.bench.relay import LIMIT, limit, ours
from tests.bench.results import Row, at_least, at_most
from tests.bench.rounds import interleave
from tests.bench.world import World

ROUND_TRIP = 0.050
"""Seconds."""


def between(samples: Sequence[Sample], first: int, last: int) -> tuple[float, float]:
    """Seconds and processor seconds that an event took between two ids, as near as samples lie.

    Raises ValueError when fewer than two samples do.
    """
    part = [sample for sample in samples if first <= sample.mark <= last]
    if len(part) < 2:
        raise ValueError(f"only {len(part)} samples lie between the ids {first} and {last}")
    events = part[-1].mark - part[0].mark
    return (part[-1].time - part[0].time) / events, (part[-1].cpu - part[0].cpu) / events


@contextmanager
def old_transaction(dsn: str) -> Iterator[None]:
    """A transaction with an id and a snapshot, open all the while: nothing newer can be vacuumed, and no gap closes."""
    with psycopg.connect(dsn) as connection:
        connection.execute("set transaction isolation level repeatable read")
        connection.execute("select pg_current_xact_id(), (select count(*) from bridge.cursor)")
        yield
        connection.rollback()


@theme("backlog")
def backlog(world: World) -> Sequence[Row]:
    """The last tenth of a long backlog beside the first, while an old transaction is held open."""
    log = world.log(100_000 if world.quick else 1_000_000)
    tenth = log.events // 10
    # At the very end all is read and encoded and only confirms are awaited, which would flatter the last tenth.
    end = log.last - log.events // 50
    firsts: list[tuple[float, float]] = []
    lasts: list[tuple[float, float]] = []
    runs: list[Drained] = []

    def run() -> float:
        with quorum_queue(world) as target, old_transaction(log.dsn):
            drained = drain(world, log, target.sink, limit=300.0)
            target.expect(log.events)
        runs.append(drained)
        firsts.append(between(drained.samples, log.first, log.first + tenth))
        lasts.append(between(drained.samples, end - tenth, end))
        return drained.rate

    found = interleave(world.rounds, {"ours": run})
    error = found.errors.get("ours", "")
    rates = [1 / seconds for seconds, _ in lasts], [1 / seconds for seconds, _ in firsts]
    cpu = [cpu * 1e6 for _, cpu in lasts], [cpu * 1e6 for _, cpu in firsts]
    first = "its own first tenth"
    return [
        Row("backlog: last tenth", "events/s", *rates, first, at_least(0.9), error),
        Row("backlog: processor time, last tenth", "us/event", *cpu, first, None, error),
        Row("backlog: peak memory", "MB", [run.peak_memory for run in runs], target=at_most(150), error=error),
    ]


@theme("distance")
def distance(world: World) -> Sequence[Row]:
    """50 ms to the database. The same proxy without delay is the peer, so that only the distance differs."""
    log = world.log(10_000 if world.quick else 100_000)

    def through(seconds: float) -> float:
        with quorum_queue(world) as target, delayed(log.dsn, seconds) as dsn:
            return drain(world, log, target.sink, dsn=dsn).rate

    near = "no delay"
    found = interleave(world.rounds, {"ours": lambda: through(ROUND_TRIP), near: lambda: through(0.0)})
    return [found.row("distance: 50 ms to the database", "events/s", near, at_least(0.9))]


@theme("payload")
def payload(world: World) -> Sequence[Row]:
    """200 B, 10 kB and 1 MB, each beside the broker's limit at that size."""
    rows: list[Row] = []
    sizes = {200: 100_000, 10_000: 20_000, 1_000_000: 300}
    if world.quick:
        sizes = {10_000: 2_000, 1_000_000: 30}
    for size, events in sizes.items():
        log = world.log(events, size=size)
        found = interleave(world.rounds, {"ours": partial(ours, world, log), LIMIT: partial(limit, world, log)})
        rows.append(found.row(f"payload: {size} bytes", "events/s", LIMIT))
    return rows


@theme("topics")
def topics(world: World) -> Sequence[Row]:
    """100 and 10,000 topics and keys beside one of each."""
    events = 10_000 if world.quick else 100_000
    logs = {count: world.log(events, topics=count, keys=count) for count in (1, 100, 10_000)}
    names = {count: f"{count} topics and keys" for count in logs}
    found = interleave(world.rounds, {names[count]: partial(ours, world, log) for count, log in logs.items()})
    return [found.row(f"topics: {names[count]}", "events/s", names[1], ours=names[count]) for count in (100, 10_000)]
