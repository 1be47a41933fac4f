"""What somebody else's trouble costs: a sink beside a dead one, a queue beside a full one."""

from collections.abc import Sequence

from tests.bench.bridge import drain
from tests.bench.rabbit import other_queue, quorum_queue
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
        # It refuses what is over `max_length` messages.
        bounds = {"x-overflow": "reject-publish"} | ({} if max_length is None else {"x-max-length": max_length})
        with quorum_queue(world) as target, other_queue(target, f"{TOPIC}.0", bounds):
            return drain(world, log, target.sink).rate

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
