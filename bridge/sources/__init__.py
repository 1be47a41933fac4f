"""What a source is: it gives pages of events in order, and learns which of them are settled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bridge.brokers.contract import Never
from bridge.event import Event


@dataclass(frozen=True, slots=True)
class Page:
    """Events that were read together, in the order in which their keys must travel."""

    events: Sequence[Event]
    position: object
    """The source's position behind this page; only the source that made it knows its form."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that no retry can help."""

    event: Event
    sink: str | None
    """The sink that refused it; None when no route took it."""
    failure: Never
    attempts: int


class Source(Protocol):
    """Where events come from. Every method raises DatabaseUnavailableError once its session is lost."""

    async def read(self) -> Page:
        """The next page; waits until there is at least one event."""

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        """Keeps events that cannot be published; returns when they are stored durably enough to settle."""

    async def settle(self, page: Page) -> None:
        """Every event of this page, and of every page read before it, is confirmed or dead-lettered.

        A source that remembers so durably may do it a little later, for several pages at once.
        """
