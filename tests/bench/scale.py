"""Whether the cost of an event stays the same: long backlogs, far databases, large payloads, many topics and keys."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psycopg

from tests.bench.bridge import Drained, beside_other, between, drain, versions
from tests.bench.delay import delayed
from tests.bench.rabbit import quorum_queue
from tests.bench.registry import theme
from tests.bench.relay import LIMIT, limit, ours
from tests.bench.results import Row, at_least, at_most
from tests.bench.rounds import Measure, interleave, take_turns
from tests.bench.world import Log, World

ROUND_TRIP = 0.050
"""Seconds."""


@contextmanager
def old_transaction(dsn: str) -> Iterator[None]:
    """A transaction with an id and a snapshot, open all the while: nothing newer can be vacuumed, and no gap closes."""
    with psycopg.connect(dsn) as connection:
        connection.execute("set transaction isolation level repeatable read")
        connection.execute("select pg_current_xact_id(), (select count(*) from bridge.cursor)")
        yield
        connection.rollback()


class Tenths(NamedTuple):
    """One backlog, carried to its end, and what an event took in its first and its last tenth."""

    drained: Drained
    first: tuple[float, float]
    """Seconds and processor seconds, as of `between`."""
    last: tuple[float, float]


@theme("backlog")
def backlog(world: World) -> Sequence[Row]:
    """The last tenth of a long backlog beside the first, while an old transaction is held open."""
    log = world.log(100_000 if world.quick else 1_000_000)
    tenth = log.events // 10
    # At the very end all is read and encoded and only confirms are awaited, which would flatter the last tenth.
    end = log.last - log.events // 50

    def run() -> Tenths:
        with quorum_queue(world) as target, old_transaction(log.dsn):
            drained = drain(world, log, target.sink, limit=300.0)
            target.expect(log.events)
        first = between(drained.samples, log.first, log.first + tenth)
        return Tenths(drained, first, between(drained.samples, end - tenth, end))

    found = take_turns(world.rounds, {"ours": run}, lambda run: run.drained.rate)
    [runs], error = found.values.values(), found.errors.get("ours", "")
    rates = [1 / run.last[0] for run in runs], [1 / run.first[0] for run in runs]
    cpu = [run.last[1] * 1e6 for run in runs], [run.first[1] * 1e6 for run in runs]
    memory = [run.drained.peak_memory for run in runs]
    first, quiet = "its own first tenth", found.not_quiet
    return [
        Row("backlog: last tenth", "events/s", *rates, first, at_least(0.9), error, quiet),
        Row("backlog: processor time, last tenth", "us/event", *cpu, first, None, error, quiet),
        Row("backlog: peak memory", "MB", memory, target=at_most(150), error=error, not_quiet=quiet),
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
        logs = {python: world.log(events, size=size, python=python) for python in world.pythons}
        contenders: dict[str, Measure] = {
            **versions(world, partial(_carried, world, logs)),
            LIMIT: partial(limit, world, logs[None]),
        }
        found = interleave(world.rounds, contenders)
        rows += beside_other(found, f"payload: {size} bytes, the other version", "events/s")
        rows.append(found.row(f"payload: {size} bytes", "events/s", LIMIT, at_least(0.85) if size > 200 else None))
    return rows


def _carried(world: World, logs: Mapping[Path | None, Log], python: Path | None) -> float:
    return ours(world, logs[python], python)


@theme("topics")
def topics(world: World) -> Sequence[Row]:
    """100 and 10,000 topics and keys beside one of each."""
    events = 10_000 if world.quick else 100_000
    logs = {count: world.log(events, topics=count, keys=count) for count in (1, 100, 10_000)}
    names = {count: f"{count} topics and keys" for count in logs}
    found = interleave(world.rounds, {names[count]: partial(ours, world, log) for count, log in logs.items()})
    return [found.row(f"topics: {names[count]}", "events/s", names[1], ours=names[count]) for count in (100, 10_000)]
