"""Contenders take turns within each round, so that all of them meet the same machine."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tests.bench import quiet
from tests.bench.results import Interleaved

Measure = Callable[[], float]
"""One measurement: a rate, or another value of which more is better or worse."""
T = TypeVar("T")
"""What a contender measured, where that is more than one value."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How often contenders are measured."""

    rounds: int
    repeats: int = 0
    """Rounds that are measured again, at most, since the machine was not quiet; those beyond count as they are."""
    look: quiet.Look = quiet.read


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def interleave(plan: Plan, contenders: Mapping[str, Measure]) -> Interleaved[float]:
    """Measures every contender once a round, in the order of `order_of`.

    A contender that fails is told and left out of later rounds; the others go on. A round in which the machine was not
    quiet is repeated as a whole, since ratios are taken within a round.
    """
    return take_turns(plan, contenders, float)


def order_of(names: Sequence[str], turn: int) -> list[str]:
    """The order of a round, counted from 0: turned by one each time, and backwards every other time. What the one
    before leaves behind, such as pages to be written, would otherwise always burden the same one."""
    first = turn % len(names)
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if turn % 2 else turned


def take_turns(plan: Plan, contenders: Mapping[str, Callable[[], T]], shown: Callable[[T], float]) -> Interleaved[T]:
    """The same for contenders that measure several things at once, of which `shown` is told as progress."""
    values: dict[str, list[T]] = {name: [] for name in contenders}
    errors: dict[str, str] = {}
    disturbed: list[str] = []
    names = list(contenders)
    repeats, done = plan.repeats, 0
    while done < plan.rounds:
        number = done + 1
        measured: dict[str, T] = {}
        disturbances: list[quiet.Disturbance] = []
        for name in order_of(names, done):
            if name in errors:
                continue
            began, before = time.monotonic(), plan.look()
            try:
                value = contenders[name]()
                told = shown(value)
            except Exception as error:  # noqa: BLE001 - told in the table; one failure must not cost the other rows
                errors[name] = f"{type(error).__name__}: {error}"
                say(f"    {name}: FAILED {errors[name]}")
                continue
            measured[name] = value
            say(f"    round {number}: {name}: {told:,.2f} ({time.monotonic() - began:.1f} s)")
            found = quiet.disturbance(before, plan.look())
            if found is not None:
                disturbances.append(found)
                say(f"    round {number}: {name}: the machine was not quiet: {found}")
        if disturbances and repeats:
            repeats -= 1
            say(f"    round {number} is repeated; {repeats} repeats are left")
            continue
        if disturbances:
            disturbed.append(f"round {number} ({quiet.worst(disturbances)})")
        for name, value in measured.items():
            values[name].append(value)
        done += 1
    return Interleaved(values, errors, ", ".join(disturbed))
