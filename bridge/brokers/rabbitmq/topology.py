"""What a worker needs on RabbitMQ, and whether it stands there."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import aio_pika
from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed

from bridge.brokers.contract import Declaration

DELIVERY_LIMIT = 20
"""Deliveries without an acknowledgement (a crash, one given back) beyond which RabbitMQ dead-letters a message."""

_NO_LIMIT = 1_000_000_000
"""On the queue of dead letters: RabbitMQ 4 would drop one that was looked at 20 times. 3.x takes no -1 here."""

_UNITS = (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1))

Arguments = dict[str, int | str]


@dataclass(frozen=True, slots=True)
class Layout:
    """Names and arguments of a worker's exchange, queues and bindings."""

    exchange: str
    worker: str
    topics: Sequence[str]
    retry_delays: Sequence[float]

    @property
    def dead(self) -> str:
        """The queue of dead letters."""
        return f"{self.worker}.dead"

    def retry_queue(self, delay: float) -> str:
        """The queue with the least delay that is no shorter, else with the longest. `delay` in seconds."""
        offered = min(
            (each for each in self.retry_delays if each >= delay), default=max(self.retry_delays, default=0.0)
        )
        return self._retry_name(offered)

    def _retry_name(self, delay: float) -> str:
        return f"{self.worker}.retry.{duration(milliseconds(delay))}"

    def queues(self) -> dict[str, Arguments]:
        """By name, the arguments of every queue."""
        # At-least-once dead-lettering needs `reject-publish`, which without a length limit rejects nothing.
        strategy = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
        return {
            self.dead: {"x-queue-type": "quorum", "x-delivery-limit": _NO_LIMIT},
            self.worker: {
                "x-queue-type": "quorum",
                "x-delivery-limit": DELIVERY_LIMIT,
                "x-dead-letter-exchange": "",
                "x-dead-letter-routing-key": self.dead,
                **strategy,
            },
            **{
                self._retry_name(delay): {
                    "x-queue-type": "quorum",
                    "x-message-ttl": milliseconds(delay),
                    "x-dead-letter-exchange": "",
                    "x-dead-letter-routing-key": self.worker,
                    **strategy,
                }
                for delay in self.retry_delays
            },
        }


def milliseconds(seconds: float) -> int:
    """At least one: RabbitMQ takes whole milliseconds."""
    return max(1, round(seconds * 1000))


def duration(total: int) -> str:
    """Milliseconds as the settings write them, in the largest unit that divides them: ``90s``, ``10m``, ``500ms``."""
    unit, size = next((unit, size) for unit, size in _UNITS if total % size == 0)
    return f"{total // size}{unit}"


async def survey(
    connection: AbstractConnection, layout: Layout, *, apply: bool = False, look_closely: bool = False
) -> list[Declaration]:
    """What stands of the layout; with `apply`, what is missing is declared. `look_closely` compares arguments too."""
    found = [await _exchange(connection, layout.exchange, apply=apply, look_closely=look_closely)]
    for name, arguments in layout.queues().items():
        found.append(await _queue(connection, name, arguments, apply=apply, look_closely=look_closely))
    if look_closely:
        ready = not any(each.state == "missing" for each in found if each.name in (layout.exchange, layout.worker))
        found += [await _binding(connection, layout, pattern, ready=ready, apply=apply) for pattern in layout.topics]
    return found


async def _exchange(connection: AbstractConnection, name: str, *, apply: bool, look_closely: bool) -> Declaration:
    async def declare(*, passive: bool) -> None:
        async with connection.channel() as channel:
            await channel.declare_exchange(name, aio_pika.ExchangeType.TOPIC, durable=True, passive=passive)

    return await _look(declare, "exchange", name, "topic, durable", apply=apply, look_closely=look_closely)


async def _queue(
    connection: AbstractConnection, name: str, arguments: Arguments, *, apply: bool, look_closely: bool
) -> Declaration:
    async def declare(*, passive: bool) -> None:
        async with connection.channel() as channel:
            await channel.declare_queue(name, durable=True, arguments=dict(arguments), passive=passive)

    detail = ", ".join(f"{key.removeprefix('x-')}={value}" for key, value in arguments.items())
    return await _look(declare, "queue", name, detail, apply=apply, look_closely=look_closely)


async def _look(
    declare: Callable[..., Awaitable[None]], kind: str, name: str, detail: str, *, apply: bool, look_closely: bool
) -> Declaration:
    """Asks whether a thing stands, and then whether declaring it again as we need it is no change."""
    try:
        await declare(passive=True)
    except ChannelNotFoundEntity:
        if not apply:
            return Declaration(kind, name, "missing", detail)
        await declare(passive=False)
        return Declaration(kind, name, "declared", detail)
    if look_closely:
        try:
            await declare(passive=False)
        except ChannelPreconditionFailed as error:
            mend = f"let it run empty, delete it, and run `pgbridge topology --apply`; it needs: {detail}"
            return Declaration(kind, name, "differs", f"{error}; {mend}")
    return Declaration(kind, name, "present", detail)


async def _binding(
    connection: AbstractConnection, layout: Layout, pattern: str, *, ready: bool, apply: bool
) -> Declaration:
    name = f"{layout.exchange} -> {layout.worker}: {pattern}"
    if apply and ready:
        async with connection.channel() as channel:
            queue = await channel.get_queue(layout.worker, ensure=False)
            await queue.bind(layout.exchange, pattern)
        return Declaration("binding", name, "declared", "again, if it stood")
    if not ready:
        return Declaration("binding", name, "missing")
    return Declaration("binding", name, "present", "assumed: AMQP cannot ask; --apply binds again, which is no change")
