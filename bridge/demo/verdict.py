"""The final count: what was committed beside what arrived, and what was asked for beside what is there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridge.demo.brokers import Arrivals
from bridge.demo.figures import Figures, FiguresReader
from bridge.demo.screen import milliseconds


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a run."""

    broker: str
    wanted: int
    """Orders that were to be placed."""
    figures: Figures
    messages: int
    duplicates: int
    dead_letters: int
    missing_events: int
    """Committed, and never seen at the broker."""
    missing_pdfs: tuple[str, ...]
    """Invoices that were asked for, and whose file is missing or not as the database says."""
    wrongly_charged: tuple[str, ...]
    """Orders that were not charged once, with their total."""
    charges: int
    """How often money moved."""
    deliveries: int
    """Different webhooks that the partner got."""
    missing_deliveries: int
    """Webhooks that are on record as taken, or should be, and that the partner never got."""
    warnings: tuple[int, int]
    """Plain notifications: sent, heard."""
    seconds: float
    kills: tuple[str, ...]
    faults: tuple[str, ...]
    """What else went wrong."""

    @property
    def lost(self) -> int:
        return self.missing_events + len(self.missing_pdfs) + self.missing_deliveries

    @property
    def good(self) -> bool:
        """Whether nothing is lost, and every order has its invoice and was charged once."""
        figures = self.figures
        whole = figures.orders == figures.invoices == figures.payments == self.wanted
        return self.lost == 0 and whole and not (self.wrongly_charged or self.dead_letters or self.faults)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        sent, heard = self.warnings
        return {
            "broker": self.broker,
            "orders": self.figures.orders,
            "events": self.figures.events,
            "messages": self.messages,
            "invoices": self.figures.invoices,
            "payments": self.figures.payments,
            "charges": self.charges,
            "deliveries": self.deliveries,
            "dead_letters": self.dead_letters,
            "lost": self.lost,
            "duplicates": self.duplicates,
            "notifications": {"sent": sent, "heard": heard},
            "latency_ms": {"p50": _rounded(self.figures.p50), "p99": _rounded(self.figures.p99)},
            "seconds": round(self.seconds, 2),
            "kills": len(self.kills),
        }

    def lines(self) -> list[str]:
        """For people."""
        figures = self.figures
        lines = [
            f"{figures.orders:,} orders became {figures.events:,} events, {self.messages:,} messages on {self.broker} "
            f"and {figures.invoices:,} invoices in {self.seconds:.1f} s.",
            f"{self.charges:,} charges paid {figures.payments:,} of them; a partner got {self.deliveries:,} webhooks.",
            f"Lost {self.lost}, repeated {self.duplicates}, dead letters {self.dead_letters}. "
            f"From commit to stored reply: p50 {milliseconds(figures.p50)}, p99 {milliseconds(figures.p99)}.",
        ]
        sent, heard = self.warnings
        if heard < sent:
            lines.append(
                f"Plain pg_notify: {heard} of {sent} heard. PostgreSQL keeps none for a bridge that is down; "
                "bridge.notify() would have."
            )
        if self.kills:
            lines.append(f"Killed with SIGKILL on the way: {', '.join(self.kills)}.")
        return lines + [f"FAILED: {problem}" for problem in self.problems()]

    def problems(self) -> list[str]:
        """Why it is not good; empty when it is."""
        found = list(self.faults)
        if self.missing_events:
            found.append(f"{self.missing_events} events were committed and never arrived at the broker")
        if self.missing_pdfs:
            some = ", ".join(self.missing_pdfs[:5])
            found.append(f"{len(self.missing_pdfs)} invoices have no PDF that matches size and SHA-256: {some}")
        if self.wrongly_charged:
            some = ", ".join(self.wrongly_charged[:5])
            found.append(f"{len(self.wrongly_charged)} orders were not charged once with their total: {some}")
        if self.figures.payments != self.figures.orders:
            found.append(f"{self.figures.payments} of {self.figures.orders} orders are paid, as far as the shop knows")
        if self.missing_deliveries:
            found.append(f"{self.missing_deliveries} webhooks never reached the partner")
        if self.figures.orders != self.wanted:
            found.append(f"{self.figures.orders} orders are in the table, {self.wanted} were placed")
        if self.dead_letters:
            found.append(f"{self.dead_letters} dead letters; their reasons are in the logs and in bridge.dead_letter")
        return found


async def count(
    reader: FiguresReader,
    arrivals: Arrivals,
    received: Mapping[str, int],
    charges: Sequence[Mapping[str, Any]],
    *,
    broker: str,
    wanted: int,
    refused: int,
    seconds: float,
    kills: tuple[str, ...],
    faults: tuple[str, ...],
) -> Verdict:
    """Counts, once nothing runs any more but database, broker and who is outside: `received` are the partner's webhooks
    by their ids, `charges` Stripe's. `refused`: dead letters of the workers.

    Raises psycopg.OperationalError when the database is down.
    """
    events = await reader.event_ids()
    figures = await reader.read()
    return Verdict(
        broker=broker,
        wanted=wanted,
        figures=figures,
        messages=arrivals.messages,
        duplicates=arrivals.duplicates,
        dead_letters=figures.unpublished + refused,
        missing_events=len(events - arrivals.counts.keys()),
        missing_pdfs=tuple(await reader.invoices_without_pdf()),
        wrongly_charged=tuple(wrongly_charged(await reader.owed(), charges)),
        charges=len(charges),
        deliveries=len(received),
        missing_deliveries=max(0, figures.orders - len(received)),
        warnings=await reader.warnings(),
        seconds=seconds,
        kills=kills,
        faults=faults,
    )


def wrongly_charged(owed: Mapping[str, int], charges: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The orders that were not charged once with what is owed, in cents by order; and those that nobody placed."""
    paid: dict[str, list[int]] = {number: [] for number in owed}
    for charge in charges:
        paid.setdefault(charge["metadata"].get("order", "of no order"), []).append(charge["amount"])
    return (number for number, amounts in sorted(paid.items()) if amounts != [owed.get(number)])


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
