"""What order costs a worker: one process over a full queue of RabbitMQ, and what a key that fails costs the others."""

from collections.abc import Sequence
from functools import partial

from tests.bench.handlers import FAILING
from tests.bench.registry import theme
from tests.bench.results import Row, at_least
from tests.bench.rounds import interleave
from tests.bench.workers import consume
from tests.bench.world import Log, World

KEYS = 1000
ORDERED = 'ordered = true\nmax_attempts = 100\nretry_initial = "300ms"\nretry_max = "300ms"\n'
NONE_FAILS, SOME_FAIL, UNORDERED = "ordered, no key fails", "ordered, some keys fail", "unordered"


def rate(world: World, log: Log, handler: str, settings: str, left: int = 0) -> float:
    """Events finished a second. What is left is not among them."""
    _, consumed = consume(world, log, handler, settings, left)
    return consumed.rate


@theme("ordered")
def ordered(world: World) -> Sequence[Row]:
    """Keys that fail are tried again some times a second, from the first moment to the last."""
    events = 2_000 if world.quick else 40_000  # 10,000 are finished in 1.5 s, too short to tell a tenth
    log = world.log(events, keys=KEYS)
    found = interleave(
        world.rounds,
        {
            UNORDERED: partial(rate, world, log, "nothing", ""),
            NONE_FAILS: partial(rate, world, log, "nothing", ORDERED),
            SOME_FAIL: partial(rate, world, log, "fail_some", ORDERED, events // KEYS * len(FAILING)),
        },
    )
    return [
        found.row("ordered: beside the same, unordered", "events/s", UNORDERED, ours=NONE_FAILS),
        found.row(
            f"ordered: beside {len(FAILING)} of {KEYS} keys that fail",
            "events/s",
            NONE_FAILS,
            at_least(0.9),
            ours=SOME_FAIL,
        ),
    ]
