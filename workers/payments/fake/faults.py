"""Failures on command: which request fails, and how."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, get_args

Kind = Literal[
    "hang_before", "hang_after", "drop_before", "drop_after", "error_before", "error_after", "rate", "lock", "conflict"
]
"""``hang``: no answer ever; ``drop``: the connection ends without one; ``error``: a 500, kept under the key. Each
before or after the effect. ``rate``: a 429 with Retry-After, and ``lock``: one with ``lock_timeout``; ``conflict``: a
409. None of these three is kept."""

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Fault:
    """Every `every`-th request that changes something and whose path begins so fails."""

    kind: Kind
    every: int = 1
    times: int | None = None
    """How often; None for ever."""
    path: str = "/v1/"


class Faults:
    """Thread-safe."""

    def __init__(self) -> None:
        self.requests = 0
        """How many came."""
        self._lock = threading.Lock()
        self.replace(())

    def replace(self, faults: Iterable[Fault]) -> None:
        """From now on these, counted from the next request."""
        with self._lock:
            self._faults = [(fault, [0, 0]) for fault in faults]

    def next(self, path: str) -> Kind | None:
        """What becomes of this request; the first fault that has its turn counts."""
        with self._lock:
            self.requests += 1
            for fault, counts in self._faults:
                if not path.startswith(fault.path) or counts[1] == fault.times:
                    continue
                counts[0] += 1
                if counts[0] % fault.every == 0:
                    counts[1] += 1
                    return fault.kind
        return None
