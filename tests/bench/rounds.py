"""Contenders take turns within each round, so that all of them meet the same machine."""

import sys
import time
from collections.abc import Callable, Mapping

from tests.bench.results import Interleaved

Measure = Callable[[], float]
"""One measurement: a rate, or another value of which more is better or worse."""


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def interleave(rounds: int, contenders: Mapping[str, Measure]) -> Interleaved:
    """Measures every contender once a round, in an order that turns by one each round.

    A contender that fails is told and left out of later rounds; the others go on.
    """
    values: dict[str, list[float]] = {name: [] for name in contenders}
    errors: dict[str, str] = {}
    names = list(contenders)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if name in errors:
                continue
            began = time.monotonic()
            try:
                value = contenders[name]()
            except Exception as error:  # noqa: BLE001 - told in the table; one failure must not cost the other rows
                errors[name] = f"{type(error).__name__}: {error}"
                say(f"    {name}: FAILED {errors[name]}")
                continue
            values[name].append(value)
            say(f"    round {number + 1}: {name}: {value:,.2f} ({time.monotonic() - began:.1f} s)")
    return Interleaved(values, errors)
