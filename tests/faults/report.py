"""What the suite found: one table for people, one JSON file for programs."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.table import Table


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
    """The counts. `replies` must equal `committed`, each event once."""

    faults: int
    committed: int
    rolled_back: int
    """Transactions."""
    commits_looked_up: int
    """Commits that a fault interrupted: whether they were made was looked up afterwards."""
    lost: int
    unknown_to_writers: int
    """Events that arrived though no writer knows them: committed, or the suite counts wrongly."""
    dead_letters: int
    duplicates: int
    replies: int
    events_without_one_reply: int
    order_violations: int
    rows: list[Row]
    seed: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Nothing lost, nothing invented, every reply once, every key in order."""
        return not (
            self.lost
            or self.unknown_to_writers
            or self.dead_letters
            or self.order_violations
            or self.events_without_one_reply
            or self.replies != self.committed
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
        console.print(
            f"\n{self.committed} events committed, {self.lost} lost, {self.duplicates} duplicates at the queue, "
            f"{self.replies} replies run, {self.order_violations} out of order within their key "
            f"({self.seconds:.0f} s, seed {self.seed})",
            soft_wrap=True,
        )
