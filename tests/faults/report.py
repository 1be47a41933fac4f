"""What the suite found: one table for people, one JSON file for programs."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.table import Table

from tests.faults.outcomes import Outcomes

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
    workers: Outcomes = field(default_factory=Outcomes)
    """What became of the events at their workers."""
    health: dict[str, int] = field(default_factory=dict)
    """Answers of the workers to `/health`: ok, failing, and silent for none."""
    failing_during: dict[str, int] = field(default_factory=dict)
    """Of the failing ones, during which kinds of fault they came; "none": while things recovered."""
    health_must_fail: bool = False
    """Whether there was a fault that somebody who asks must see."""

    @property
    def passed(self) -> bool:
        """Nothing lost, nothing invented, every key in order, every event handled once or given up as it must be, none
        in hand at the end, and no flood where all is only slow."""
        return not (
            self.lost
            or self.unknown_to_writers
            or self.wrong_dead_letters
            or self.out_of_order
            or self.workers.wrong
            or self.workers.left
            or self._health_is_blind
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
        health = ["the health of no worker has shown any fault"] if self._health_is_blind else []
        bridges = self.lost + self.out_of_order + self.wrong_dead_letters + self.held_up + self.wrong_ends
        return bridges + self.workers.left + self.workers.wrong + health

    @property
    def _health_is_blind(self) -> bool:
        return self.health_must_fail and not self.health.get("failing")

    @property
    def line(self) -> str:
        """The counts in words."""
        return (
            f"{self.committed} events committed, {len(self.lost)} lost, {len(self.out_of_order)} out of order within "
            f"their key, {self.duplicates} repeats at the queues, {self.repeats_under_slowness} of them among the "
            f"{self.events_under_slowness} events under slowness alone, {self.poisoned} poisoned rows, "
            f"{self.dead_letters} dead letters ({len(self.wrong_dead_letters)} wrong), {self._workers_line}, "
            f"{len(self.held_up)} held up by another sink, {len(self.wrong_ends)} wrong exits "
            f"({self.broker}, {self.seconds:.0f} s, {self.faults} faults, seed {self.seed})"
        )

    @property
    def _workers_line(self) -> str:
        workers, health = self.workers, self.health
        return (
            f"{workers.replies} replies run of {workers.replies_wanted}, {workers.letters} events given up of "
            f"{workers.letters_wanted} ({workers.repeated_letters} letters repeated, {workers.unnoted_letters} not "
            f"noted), {workers.shipped} effects ({workers.shipped_again} again, under the same key), "
            f"{workers.overtaken} out of order at the ordered worker, {len(workers.wrong)} wrong outcomes, "
            f"{len(workers.left)} left in hand, health ok "
            f"{health.get('ok', 0)} times, failing {health.get('failing', 0)}, silent {health.get('silent', 0)}"
        )
