"""The outbox to RabbitMQ: beside the broker's limit, and beside other ways to relay it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench.bridge import OTHER, drain
from tests.bench.peers import run
from tests.bench.rabbit import Target, quorum_queue
from tests.bench.registry import theme
from tests.bench.results import Row, at_least, faster
from tests.bench.rounds import Measure, interleave
from tests.bench.world import Log, World

WINDOW = 20_000
"""Messages that the pre-encoded frames leave unconfirmed at most; of the windows tried it reached the most."""

LIMIT, NODE = "pre-encoded frames, one socket", "Node.js pg + amqplib"
AIO_PIKA, GATHERED = "psycopg + aio-pika", "psycopg + aio-pika, gathered"
FASTSTREAM = "faststream-outbox"


def ours(world: World, log: Log, python: Path | None = None) -> float:
    """Confirmed events a second; of another version of the bridge with the `python` of its environment."""
    with quorum_queue(world) as target:
        drained = drain(world, log, target.sink, python=python)
        target.expect(log.events)
        return drained.rate


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
    log = world.log(20_000 if world.quick else 200_000)
    some, few = (2_000, 1_000) if world.quick else (40_000, 5_000)
    contenders: dict[str, Measure] = {
        "ours": lambda: ours(world, log),
        LIMIT: lambda: limit(world, log),
        NODE: lambda: published(world, log.events, lambda to: run.node("relay.js", *_to(to, log, log.events))),
        AIO_PIKA: lambda: published(world, few, lambda to: run.foreign("aio_pika_loop.py", *_to(to, log, few), "one")),
        GATHERED: lambda: published(
            world, some, lambda to: run.foreign("aio_pika_loop.py", *_to(to, log, some), "gather")
        ),
        FASTSTREAM: lambda: published(world, few, lambda to: run.foreign("faststream_relay.py", *_to(to, log, few))),
    }
    if world.beside is not None:
        old_log = world.log(log.events, python=world.beside)
        contenders[OTHER] = lambda: ours(world, old_log, world.beside)
    found = interleave(world.rounds, contenders)
    other = [] if world.beside is None else [found.row("rabbitmq: the other version", "events/s", OTHER)]
    return [
        *other,
        found.row("rabbitmq: the broker's limit", "events/s", LIMIT, at_least(0.8)),
        found.row("rabbitmq: Node.js", "events/s", NODE, faster()),
        found.row("rabbitmq: aio-pika, one by one", "events/s", AIO_PIKA, faster()),
        found.row("rabbitmq: aio-pika, gathered", "events/s", GATHERED, faster()),
        found.row("rabbitmq: faststream-outbox", "events/s", FASTSTREAM, faster()),
    ]
