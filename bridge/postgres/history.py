"""What the samples in `bridge.sample` say of the last hour, day and month: series, as charts draw them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from bridge.postgres.connection import database_errors
from bridge.postgres.wire import Connection

Kind = Literal["bridge", "sink", "worker"]

Unit = Literal["events/s", "events", "seconds"]


@dataclass(frozen=True, slots=True)
class Span:
    """A time until now, in equal steps."""

    name: str
    step: int
    """Seconds."""
    steps: int


HOUR: Final = Span("hour", 15, 240)
DAY: Final = Span("day", 300, 288)
MONTH: Final = Span("month", 3600, 720)
SPANS: Final = {span.name: span for span in (HOUR, DAY, MONTH)}

_FINEST: Final = HOUR.step


@dataclass(frozen=True, slots=True)
class Slot:
    """What is known of one step."""

    seconds: float
    """For how long something was counted, over all processes."""
    counts: Mapping[str, float]
    levels: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart: a value for each step, None where nothing is known."""

    label: str
    unit: Unit
    start: datetime
    """When the first step begins."""
    step: int
    """Seconds."""
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class History:
    """The samples of a bridge, a sink or a worker over a span; the step that is not over yet is not in it."""

    kind: Kind
    name: str
    start: datetime
    step: int
    slots: Sequence[Slot | None]

    def rate(self, label: str, *counts: str) -> Series:
        """How many there were of all these counts, a second."""
        return self._series(label, "events/s", lambda slot: self._rate(slot, counts))

    def level(self, label: str, unit: Unit, name: str) -> Series:
        """The highest that was seen in each step."""
        return self._series(label, unit, lambda slot: slot.levels.get(name))

    def mean(self, label: str, unit: Unit, count: str) -> Series:
        """How many there were on average of what is counted in seconds."""
        return self._series(label, unit, lambda slot: slot.counts.get(count, 0.0) / self.step)

    def quantile(self, label: str, q: float) -> Series:
        """Of the durations of attempts, in seconds; `q` from 0 to 1. It lies between the bounds of a bucket, as if
        those in it were spread evenly. None where there was no attempt."""
        return self._series(label, "seconds", lambda slot: quantile(slot.counts, q))

    def _rate(self, slot: Slot, counts: Sequence[str]) -> float | None:
        total = sum(slot.counts.get(count, 0.0) for count in counts)
        if self.kind == "worker" or self.step != _FINEST:
            return total / self.step
        # One process leads, and what another had counted when it ended is not known: not over the whole step, then.
        return total / slot.seconds if slot.seconds >= 1.0 else None

    def _series(self, label: str, unit: Unit, value: Callable[[Slot], float | None]) -> Series:
        values = tuple(None if slot is None else value(slot) for slot in self.slots)
        return Series(label, unit, self.start, self.step, values)


_QUERY: Final = """
with asked as (
    select (floor(extract(epoch from clock_timestamp()) / %(step)s) * %(step)s)::bigint as ends
)
select a.ends, s.name, extract(epoch from s.at)::bigint, s.seconds, s.counts, s.levels
from asked a left join bridge.sample s
  on s.step = %(step)s and s.kind = %(kind)s and s.bridge = %(bridge)s
  and (%(names)s::text[] is null or s.name = any (%(names)s::text[]))
  and s.at >= to_timestamp(a.ends - %(length)s) and s.at < to_timestamp(a.ends)
"""


async def read_history(
    connection: Connection, kind: Kind, bridge: str, names: Sequence[str] | None, span: Span
) -> dict[str, History]:
    """By name, of these sinks or workers; with None, of all that there are samples of. `bridge` is empty for workers,
    and the name of a bridge itself is empty. Whoever is named and has no samples has a history without any.

    Raises DatabaseUnavailableError, PrivilegeError, SchemaError.
    """
    length = span.step * span.steps
    with database_errors():
        cursor = await connection.execute(
            _QUERY,
            {
                "step": span.step,
                "kind": kind,
                "bridge": bridge,
                "names": None if names is None else list(names),
                "length": length,
            },
        )
        rows = await cursor.fetchall()
    start = int(rows[0][0]) - length
    slots: dict[str, list[Slot | None]] = {name: [None] * span.steps for name in names or ()}
    for _, name, at, seconds, counts, levels in rows:
        if name is not None:
            of_name = slots.setdefault(name, [None] * span.steps)
            of_name[(at - start) // span.step] = Slot(seconds, counts, levels)
    began = datetime.fromtimestamp(start, UTC)
    return {name: History(kind, name, began, span.step, found) for name, found in sorted(slots.items())}


def quantile(counts: Mapping[str, float], q: float) -> float | None:
    """Of the durations that a worker's samples have counted by buckets, as `History.quantile` has it."""
    buckets = sorted((float(name[3:]), count) for name, count in counts.items() if name.startswith("le_"))
    total = sum(count for _, count in buckets)
    if total <= 0:
        return None
    wanted, seen, lower = q * total, 0.0, 0.0
    for bound, count in buckets:
        if seen + count >= wanted:
            # Above the last bound nothing is known but that.
            return lower if bound == float("inf") else lower + (bound - lower) * (wanted - seen) / count
        seen += count
        lower = bound
    return lower
