"""What a queue is: the contract that every broker's consumer keeps, and `tests/contract/` checks."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from bridge.event import Event, Malformed
from bridge.observe.topology import Declaration


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a delivery was not handled; it travels with a dead letter."""

    code: str
    """``rejected``, ``malformed``, ``attempts_exhausted``, ``timeout``, ``error``."""
    reason: str
    """One sentence."""
    trace: str = ""
    """The traceback, where there is one."""


class Delivery(Protocol):
    """One message in hand. Exactly one of its four verbs ends it; each returns once the broker has taken it."""

    @property
    def event(self) -> Event | Malformed:
        """The event, or why the message is none."""

    @property
    def attempt(self) -> int:
        """1 at the first delivery; counts attempts that ended in `retry` or in a crash, not in `give_back`."""

    async def ack(self) -> None:
        """Handled: never deliver it again."""

    async def retry(self, delay: float) -> None:
        """Deliver it again after about `delay` seconds (rounded up to a delay that the queue offers)."""

    async def dead_letter(self, failure: Failure) -> None:
        """Move it, with the failure and its attempts, to the worker's dead-letter queue."""

    async def give_back(self) -> None:
        """Not tried: deliver it again at once, to anyone, without counting an attempt."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """What a worker wants of a broker."""

    worker: str
    """Names the queue: ``<worker>``, ``<worker>.retry.<delay>``, ``<worker>.dead``."""
    topics: Sequence[str]
    prefetch: int
    """Most deliveries in hand at once."""
    retry_delays: Sequence[float]
    """Seconds; the ladder of delays between attempts, ascending."""
    max_attempts: int
    ack_wait: float
    """Seconds after which a delivery goes to another worker, unless its queue, alive, extends that: a crash's delay."""


class Queue(Protocol):
    """One worker's queue on one broker: built as ``Queue(settings of the sink, subscription)``."""

    async def open(self) -> None:
        """Connects, and checks that its queue exists; declares nothing.

        Raises BrokerUnavailableError, or TopologyError that points to `pgbridge topology --apply`.
        """

    def deliveries(self) -> AsyncIterator[Delivery]:
        """Messages as they come; ends after `stop`. Raises BrokerUnavailableError when the connection is lost."""

    async def stop(self) -> None:
        """No new deliveries; those in hand can still be settled."""

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """What the broker has of what this worker needs; with `apply`, what is missing is declared first.

        Needs no `open`; raises BrokerUnavailableError.
        """

    async def close(self) -> None:
        """Disconnects; the broker redelivers what was not settled."""
