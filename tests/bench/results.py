"""What a row of the benchmark is, and the arithmetic from rounds to ratios."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Generic, Literal, TypeVar

Rounds = Sequence[float]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """What a row must reach: its ratio, or our own value, at least or at most `bound`."""

    what: Literal["ratio", "ours"]
    direction: Literal[">=", "<=", ">"]
    bound: float

    def __str__(self) -> str:
        return f"{self.what} {self.direction} {self.bound:g}"

    def met(self, value: float) -> bool:
        if self.direction == ">=":
            return value >= self.bound
        return value <= self.bound if self.direction == "<=" else value > self.bound


def at_least(ratio: float) -> Target:
    """Our rate divided by the peer's is at least this."""
    return Target("ratio", ">=", ratio)


def faster() -> Target:
    """Our rate is above the peer's."""
    return Target("ratio", ">", 1.0)


def within(ratio: float) -> Target:
    """Our value is at most this many times the peer's, where less is better."""
    return Target("ratio", "<=", ratio)


def at_most(value: float) -> Target:
    """Our value, in the row's unit, is at most this."""
    return Target("ours", "<=", value)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Value n of `ours` and of `peer` come from the same round."""

    row: str
    unit: str
    ours: Rounds
    peer: Rounds = ()
    """Empty when the row has no peer."""
    peer_name: str = ""
    target: Target | None = None
    error: str = ""
    """Why there is no value, or not all of them; a row with an error never meets its target."""
    not_quiet: str = ""
    """Rounds that count although the machine was not quiet, with what else ran."""
    ratios: Rounds = field(init=False, default=())

    def __post_init__(self) -> None:
        # Ratios within a round: what slows the machine for a while slows both sides of it.
        pairs = zip(self.ours, self.peer, strict=bool(self.peer) and not self.error)
        object.__setattr__(self, "ratios", tuple(ours / peer for ours, peer in pairs))

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the target; None when there is none."""
        if self.target is None:
            return None
        values = self.ratios if self.target.what == "ratio" else self.ours
        return not self.error and bool(values) and self.target.met(median(values))


def as_json(row: Row) -> dict[str, Any]:
    """As build/bench.json has it; numbers are medians, `rounds` holds every value."""
    return {
        "row": row.row,
        "unit": row.unit,
        "ours": median(row.ours) if row.ours else None,
        "peer": median(row.peer) if row.peer else None,
        "peer_name": row.peer_name or None,
        "ratio": median(row.ratios) if row.ratios else None,
        "ratio_min": min(row.ratios, default=None),
        "ratio_max": max(row.ratios, default=None),
        "target": str(row.target) if row.target else None,
        "met": row.met,
        "error": row.error or None,
        "not_quiet": row.not_quiet or None,
        "rounds": {"ours": list(row.ours), "peer": list(row.peer)},
    }


def write_json(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([as_json(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def number(value: float) -> str:
    """Three significant digits, or all digits before the point: 31415, 314, 31.4, 3.14, 0.0314."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, padded so that a terminal shows it aligned."""
    lines = [["what", "unit", "ours", "peer", "beside", "ratio [min..max]", "target", "met"]]
    lines += [_cells(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    body = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    # The whole text is in the JSON; of a stack trace, the last line says what happened.
    notes = [f"FAILED {row.row}: {row.error.strip().splitlines()[-1]}" for row in rows if row.error]
    # Rows that share their rounds share one line.
    told = dict.fromkeys(row.not_quiet for row in rows if row.not_quiet)
    notes += [f"not quiet: {why}: {'; '.join(row.row for row in rows if row.not_quiet == why)}" for why in told]
    return "\n".join([*body, *(["", *notes] if notes else [])])


def _cells(row: Row) -> list[str]:
    ratio = ""
    if row.ratios:
        ratio = f"{median(row.ratios):.2f} [{min(row.ratios):.2f}..{max(row.ratios):.2f}]"
    met = "FAILED" if row.error else {None: "", True: "yes", False: "NO"}[row.met]
    return [
        row.row,
        row.unit,
        number(median(row.ours)) if row.ours else "",
        number(median(row.peer)) if row.peer else "",
        row.peer_name,
        ratio,
        str(row.target) if row.target else "",
        met,
    ]


@dataclass(frozen=True)
class Interleaved(Generic[T]):
    """What contenders that took turns measured, by name of the contender; every list has one value a round."""

    values: Mapping[str, Sequence[T]]
    errors: Mapping[str, str]
    not_quiet: str = ""
    """As a row has it."""

    def each(self, part: Callable[[T], float]) -> "Interleaved[float]":
        """One value of each measurement."""
        values = {name: [part(one) for one in measured] for name, measured in self.values.items()}
        return Interleaved(values, self.errors, self.not_quiet)

    def row(
        self: "Interleaved[float]",
        row: str,
        unit: str,
        peer: str = "",
        target: Target | None = None,
        ours: str = "ours",
    ) -> Row:
        """The row of one peer, or of none."""
        error = "; ".join(f"{name}: {self.errors[name]}" for name in (ours, peer) if name in self.errors)
        others = self.values[peer] if peer else ()
        return Row(row, unit, self.values[ours], others, peer, target, error, self.not_quiet)
