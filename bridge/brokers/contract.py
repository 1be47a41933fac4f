"""What a sink is: the contract that every broker's adapter keeps, and `tests/contract/` checks.

A sink is opened, publishes batches, and is closed. It never retries and never reconnects on its own:
the relay decides, since only the relay knows the order in which keys must travel. So, once a connection
is lost, every `publish` answers with retryable failures until `open` is called again.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal, Protocol

from bridge.event import Event, Malformed


@dataclass(frozen=True, slots=True)
class Declaration:
    """One thing that must stand on a broker."""

    kind: str
    """``exchange``, ``queue``, ``binding``, ``stream``, ``consumer``, ``topic``, ``subscription``."""
    name: str
    state: Literal["present", "missing", "declared", "differs"]
    detail: str = ""
    """What it is declared with; for ``differs``, what is in the way and how to mend it."""


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


Verdict = Literal["keep", "replay", "discard"]


@dataclass(frozen=True, slots=True)
class Letter:
    """An event that was given up, and why."""

    id: str
    """``outbox:<number>``, or ``<worker>:<event id>``; a message that is no event has another id behind the colon."""
    box: str
    """``outbox``, or the worker's name."""
    event_id: str | None
    topic: str | None
    """Event id and topic are None for a message that is no event."""
    key: str | None
    sink: str | None
    """The sink that refused it (None: no route took it), or whose broker holds the worker's queue."""
    code: str
    reason: str
    attempts: int
    failed_at: datetime | None
    payload: bytes | None = None
    """None where it was not asked for."""
    content_type: str | None = None
    created_at: datetime | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    trace: str = ""
    """The worker's traceback, where there is one."""


Decide = Callable[[Letter], Awaitable[Verdict]]


class LetterBox(Protocol):
    """The dead letters of one worker. An entry point of the group ``pgbridge.dead_letters`` gives them by name."""

    async def walk(self, decide: Decide) -> None:
        """Shows `decide` every letter that stands there now, once; does what it says, and leaves the others.

        A replayed letter is first confirmed in the worker's queue, and then removed: after a crash in between it may
        stand in both. Raises BrokerUnavailableError, TopologyError, RefusedError.
        """


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
