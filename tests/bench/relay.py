"""The outbox to RabbitMQ: beside the broker's limit, and beside other ways to relay it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench.bridge import Drained, Measured, alone, beside_other, drain, processor_times, rate, versions
from tests.bench.peers import run
from tests.bench.rabbit import Target, quorum_queue
from tests.bench.registry import theme
from tests.bench.results import Row, at_least, at_most, faster
from tests.bench.rounds import take_turns
from tests.bench.world import Log, World

WINDOW = 20_000
"""Messages that the pre-encoded frames leave unconfirmed at most; of the windows tried it reached the most."""

LIMIT, NODE = "pre-encoded frames, one socket", "Node.js pg + amqplib"
AIO_PIKA, GATHERED = "psycopg + aio-pika", "psycopg + aio-pika, gathered"
FASTSTREAM = "faststream-outbox"


def carry(world: World, log: Log, python: Path | None = None) -> Drained:
    """A log through the bridge into a queue of its own; by another version with the `python` of its environment."""
    with quorum_queue(world) as target:
        drained = drain(world, log, target.sink, python=python)
        target.expect(log.events)
        return drained


def ours(world: World, log: Log, python: Path | None = None) -> float:
    """Confirmed events a second."""
    return carry(world, log, python).rate


def limit(world: World, log: Log) -> float:
    """What one connection can bring into the queue at most."""
    return published(world, log.events, lambda to: run.own("frames", *_to(to, log, log.events), str(WINDOW)))


def published(world: World, count: int, publish: Callable[[Target], float]) -> float:
    """A peer's rate, after a look that all its messages are in the queue."""
    with quorum_queue(world) as target:
        rate = publish(target)
        target.expect(count)
        return rate


def _to(target: Target, log: Log, count: int) -> tuple[str, ...]:
    return target.url, target.exchange, log.dsn, str(count)


@theme("rabbitmq")
def rabbitmq(world: World) -> Sequence[Row]:
    """200-byte payloads; the slow peers take a part of the backlog, since only their rate counts."""
    events = 20_000 if world.quick else 200_000
    some, few = (2_000, 1_000) if world.quick else (40_000, 5_000)
    logs = {python: world.log(events, python=python) for python in world.pythons}
    log = logs[None]
    contenders: dict[str, Callable[[], Measured]] = {
        **versions(world, lambda python: carry(world, logs[python], python)),
        LIMIT: lambda: limit(world, log),
        NODE: lambda: published(world, events, lambda to: run.node("relay.js", *_to(to, log, events))),
        AIO_PIKA: lambda: published(world, few, lambda to: run.foreign("aio_pika_loop.py", *_to(to, log, few), "one")),
        GATHERED: lambda: published(
            world, some, lambda to: run.foreign("aio_pika_loop.py", *_to(to, log, some), "gather")
        ),
        FASTSTREAM: lambda: published(world, few, lambda to: run.foreign("faststream_relay.py", *_to(to, log, few))),
    }
    found = take_turns(world.rounds, contenders, rate)
    rates, times = found.each(rate), processor_times(found)
    return [
        *beside_other(rates, "rabbitmq: the other version", "events/s"),
        rates.row("rabbitmq: the broker's limit", "events/s", LIMIT, at_least(0.9)),
        rates.row("rabbitmq: Node.js", "events/s", NODE, faster()),
        rates.row("rabbitmq: aio-pika, one by one", "events/s", AIO_PIKA, faster()),
        rates.row("rabbitmq: aio-pika, gathered", "events/s", GATHERED, faster()),
        rates.row("rabbitmq: faststream-outbox", "events/s", FASTSTREAM, faster()),
        alone(times, "rabbitmq: processor time", "us/event", at_most(8)),
    ]
