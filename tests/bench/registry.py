"""The themes of the benchmark, in the order in which they run."""

import traceback
from collections.abc import Callable, Sequence

from tests.bench.results import Row
from tests.bench.rounds import say
from tests.bench.world import World

Theme = Callable[[World], Sequence[Row]]
"""Measures some rows that share their rounds, and so run together."""

THEMES: dict[str, Theme] = {}

ORDER = (
    "rabbitmq",
    "nats",
    "pubsub",
    "emit",
    "watch",
    "backfill",
    "workers",
    "ordered",
    "latency",
    "trickle",
    "doorbell",
    "backlog",
    "gaps",
    "distance",
    "payload",
    "topics",
    "trouble",
    "console",
    "pages",
    "webhooks",
)
"""As the table shows them."""


def theme(name: str) -> Callable[[Theme], Theme]:
    """Registers a theme, which ORDER must name. Its rows' names begin with `name`."""

    def register(function: Theme) -> Theme:
        if name in THEMES or name not in ORDER:
            raise ValueError(f"the theme {name!r} is registered twice, or ORDER lacks it")
        THEMES[name] = function
        return function

    return register


def selected(wanted: Sequence[str]) -> list[str]:
    """The themes whose rows were asked for by a beginning of their names; all without a wish.

    Raises ValueError for a wish that no theme answers.
    """
    for wish in wanted:
        if not any(name.startswith(wish) or wish.startswith(name) for name in ORDER):
            raise ValueError(f"there is no row {wish!r}; there are {', '.join(ORDER)}")
    return [name for name in ORDER if not wanted or any(name.startswith(w) or w.startswith(name) for w in wanted)]


def measure(name: str, world: World) -> Sequence[Row]:
    """Runs a theme; a theme that fails as a whole is one row that says so."""
    say(f"{name} ...")
    try:
        return THEMES[name](world)
    except Exception as error:  # noqa: BLE001 - the other themes go on, and this one is told as failed
        say(traceback.format_exc())
        return [Row(name, "", (), error=f"{type(error).__name__}: {error}")]
