"""What an event does to the workers that take it: its writer chooses, so the audit knows what must become of it."""

import random
from dataclasses import dataclass
from typing import Final

MAX_ATTEMPTS: Final = 6
"""Of every worker: enough that an event which must be handled survives what faults cost it."""
TIMEOUT: Final = 2.0
"""Seconds that an attempt may take."""


@dataclass(frozen=True)
class Fate:
    """One way to end. In its attempts an event is shipped, then lingers, then fails, as far as its fate says."""

    name: str
    weight: float
    code: str | None = None
    """With which it is given up; None: it is handled."""
    ships: bool = False
    """An effect outside of the database, whose result is on record at the next attempt."""
    breaks: bool = False
    """Its first attempt fails within the effect, so that no result is on record."""
    once: bool = False
    """It is only the first attempt that lingers or fails."""
    lingers: bool = False
    """It takes longer than it may."""


FATES: Final = {
    fate.name: fate
    for fate in (
        Fate("handled", 60),
        Fate("shipped", 18, ships=True),
        Fate("breaks once", 4, ships=True, breaks=True, once=True),
        Fate("fails once", 4, once=True),
        Fate("asks once", 4, ships=True, once=True),
        Fate("lingers once", 0.4, ships=True, once=True, lingers=True),
        Fate("fails", 1, code="error"),
        Fate("asks", 1, code="attempts_exhausted"),
        Fate("rejected", 2, code="rejected"),
        Fate("lingers", 0.2, code="timeout", ships=True, lingers=True),
    )
}
"""By name. Few linger, since each keeps a worker's place busy for `TIMEOUT` at each attempt."""
HANDLED: Final = FATES["handled"]


def choose(chooser: random.Random) -> Fate:
    """One of them, as their weights say."""
    return chooser.choices(list(FATES.values()), [fate.weight for fate in FATES.values()])[0]
