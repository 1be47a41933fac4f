"""What a sink is: the contract that every broker's adapter keeps, and `tests/contract/` checks.

A sink is opened, publishes batches, and is closed. It never retries and never reconnects on its own:
the relay decides, since only the relay knows the order in which keys must travel. So, once a connection
is lost, every `publish` answers with retryable failures until `open` is called again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from bridge.event import Event
from bridge.observe.topology import Declaration


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The broker holds the message durably."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The broker, or the sink before sending, refused the message; it is not in any queue."""

    retryable: bool
    """May be taken later (a full queue, a lost connection), or never (unroutable, too large)."""
    code: str
    """A stable word: ``unroutable``, ``too_large``, ``malformed``, ``nacked``, ``disconnected``, ``behind``, ..."""
    reason: str
    """One sentence for a person."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """It may or may not have arrived: a time-out, or the connection went before the confirm came."""

    reason: str


Outcome = Confirmed | Failed | Unknown

CONFIRMED: Final = Confirmed()
"""The one instance that sinks return, so that the common case allocates nothing."""


class Sink(Protocol):
    """One broker. `bridge.daemon` finds the class by its entry point and builds it from its settings alone.

    The class carries the model of those settings as `Settings`, a subclass of `bridge.settings.SinkSettings`.
    """

    @property
    def is_open(self) -> bool:
        """Whether `publish` can reach the broker. False before `open` and once a connection is lost."""

    async def open(self) -> None:
        """Connects, and checks that what it publishes to exists; declares nothing. Safe to call again after a loss.

        Raises BrokerUnavailableError, TopologyError that points to `pgbridge topology --apply`, or another
        RefusedError where the broker refuses the login.
        """

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        """Publishes a batch in order and waits for its confirms; outcome n is that of event n.

        Several calls may be in flight; messages leave in the order of the calls. The bytes are handed to
        the connection before the first suspension of a call that need not wait for room to write, so
        the order of calls is the order on the wire. Raises nothing: whatever goes wrong is an outcome.
        """

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """What the broker has of what this sink needs; with `apply`, what is missing is declared first.

        Needs no `open`; raises BrokerUnavailableError.
        """

    async def close(self) -> None:
        """Disconnects. What is in flight becomes Unknown."""
