"""What a sink and a worker need on RabbitMQ, whether it is there, and how it is declared."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, cast

from pamqp import commands
from pamqp.base import Frame

from bridge.brokers.contract import Declaration
from bridge.brokers.rabbitmq.closure import APPLY, ClosedError, Reply, rabbitmq_at
from bridge.brokers.rabbitmq.connection import Connection
from bridge.brokers.rabbitmq.lanes import LANE, LANES, TEXTS
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.errors import TopologyError

LOOK_LIMIT: Final = 30.0
"""Seconds that asking for or declaring everything that one sink or worker needs may take."""

_NO_LIMIT: Final = 1_000_000_000
"""Deliveries without an acknowledgement (a crash, one given back, a look at a dead letter) beyond which RabbitMQ gives
a message up: the inbox alone counts attempts. RabbitMQ 4 would set 20; 3.x takes no -1."""

_UNITS: Final = (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1))

UNNAMED: Final = 1.5
"""Seconds for which a quorum queue of RabbitMQ before 4 is new: a crash of the broker before its Raft library has saved
the queue's name (`names.dets`, after 0.5 to 1 s without another new queue) loses what the queue has confirmed, and the
queue answers nothing more. Since https://github.com/rabbitmq/ra/pull/443 it is saved at once."""

_SAVES_NAMES_AT_ONCE: Final = 4
"""RabbitMQ's major version that has this."""

UNSAVED: Final = 2.5
"""Seconds for which a binding may be in memory only, though it was confirmed: RabbitMQ 3.10 answered before the
decision to commit is in the log of Mnesia, whose cache is written every 2 s. RabbitMQ 4 may use Mnesia too."""

_CHANNEL: Final = 2
"""The channel on which questions are asked: beside the one that publishes, since a refusal closes it."""

Arguments = dict[str, int | str | bool]


@dataclass(frozen=True, slots=True)
class Exchange:
    """The topic exchange that a sink publishes to and a worker's queue is bound to; or one that a worker has of its
    own, between that one and its lanes."""

    name: str
    type: Literal["topic", "headers", "fanout"] = "topic"
    arguments: Arguments = field(default_factory=dict)
    kind: Literal["exchange"] = "exchange"
    remedy: str = "delete it, or name another one in the sink's setting exchange"

    @property
    def detail(self) -> str:
        """What it is, for people."""
        return ", ".join(
            [f"{self.type} exchange, durable", *(f"{key}={value}" for key, value in self.arguments.items())]
        )

    def declare(self, *, passive: bool) -> Frame:
        """The method that declares it, or with `passive` asks for it."""
        return commands.Exchange.Declare(
            exchange=self.name,
            exchange_type=self.type,
            durable=True,
            passive=passive,
            arguments={**self.arguments},
        )


@dataclass(frozen=True, slots=True)
class QuorumQueue:
    """One of a worker's queues."""

    name: str
    arguments: Arguments = field(default_factory=dict)
    kind: Literal["queue"] = "queue"
    remedy: str = (
        "stop the bridge, let it run empty, stop its workers, delete it (`rabbitmqctl delete_queue`), and run "
        "`pgbridge topology --apply`"
    )

    @property
    def detail(self) -> str:
        """Its arguments, for people."""
        return ", ".join(f"{key.removeprefix('x-')}={value}" for key, value in self.arguments.items())

    def declare(self, *, passive: bool) -> Frame:
        """The method that declares it, or with `passive` asks for it."""
        return commands.Queue.Declare(queue=self.name, durable=True, passive=passive, arguments={**self.arguments})


Needed = Exchange | QuorumQueue


@dataclass(frozen=True, slots=True)
class WorkerTopology:
    """Names and arguments of a worker's exchange, queues and bindings."""

    exchange: str
    worker: str
    topics: Sequence[str]
    retry_delays: Sequence[float]
    """Seconds."""
    ordered: bool = False
    lanes: int = 1
    """See `contract.Subscription`."""

    @property
    def queues(self) -> list[str]:
        """Those that are consumed. The first is the worker's own, and takes what has no lane."""
        return lane_queues(self.worker, self.lanes)

    @property
    def presence(self) -> str:
        """A queue that is always empty, and has as many consumers as processes share the lanes."""
        return f"{self.worker}.processes"

    @property
    def dead(self) -> str:
        """The queue of dead letters."""
        return dead_queue(self.worker)

    @property
    def waiting(self) -> list[str]:
        """The queues in which messages wait for the worker, or for another attempt."""
        return [*self.queues, *(name for name, _ in self._retry_queues())]

    def _retry_queues(self) -> list[tuple[str, float]]:
        """By name, the delay. An ordered worker has none: what it tries again stays in its hand."""
        return [] if self.ordered else list({self._retry_name(delay): delay for delay in self.retry_delays}.items())

    def retry_queue(self, delay: float) -> str:
        """The queue with the least delay that is no shorter, else with the longest. `delay` in seconds."""
        offered = min(
            (each for each in self.retry_delays if each >= delay), default=max(self.retry_delays, default=0.0)
        )
        return self._retry_name(offered)

    def _retry_name(self, delay: float) -> str:
        return f"{self.worker}.retry.{duration(milliseconds(delay))}"

    def needed(self) -> list[Needed]:
        """The exchange and every queue, each before those that dead-letter into it."""
        # At-least-once dead-lettering needs `reject-publish`, which without a length limit rejects nothing.
        strategy = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
        return [
            Exchange(self.exchange),
            QuorumQueue(self.dead, {"x-queue-type": "quorum", "x-delivery-limit": _NO_LIMIT}),
            *(
                QuorumQueue(
                    name,
                    {
                        "x-queue-type": "quorum",
                        **({"x-single-active-consumer": True} if self.ordered else {}),
                        "x-delivery-limit": _NO_LIMIT,
                        # For what a policy ends: a lower limit of its own, or a time to live.
                        "x-dead-letter-exchange": "",
                        "x-dead-letter-routing-key": self.dead,
                        **strategy,
                    },
                )
                for name in self.queues
            ),
            *self._spreading,
            *([QuorumQueue(self.presence, {"x-queue-type": "quorum"})] if self.lanes > 1 else []),
            *(
                QuorumQueue(
                    name,
                    {
                        "x-queue-type": "quorum",
                        "x-message-ttl": milliseconds(delay),
                        "x-dead-letter-exchange": "",
                        "x-dead-letter-routing-key": self.worker,
                        **strategy,
                    },
                )
                for name, delay in self._retry_queues()
            ),
        ]

    @property
    def _spreading(self) -> list[Exchange]:
        """What spreads messages over the queues: by the lane that their sink has stamped them with, and what has none
        to the first. The name tells how many there are, so that another number finds nothing of the old one."""
        if self.lanes == 1:
            return []
        remedy = "stop the bridge, delete it, and run `pgbridge topology --apply`"
        name = f"{self.worker}.lanes{self.lanes}"
        return [
            Exchange(f"{name}.others", "fanout", remedy=remedy),
            Exchange(name, "headers", {"alternate-exchange": f"{name}.others"}, remedy=remedy),
        ]

    def bindings(self) -> list["Binding"]:
        """From the sink's exchange to the worker's queue or, with lanes, over exchanges of its own to its queues."""
        if self.lanes == 1:
            return [Binding(self.exchange, self.worker, topic) for topic in self.topics]
        others, spread = self._spreading
        lanes = [
            Binding(spread.name, queue, lanes=TEXTS[number :: self.lanes]) for number, queue in enumerate(self.queues)
        ]
        return [
            Binding(others.name, self.worker),
            *lanes,
            *(Binding(self.exchange, spread.name, topic, to_exchange=True) for topic in self.topics),
        ]

    def leftovers(self) -> list[Frame]:
        """The methods that remove what another number of lanes has left between the sink's exchange and the queues;
        where nothing is left they change nothing. What the queues hold stays."""
        others = [f"{self.worker}.lanes{lanes}" for lanes in range(2, LANES + 1) if lanes != self.lanes]
        methods: list[Frame] = [
            commands.Exchange.Delete(exchange=name) for each in others for name in (each, f"{each}.others")
        ]
        if self.lanes > 1:
            methods += [
                commands.Queue.Unbind(queue=self.worker, exchange=self.exchange, routing_key=topic)
                for topic in self.topics
            ]
        return methods


@dataclass(frozen=True, slots=True)
class Binding:
    """What lets messages pass from an exchange to a queue or to another exchange."""

    source: str
    target: str
    topic: str = ""
    lanes: Sequence[str] = ()
    """Those that pass; none: all messages."""
    to_exchange: bool = False

    @property
    def name(self) -> str:
        """For people."""
        lanes = " ".join(["lanes", *self.lanes]) if self.lanes else "all"
        return f"{self.source} -> {self.target}: {self.topic or lanes}"

    def declare(self) -> list[Frame]:
        """The methods that bind; bound again, nothing changes."""
        if self.to_exchange:
            return [commands.Exchange.Bind(destination=self.target, source=self.source, routing_key=self.topic)]
        matches: list[Arguments] = [{"x-match": "all", LANE: lane} for lane in self.lanes] or [{}]
        return [
            commands.Queue.Bind(
                queue=self.target, exchange=self.source, routing_key=self.topic, arguments={**arguments}
            )
            for arguments in matches
        ]


def lane_queues(worker: str, lanes: int) -> list[str]:
    """The queues that a worker consumes. Lane n is in number n modulo `lanes`."""
    return [worker, *(f"{worker}.lane{number}" for number in range(2, lanes + 1))]


def dead_queue(worker: str) -> str:
    """The name of a worker's queue of dead letters."""
    return f"{worker}.dead"


def milliseconds(seconds: float) -> int:
    """At least one: RabbitMQ takes whole milliseconds."""
    return max(1, round(seconds * 1000))


def duration(total: int) -> str:
    """Milliseconds as the settings write them: 500 is ``500ms``, 5000 is ``5s``."""
    unit, size = next((unit, size) for unit, size in _UNITS if total % size == 0)
    return f"{total // size}{unit}"


async def require(settings: RabbitMQSettings, connection: Connection, needed: Sequence[Needed]) -> None:
    """Raises TopologyError when the broker lacks one of these. Raises ClosedError."""
    missing = [each for each in needed if not await _exists(connection, each)]
    if missing:
        names = ", ".join(f"{each.kind} {each.name}" for each in missing)
        raise TopologyError(
            f"{rabbitmq_at(settings)} lacks {names} in virtual host {settings.login.virtual_host!r}; {APPLY}"
        )


async def declarations(connection: Connection, worker: WorkerTopology, *, apply: bool) -> list[Declaration]:
    """What the broker has of what a worker needs; with `apply`, what is missing is declared. Raises ClosedError."""
    found = [await declaration(connection, each, apply=apply) for each in worker.needed()]
    new = any(each.kind == "queue" and each.state == "declared" for each in found)
    if new and _saves_names_late(connection):
        # Nothing reaches the queues before they are bound.
        await asyncio.sleep(UNNAMED)
    missing = {each.name for each in found if each.state == "missing"}
    if apply and worker.ordered and not missing:
        await _ask(connection, *worker.leftovers())
    bound = [await _binding(connection, each, missing, apply=apply) for each in worker.bindings()]
    if new:
        # A crash in between is told by the question: the connection is gone with it.
        await asyncio.sleep(UNSAVED)
        await counts_of(connection, worker.worker)
    return [*found, *bound]


async def declaration(connection: Connection, needed: Needed, *, apply: bool) -> Declaration:
    """Looks whether a thing is there, and then declares it, which compares the properties of one that is.

    Raises ClosedError.
    """
    exists = await _exists(connection, needed)
    if not exists and not apply:
        return Declaration(needed.kind, needed.name, "missing", needed.detail)
    try:
        await _ask(connection, needed.declare(passive=False))
    except ClosedError as error:
        match error.closure.code:
            case Reply.PRECONDITION_FAILED:
                detail = f"{error.closure.said}; it must be: {needed.detail}; {needed.remedy}"
                return Declaration(needed.kind, needed.name, "differs", detail)
            case Reply.ACCESS_REFUSED if exists:
                detail = "it exists, but the user may not declare it, so its properties cannot be compared"
                return Declaration(needed.kind, needed.name, "present", detail, assumed=True)
        raise
    return Declaration(needed.kind, needed.name, "present" if exists else "declared", needed.detail)


async def _binding(connection: Connection, binding: Binding, missing: set[str], *, apply: bool) -> Declaration:
    if missing & {binding.source, binding.target}:
        return Declaration("binding", binding.name, "missing")
    if not apply:
        detail = "assumed: AMQP cannot ask; --apply binds again, which is no change"
        return Declaration("binding", binding.name, "present", detail, assumed=True)
    await _ask(connection, *binding.declare())
    return Declaration("binding", binding.name, "declared", "again, if it was there")


def _saves_names_late(connection: Connection) -> bool:
    major = connection.version.partition(".")[0]
    return not major.isdecimal() or int(major) < _SAVES_NAMES_AT_ONCE


async def counts_of(connection: Connection, queue: str) -> tuple[int, int]:
    """How many messages are ready in a queue, and how many consumers it has. Raises ClosedError."""
    found = cast(commands.Queue.DeclareOk, await _ask(connection, QuorumQueue(queue).declare(passive=True)))
    return found.message_count or 0, found.consumer_count or 0


async def _exists(connection: Connection, needed: Needed) -> bool:
    try:
        await _ask(connection, needed.declare(passive=True))
    except ClosedError as error:
        if error.closure.code != Reply.NOT_FOUND:
            raise
        return False
    return True


async def _ask(connection: Connection, *methods: Frame) -> Frame:
    """The last answer to methods on a channel of their own, since the broker closes the channel when it refuses.

    Raises ClosedError.
    """
    answer = await connection.call(_CHANNEL, commands.Channel.Open())
    for method in methods:
        answer = await connection.call(_CHANNEL, method)
    await connection.call(_CHANNEL, commands.Channel.Close(200, "", 0, 0))
    return answer
