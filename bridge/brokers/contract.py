"""What a broker is to pgbridge: the ports that every folder beside this file implements, and `tests/contract/` checks.

- A `Broker` is one kind of broker, under the name that a sink's `type` has in the settings. It is found through
  the entry points of the group ``pgbridge.brokers``, and makes everything else from the settings of one sink.
- A `Sink` publishes events, and says of each what became of it.
- A `Queue` gives a worker its deliveries; a `Delivery` is settled by exactly one of its verbs.
- `DeadLetters` are the deliveries that a worker gave up.
- A `Declaration` is one thing that must exist on a broker before any of this can work.

None of them retries, and none connects again by itself: whoever uses them decides when, since only the user of a port
knows in which order things must happen.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, Protocol, runtime_checkable

from bridge.brokers.accounts import Accounts, Installation
from bridge.event import Event, Malformed
from bridge.settings import SinkSettings


class Broker(Protocol):
    """One kind of broker. The object is made when the settings are read, so it imports client libraries only on use."""

    @property
    def settings(self) -> type[SinkSettings]:
        """The model of ``[sinks.<name>]`` with this `type`."""

    @property
    def requires(self) -> str | None:
        """The module of the client library without which it cannot work; None when pgbridge always brings it."""

    def sink(self, settings: Any, /) -> "Sink":
        """The way to publish there, not yet open. Raises SettingsError."""

    def queue(self, settings: Any, subscription: "Subscription", /) -> "Queue":
        """The queue of one worker, not yet open. Raises SettingsError."""

    @property
    def example(self) -> str | None:
        """A place where it may be, for `pgbridge init`, which does not offer a broker without one."""

    def accounts(self, installation: Installation, /) -> Accounts:
        """What `pgbridge init` writes for it. Raises ValueError, in words that may follow a setting's key, where the
        place cannot be one. Not called without an `example`."""

    def dead_letters(self, settings: Any, worker: str, /, *, lanes: int = 1) -> "DeadLetters | None":
        """What this worker gave up; None on a broker that keeps no dead letters. `lanes` as in `Subscription`, for a
        broker that has any."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """One thing that must exist on a broker."""

    kind: str
    """``exchange``, ``queue``, ``binding``, ``stream``, ``consumer``, ``topic``, ``subscription``."""
    name: str
    state: Literal["present", "missing", "declared", "differs"]
    detail: str = ""
    """What it is declared with; for ``differs``, what is in the way and how to correct it."""
    assumed: bool = False
    """Whether ``present`` is not what the broker says, since it does not say, or not to this login."""


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The broker holds the message durably."""


@dataclass(frozen=True, slots=True)
class Never:
    """No other try can help: nothing takes the topic, the message is too large, it has no form on this broker."""

    code: str
    """A stable word for metrics and filters: ``unroutable``, ``too_large``, ``malformed``, ``access_refused``, ..."""
    reason: str
    """One sentence for a person."""


class Unsendable(Exception):  # noqa: N818 - named for what the event is
    """Raised where an event should become a message and has no form on this broker; its sink answers with `outcome`."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome = Never(code, reason)


@dataclass(frozen=True, slots=True)
class NotSent:
    """It never reached the broker, whose connection was lost or took no more; what followed in its key neither."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The broker said no for now, as a full queue does. A later event of its key may have been taken meanwhile."""

    reason: str
    in_order: bool = False
    """The sink itself let nothing of the key go behind it."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """It may or may not have arrived: the connection went before the confirm came."""

    reason: str
    poisoned: bool = False
    """The broker ended the connection over a message that it cannot take, one of those that became Unknown with it."""


Outcome = Confirmed | Never | NotSent | Refused | Unknown

CONFIRMED: Final = Confirmed()
"""The one instance that sinks return, so that the common case allocates nothing."""


class Sink(Protocol):
    """Publishes to one broker. Once a connection is lost, every `publish` answers `NotSent` until `open` is called."""

    @property
    def is_open(self) -> bool:
        """Whether `publish` can reach the broker. False before `open` and once a connection is lost."""

    @property
    def stalled(self) -> str | None:
        """Why what was published waits although the connection lives: the broker blocks publishers, or has confirmed
        nothing for longer than a second. None while nothing waits, and while confirms come. Once the connection is
        lost: how it ended, where that is known."""

    @property
    def pipelines(self) -> bool:
        """Whether a key's events may be on the way together. False where the broker is known to refuse single messages
        while it takes later ones, as a NATS stream with `discard = new` does at its limit."""

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

        Late is not lost: while the connection lives, a call waits for its confirms, however long they take, and answers
        neither Unknown nor NotSent. A sink ends its connection itself once it has heard nothing of what it published
        for `publish_timeout` (and the broker does not say that it blocks publishers), after counting what had come.
        """

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """What the broker has of what this sink needs; with `apply`, what is missing is declared first.

        Needs no `open`; raises BrokerUnavailableError.
        """

    async def close(self) -> None:
        """Disconnects. What is in flight becomes Unknown."""


@runtime_checkable
class InspectableSink(Protocol):
    """A sink that finds out before a run whether its login may do what a run needs."""

    async def inspect(self, topics: Sequence[str]) -> Sequence[str]:
        """Looks at all that `open` looks at, and at the permissions for publishing to topics of these patterns. Has no
        effect on any message, also where the login may do everything.

        Returns what it found in words, also what cannot be known. Needs no `open`; raises what `open` raises, and
        PrivilegeError.
        """


HELD: Final = "held"
"""The code of a delivery that never ran, since an earlier event of its key is a dead letter and holds the key."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a delivery was not handled; it travels with a dead letter."""

    code: str
    """``rejected``, ``unknown_effect``, ``changed_effect``, ``malformed``, ``attempts_exhausted``, ``timeout``,
    ``error``, ``held``."""
    reason: str
    """One sentence."""
    trace: str = ""
    """The traceback, where there is one."""
    attempts: int = 0
    """How often the handler ran; 0 where only the broker's count of deliveries is known."""


class Delivery(Protocol):
    """One message in hand. Exactly one of its four verbs ends it; each returns once the broker has answered that it
    took it, or raises a PgbridgeError within some seconds of the last sign of life of a broker that does not.

    One whose verb raised is still in hand, and stays there: it comes again once its queue is closed, which is what a
    worker then does. Only of `dead_letter` a RefusedError says that the broker lives and takes all but this letter,
    as when the queue of dead letters is full; then another verb may follow.
    """

    @property
    def event(self) -> Event | Malformed:
        """The event, or why the message is not one."""

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
    start: Literal["now", "beginning"] = "now"
    """Where a queue that did not exist begins: with what is published after its declaration, or with the oldest event
    that the broker keeps. Of a queue that exists it is neither compared nor changed."""
    ordered: bool = False
    """A process is never handed an event of a key while an earlier one of that key is unsettled, unless it has been
    handed that earlier one too; then the later one comes once the earlier is settled. So it holds within a process and
    across processes: no event overtakes one that another process had in hand, be that one crashed, paused, cut off or
    stopping. Other keys go on. Whoever takes from such a queue keeps in hand what is to be tried again, calls `retry`
    never and `give_back` only at a stop."""
    holds: bool = False
    """The dead letters of an ordered worker hold their key: nothing of the key is tried again before they are replayed,
    so that their replays may stand in its line, as they must to run in its order."""
    lanes: int = 1
    """Queues over which the keys of an ordered worker are spread, where the broker gives one queue to one process at a
    time and so many processes are to work side by side. More than one is a SettingsError where that means nothing."""


class Queue(Protocol):
    """One worker's queue on one broker."""

    async def open(self) -> None:
        """Connects, and checks that its queue exists; declares nothing.

        Raises BrokerUnavailableError, or TopologyError that points to `pgbridge topology --apply`.
        """

    def deliveries(self) -> AsyncIterator[Delivery]:
        """Messages as they come; ends after `stop`. Raises BrokerUnavailableError when the connection is lost."""

    @property
    def in_hand(self) -> int:
        """How many messages this consumer has of the broker and has not settled: what runs, and what the next
        steps of `deliveries` give. Not what is passed over, nor what waits here behind another one of its key."""

    async def depth(self) -> int | None:
        """How many messages wait for this worker: not delivered yet, or for another attempt. None where the broker does
        not say.

        Raises BrokerUnavailableError, RefusedError.
        """

    async def stop(self) -> None:
        """No new deliveries; those in hand can still be settled."""

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """What the broker has of what this worker needs; with `apply`, what is missing is declared first.

        Needs no `open`; raises BrokerUnavailableError.
        """

    async def close(self) -> None:
        """Disconnects; the broker redelivers whatever was not settled, also what a verb has failed to settle."""


@runtime_checkable
class InspectableQueue(Protocol):
    """A queue that finds out before a run whether its login may do what a run needs."""

    async def inspect(self) -> Sequence[str]:
        """Looks at all that `open` looks at, and at the permissions for consuming, settling and giving up. Takes no
        message, and is nobody's consumer.

        Returns what it found in words, also what cannot be known. Needs no `open`; raises what `open` raises, and
        PrivilegeError.
        """


@dataclass(frozen=True, slots=True)
class Letter:
    """An event that was given up, and why."""

    id: str
    """``outbox:<number>``, or ``<worker>:<event id>``; what is not an event has another id after the colon."""
    box: str
    """``outbox``, or the worker's name."""
    event_id: str | None
    topic: str | None
    """Event id and topic are None for a message that is not an event."""
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
    inbox_id: str | None = None
    """The UUID that a worker's inbox knows the event by; None for a letter of the outbox or of no event."""


Verdict = Literal["keep", "replay", "discard"]
"""What is to become of a dead letter."""

Decide = Callable[[Letter], Awaitable[Verdict]]

Order = Callable[[Letter], float]
"""Gives a letter its place among the others; those of one place stay as they are."""


class DeadLetters(Protocol):
    """What one worker gave up."""

    async def walk(self, decide: Decide, order: Order | None = None) -> None:
        """Shows `decide` every letter that is there now, once; does what it says, and leaves the others. With `order`
        they come, and are replayed, in the order of what it gives for each, for which all are taken first; without,
        in no certain order, since whoever looks may have changed it. What `decide` raises ends it, and leaves the rest.

        A replayed letter is first confirmed in the worker's queue, and then removed: after a crash in between it may
        be in both. It carries a new `bridge.event.replay_mark()` each time: without one a worker takes the event for a
        repeat of what it gave up, and acknowledges it. Raises BrokerUnavailableError, TopologyError, RefusedError.
        """
