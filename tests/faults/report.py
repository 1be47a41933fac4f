"""What the suite found: one table for people, one JSON file for programs."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.table import Table

MOST_REPEATS = 0.01
"""Repeats of an event that arrives while the broker is only slow."""


@dataclass
class Row:
    """One kind of fault; times in seconds, from the fault's begin until a later event arrives."""

    kind: str
    count: int
    recovery_median: float
    recovery_max: float

    @classmethod
    def of(cls, kind: str, times: list[float]) -> Self:
        return cls(kind, len(times), round(statistics.median(times), 2), round(max(times), 2))


@dataclass
class Report:
    """The counts. Queues are counted by themselves: an event that belongs into two of them can be lost twice."""

    faults: int
    committed: int
    rolled_back: int
    """Transactions."""
    commits_looked_up: int
    """Commits that a fault interrupted: whether they were made was looked up afterwards."""
    lost: list[str]
    """Events that are neither in a queue that they belong into nor, if they are poison, a dead letter."""
    unknown_to_writers: int
    """Events that arrived though no writer knows them: committed, or the suite counts wrongly."""
    poisoned: int
    """Events that may become dead letters."""
    dead_letters: int
    wrong_dead_letters: list[str]
    """Events that any broker takes, and that were given up all the same."""
    duplicates: int
    replies: int
    replies_wanted: int
    events_without_one_reply: int
    out_of_order: list[str]
    held_up: list[str]
    """Faults of one sink that stopped the other."""
    rows: list[Row]
    broker: str = ""
    seed: int = 0
    seconds: float = 0.0
    events_under_slowness: int = 0
    """That arrived while nothing was wrong but that the broker was slow."""
    repeats_under_slowness: int = 0
    wrong_ends: list[str] = field(default_factory=list)
    """Processes that ended by a traceback, or saying that their settings are wrong."""

    @property
    def passed(self) -> bool:
        """Nothing lost, nothing invented, every reply once, every key in order, and no flood where all is only slow."""
        return not (
            self.lost
            or self.unknown_to_writers
            or self.wrong_dead_letters
            or self.out_of_order
            or self.events_without_one_reply
            or self.replies != self.replies_wanted
            or self.held_up
            or self.wrong_ends
            or self.repeats_under_slowness > MOST_REPEATS * self.events_under_slowness
        )

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def show(self) -> None:
        """As a table and one line."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("fault")
        for column in ("count", "recovery, median", "recovery, max"):
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(row.kind, str(row.count), f"{row.recovery_median:.2f} s", f"{row.recovery_max:.2f} s")
        table.add_row("all", str(self.faults), "", "")
        console = Console(width=100)
        console.print(table)
        console.print(f"\n{self.line}", soft_wrap=True)
        for words in self.wrong[:50]:
            console.print(words, soft_wrap=True, markup=False)

    @property
    def wrong(self) -> list[str]:
        """What was found to be wrong, one by one."""
        return self.lost + self.out_of_order + self.wrong_dead_letters + self.held_up + self.wrong_ends

    @property
    def line(self) -> str:
        """The counts in words."""
        return (
            f"{self.committed} events committed, {len(self.lost)} lost, {len(self.out_of_order)} out of order within "
            f"their key, {self.duplicates} repeats at the queues, {self.repeats_under_slowness} of them among the "
            f"{self.events_under_slowness} events under slowness alone, {self.poisoned} poisoned rows, "
            f"{self.dead_letters} dead letters ({len(self.wrong_dead_letters)} wrong), {self.replies} replies run of "
            f"{self.replies_wanted}, {len(self.held_up)} held up by another sink, {len(self.wrong_ends)} wrong exits "
            f"({self.broker}, {self.seconds:.0f} s, {self.faults} faults, seed {self.seed})"
        )
