"""What a person sees while the demo runs: a table that is drawn anew on a terminal, lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bridge.demo.figures import Figures

_LINE_INTERVAL: Final = 2.0
"""Seconds between two lines, where there is no terminal."""
_LINE_INTERVAL_UNCHANGED: Final = 10.0
"""Seconds between two lines that say the same."""


@dataclass
class State:
    """Everything that is shown."""

    broker: str
    orders: int
    """How many are to be placed."""
    started: float = field(default_factory=time.monotonic)
    figures: Figures = field(default_factory=Figures)
    messages: int = 0
    duplicates: int = 0
    refused: int = 0
    """Dead letters of the workers."""
    processes: dict[str, tuple[bool, int]] = field(default_factory=dict)
    """By name: whether it runs, and how often it was started."""
    kills: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Since the first order."""
        return time.monotonic() - self.started

    @property
    def dead_letters(self) -> int:
        """Of the bridge and of the workers."""
        return self.figures.unpublished + self.refused

    @property
    def on_the_way(self) -> int:
        """Events in the log that have not been seen at the broker yet."""
        return max(0, self.figures.events - self.messages)


class Screen:
    """Shows a State, which others change."""

    def __init__(self, console: Console, state: State) -> None:
        self._console = console
        self._state = state
        self._live: Live | None = None
        self._printed = ""
        self._printed_at = float("-inf")

    def say(self, text: str) -> None:
        """One line about what happens before or after the orders."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draws the table, on a terminal, until the context ends."""
        if not self._console.is_terminal:
            yield
            return
        with Live(self._picture(), console=self._console, auto_refresh=False) as self._live:
            yield

    def refresh(self, *, last: bool = False) -> None:
        """Shows the State as it is now; elsewhere than on a terminal every other second, and less when it is still."""
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
            return
        line, waited = self._line(), time.monotonic() - self._printed_at
        if last or waited >= (_LINE_INTERVAL if line != self._printed else _LINE_INTERVAL_UNCHANGED):
            self._printed, self._printed_at = line, time.monotonic()
            self.say(f"{self._state.seconds:6.1f} s  {line}")

    def _line(self) -> str:
        state, figures = self._state, self._state.figures
        killed = f"  killed {', '.join(state.kills)}" if state.kills else ""
        return (
            f"orders {figures.orders}/{state.orders}  events {figures.events}  messages {state.messages}  "
            f"invoices {figures.invoices}  payments {figures.payments}  webhooks {figures.deliveries}  "
            f"dead letters {state.dead_letters}  on the way {state.on_the_way}  "
            f"p50 {milliseconds(figures.p50)}  p99 {milliseconds(figures.p99)}{killed}"
        )

    def _picture(self) -> RenderableType:
        state, figures = self._state, self._state.figures
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True, width=18)
        table.add_column(justify="right", no_wrap=True, width=13)
        table.add_column(style="dim")
        table.add_row("Orders placed", f"{figures.orders:,}/{state.orders:,}", self._bar(figures.orders))
        table.add_row("Events in the log", f"{figures.events:,}", "committed together with the orders")
        table.add_row("Messages", f"{state.messages:,}", self._road())
        table.add_row("Invoices (PDF)", f"{figures.invoices:,}/{state.orders:,}", self._bar(figures.invoices))
        table.add_row("Payments", f"{figures.payments:,}/{state.orders:,}", self._bar(figures.payments))
        table.add_row("Webhooks", f"{figures.deliveries:,}/{state.orders:,}", self._bar(figures.deliveries))
        dead = Text(f"{state.dead_letters:,}", style="red bold" if state.dead_letters else "")
        table.add_row("Dead letters", dead)
        p99 = f"median, p99 {milliseconds(figures.p99)}, commit to reply"
        table.add_row("Latency", milliseconds(figures.p50), p99)
        kills = [Text(f"kill -9: {', '.join(state.kills)}", style="yellow")] if state.kills else []
        return Panel(
            Group(table, Text(), self._processes(), *kills),
            title=f"pgbridge demo: PostgreSQL to {state.broker}",
            subtitle=f"{state.seconds:.0f} s",
            width=min(78, self._console.width),
        )

    def _road(self) -> str:
        again = f", {self._state.duplicates:,} repeated" if self._state.duplicates else ""
        return f"at the broker, {self._state.on_the_way:,} on the way{again}"

    def _bar(self, done: int) -> ProgressBar:
        return ProgressBar(total=self._state.orders, completed=done, width=30)

    def _processes(self) -> Text:
        parts: list[tuple[str, str] | str] = []
        for name, (running, starts) in self._state.processes.items():
            parts += [("● ", "green" if running else "red"), name]
            parts += [(f" ×{starts}", "yellow")] if starts > 1 else []
            parts.append("   ")
        return Text.assemble(*parts)


def milliseconds(value: float | None) -> str:
    """``12.3 ms``; a dash for what is not known."""
    return "-" if value is None else f"{value:,.1f} ms" if value < 100 else f"{value:,.0f} ms"
