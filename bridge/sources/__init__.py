"""What a source is: it gives one sink's events in order, page by page, and learns which of them are settled."""

from collections.abc import Collection, Sequence
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
    """Where one sink's events come from. Every method raises DatabaseUnavailableError once its session is lost."""

    async def read(self, most: int) -> Page:
        """The next page, of at most `most` events; waits until there is something. A page may hold no event for this
        sink, and moves the position all the same."""

    async def dead_letter(self, letters: Sequence[DeadLetter]) -> None:
        """Keeps events that cannot be published; returns when they are stored durably enough to settle."""

    async def settle(self, position: object, held: Collection[int]) -> None:
        """All that was read up to this page's position is confirmed or dead-lettered, but for what is held: those
        events, by their places in the log (`Event.sequence`), must be read again by whoever reads next.

        A source that remembers so durably may do it a little later, for several pages at once.
        """
