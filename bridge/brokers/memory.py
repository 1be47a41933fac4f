"""A sink in this process: for dry runs, and for tests that need no broker."""

from collections.abc import Callable, Sequence

from bridge.brokers.contract import CONFIRMED, Confirmed, Failed, Outcome, Unknown
from bridge.event import Event
from bridge.observe.topology import Declaration
from bridge.settings import SinkSettings

_NOT_OPEN = Failed(True, "disconnected", "the sink is not open")


class MemorySettings(SinkSettings):
    """Nothing but what every sink has."""


class MemorySink:
    """Keeps what it confirms, in order."""

    Settings = MemorySettings

    def __init__(
        self,
        settings: MemorySettings,
        answer: Callable[[Event], Outcome] = lambda event: CONFIRMED,
    ) -> None:
        """`answer` decides each event's outcome; it may be replaced at any time."""
        self.settings = settings
        self.answer = answer
        self.held: dict[str, Event] = {}
        """What arrived, by event id, in the order of first arrival."""
        self.arrivals: list[Event] = []
        """What arrived, with repetitions."""
        self._open = False

    @property
    def is_open(self) -> bool:
        """As `Sink.is_open`."""
        return self._open

    async def open(self) -> None:
        """As `Sink.open`; nothing can be missing."""
        self._open = True

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        """As `Sink.publish`. An event that `answer` calls Unknown has arrived, which is the harder case."""
        return [self._take(event) for event in events]

    def _take(self, event: Event) -> Outcome:
        outcome = self.answer(event) if self._open else _NOT_OPEN
        if isinstance(outcome, Confirmed | Unknown):
            self.held.setdefault(event.id, event)
            self.arrivals.append(event)
        return outcome

    def disconnect(self) -> None:
        """Loses the connection, as a broker's crash would."""
        self._open = False

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """As `Sink.topology`: memory needs nothing."""
        return []

    async def close(self) -> None:
        """As `Sink.close`."""
        self._open = False
