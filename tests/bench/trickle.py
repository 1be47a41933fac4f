"""The bridge at a trickle, as most run all day: what an event costs it, and how long it is on its way.

1,000 events a second are far from what it can carry, so what counts is how often it wakes for how little.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.bench.bridge import alone, running, versions
from tests.bench.latency import WARM_UP, arrivals, consuming, emit_at, emitted, percentile
from tests.bench.processor import Look, microseconds, processor_time
from tests.bench.rabbit import quorum_queue
from tests.bench.registry import theme
from tests.bench.results import Row, at_most
from tests.bench.rounds import take_turns
from tests.bench.world import World

RATE = 1000
"""Events a second."""


class Trickled(NamedTuple):
    """One round of it."""

    processor_time: float
    """Microseconds an event of the bridge's process."""
    p50: float
    """Milliseconds from the commit to the consumer."""
    p99: float


def carry(world: World, seconds: float, python: Path | None) -> Trickled:
    """From pgbench, one event a transaction, to a consumer that only looks at the time in each body."""
    dsn = world.database(python)
    with (
        quorum_queue(world) as target,
        running(world, dsn, target.sink, python=python) as bridge,
        consuming(world, target.url, target.queue) as consumer,
        ThreadPoolExecutor(1) as beside,
    ):
        assert bridge.process is not None
        emitting = beside.submit(emit_at, world, dsn, RATE, WARM_UP + seconds)
        time.sleep(WARM_UP)
        # What is on its way at a look is a handful of events, at both.
        first = Look(emitted(dsn), processor_time(bridge.process.pid))
        log = emitting.result()
        last = Look(emitted(dsn), processor_time(bridge.process.pid))
        consumer.wait_for(last.finished)
    way = arrivals(consumer.records, log).from_commit
    return Trickled(microseconds(first, last), percentile(way, 0.5), percentile(way, 0.99))


@theme("trickle")
def trickle(world: World) -> Sequence[Row]:
    """This version, and the other where one takes part."""
    seconds = 2.0 if world.quick else 10.0
    contenders = versions(world, lambda python: carry(world, seconds, python))
    found = take_turns(world.rounds, contenders, lambda one: one.processor_time)
    return [
        alone(found.each(lambda one: one.processor_time), "trickle: processor time", "us/event", at_most(100)),
        alone(found.each(lambda one: one.p50), "trickle: commit to consumer, p50", "ms"),
        alone(found.each(lambda one: one.p99), "trickle: commit to consumer, p99", "ms"),
    ]
