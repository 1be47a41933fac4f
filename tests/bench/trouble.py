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

ALONE, BESIDE_DEAD = "alone", "a sink beside a dead one"
# A second queue costs the broker a tenth, full or not: its exchange has more bindings to match.
BESIDE_ROOMY, BESIDE_FULL = "beside one with room", "a queue beside a full one"
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

    def beside_other(max_length: int | None) -> float:
        with quorum_queue(world) as target:
            asyncio.run(_declare_other(target, max_length))
            try:
                return drain(world, log, target.sink).rate
            finally:
                asyncio.run(_delete_other(target))

    found = interleave(
        world.rounds,
        {
            ALONE: alone,
            BESIDE_DEAD: beside_dead,
            BESIDE_ROOMY: lambda: beside_other(None),
            BESIDE_FULL: lambda: beside_other(1),
        },
    )
    return [
        found.row(f"trouble: {ours}", "events/s", peer, at_least(0.9), ours=ours)
        for ours, peer in ((BESIDE_DEAD, ALONE), (BESIDE_FULL, BESIDE_ROOMY))
    ]


async def _declare_other(target: Target, max_length: int | None) -> None:
    """A queue for one topic that refuses what is over `max_length` messages."""
    async with await aio_pika.connect(target.url) as connection:
        channel = await connection.channel()
        bounds: dict[str, aio_pika.abc.FieldValue] = {"x-overflow": "reject-publish"}
        if max_length is not None:
            bounds["x-max-length"] = max_length
        queue = await channel.declare_queue(f"{target.queue}-other", durable=True, arguments=bounds)
        await queue.bind(target.exchange, f"{TOPIC}.0")


async def _delete_other(target: Target) -> None:
    async with await aio_pika.connect(target.url) as connection:
        channel = await connection.channel()
        await channel.queue_delete(f"{target.queue}-other")
