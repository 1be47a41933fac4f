"""What somebody else's trouble costs: a sink beside a dead one, a queue beside a full one."""

import asyncio
from collections.abc import Sequence

import aio_pika

from tests.bench.bridge import drain
from tests.bench.rabbit import Target, quorum_queue
from tests.bench.registry import theme
from tests.bench.results import Row, at_least
from tests.bench.rounds import interleave
from tests.bench.world import TOPIC, World
from tests.support.servers import free_port

ALONE, BESIDE_DEAD, BESIDE_FULL = "alone", "a sink beside a dead one", "a queue beside a full one"
DEAD_SINK = """
[sinks.dead]
type = "nats"
url = "nats://127.0.0.1:{port}"
stream = "dead"
[[routes]]
topic = "#"
sink = "dead"
"""
TOPICS = 100
"""One of them leads to a full queue, too: a hundredth of all events is refused and held."""


@theme("trouble")
def trouble(world: World) -> Sequence[Row]:
    """The same log with another sink whose broker is down, and with another queue that refuses a topic."""
    log = world.log(20_000 if world.quick else 200_000, topics=TOPICS)

    def alone() -> float:
        with quorum_queue(world) as target:
            return drain(world, log, target.sink).rate

    def beside_dead() -> float:
        with quorum_queue(world) as target:
            return drain(world, log, target.sink, more=DEAD_SINK.format(port=free_port())).rate

    def beside_full() -> float:
        with quorum_queue(world) as target:
            asyncio.run(_full_queue(target))
            try:
                return drain(world, log, target.sink).rate
            finally:
                asyncio.run(_delete(target))

    found = interleave(world.rounds, {ALONE: alone, BESIDE_DEAD: beside_dead, BESIDE_FULL: beside_full})
    return [
        found.row(f"trouble: {name}", "events/s", ALONE, at_least(0.9), ours=name)
        for name in (BESIDE_DEAD, BESIDE_FULL)
    ]


async def _full_queue(target: Target) -> None:
    """A queue for one topic that holds one message and refuses the next."""
    async with await aio_pika.connect(target.url) as connection:
        channel = await connection.channel()
        bounds: dict[str, aio_pika.abc.FieldValue] = {"x-max-length": 1, "x-overflow": "reject-publish"}
        queue = await channel.declare_queue(f"{target.queue}-full", durable=True, arguments=bounds)
        await queue.bind(target.exchange, f"{TOPIC}.0")


async def _delete(target: Target) -> None:
    async with await aio_pika.connect(target.url) as connection:
        channel = await connection.channel()
        await channel.queue_delete(f"{target.queue}-full")
