"""What a login may do, found out without doing it.

AMQP has no question for it. So each thing is asked for in a form that RabbitMQ refuses (406) behind its look at the
permissions (403), and before it does anything:

- a message whose sender is another user is refused before it is routed; for an account that may send in others' names
  (tag `impersonator`) it is part of a transaction that is rolled back;
- a consumer whose priority is no number is refused before the queue hears of it.

Each leaves a line in the broker's log.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from pamqp import commands, frame
from pamqp.base import Frame
from pamqp.header import ContentHeader

from bridge.brokers.rabbitmq.closure import ClosedError, Closure, Reply, error_of, rabbitmq_at
from bridge.brokers.rabbitmq.connection import Connection
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.errors import PgbridgeError, PrivilegeError

_CHANNEL: Final = 3
"""Opened anew for each question, since each answer closes it."""

_PRODUCT: Final = "RabbitMQ"
"""Nobody else is asked: another broker may do what it is asked for."""

_WORD: Final = "pgbridge"
"""Stands for each wildcard of a pattern."""

_REFUSED_BY_FORM: Final = commands.Basic.Properties(user_id="pgbridge check")
"""The one thing that every version looks at behind the topic: RabbitMQ 4 looks at all the rest of a message before."""

_DONE: Final = Closure("the broker did what it was expected to refuse")


async def may_publish(
    settings: RabbitMQSettings, connection: Connection, exchange: str, topics: Sequence[str]
) -> list[str]:
    """Whether the login may publish to an exchange, "" for the default one, with topics of these patterns.

    Returns what was found, in words. Raises PrivilegeError, TopologyError, BrokerUnavailableError, ClosedError.
    """
    name = exchange or "amq.default"
    if connection.product != _PRODUCT:
        return [_unknown(connection, f"publish to the exchange {name}")]
    found, unsure = [f"may publish to the exchange {name}"], []
    for number, topic in enumerate(topics):
        closure = await _refusal_of_message(connection, exchange, _example(topic), first=number == 0)
        if closure is None:
            later = ", ".join(topics[number:])
            found.append(f"of the topics {later} this cannot be known while the broker blocks publishers")
            break
        if _is_about_topic(closure) and _example(topic) != topic:
            unsure.append(topic)
        elif _is_about_topic(closure):
            user = settings.login.user
            raise PrivilegeError(
                f"{rabbitmq_at(settings)} does not permit user {user!r} to publish the topic {topic!r}: "
                f"{closure.said}; grant it with `rabbitmqctl set_topic_permissions`"
            )
        elif closure is not _DONE and closure.code != Reply.PRECONDITION_FAILED:
            raise _lacking(settings, closure, "WRITE", name)
    if unsure:
        found.append(
            f"its topic permissions refuse some topics of {', '.join(unsure)}: whether any of yours, cannot be known"
        )
    return found


async def may_consume(settings: RabbitMQSettings, connection: Connection, queues: Sequence[str]) -> list[str]:
    """Whether the login may consume these queues. Returns and raises as `may_publish`."""
    if connection.product != _PRODUCT:
        return [_unknown(connection, f"consume {', '.join(queues)}")]
    for queue in queues:
        await connection.call(_CHANNEL, commands.Channel.Open())
        closure = await _refusal(
            connection, commands.Basic.Consume(queue=queue, arguments={"x-priority": "pgbridge check"})
        )
        if closure.code != Reply.PRECONDITION_FAILED:
            raise _lacking(settings, closure, "READ", queue)
    return [f"may consume {', '.join(queues)}"]


def _lacking(settings: RabbitMQSettings, closure: Closure, right: str, name: str) -> PgbridgeError:
    error = error_of(settings, closure)
    return PrivilegeError(f"{error}, where {right} matches {name}") if isinstance(error, PrivilegeError) else error


def _unknown(connection: Connection, what: str) -> str:
    return f"whether it may {what} cannot be known: the broker is {connection.product or 'nameless'}, not {_PRODUCT}"


def _example(pattern: str) -> str:
    """A topic that the pattern takes."""
    return ".".join(_WORD if word in ("*", "#") else word for word in pattern.split("."))


def _is_about_topic(closure: Closure) -> bool:
    # RabbitMQ has one code for both, and names the topic only where it is the topic.
    return closure.code == Reply.ACCESS_REFUSED and "access to topic" in closure.said


async def _refusal_of_message(connection: Connection, exchange: str, topic: str, *, first: bool) -> Closure | None:
    """None where the broker blocks publishers. It still looks at the first message of a connection, and then reads no
    more of it."""
    answer = asyncio.ensure_future(_answer_to_message(connection, exchange, topic))
    blocked = asyncio.ensure_future(connection.blocking.wait())
    try:
        await asyncio.wait((answer,) if first else (answer, blocked), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        blocked.cancel()


async def _answer_to_message(connection: Connection, exchange: str, topic: str) -> Closure:
    await connection.call(_CHANNEL, commands.Channel.Open())
    await connection.call(_CHANNEL, commands.Tx.Select())
    publish = commands.Basic.Publish(exchange=exchange, routing_key=topic, mandatory=True)
    header = ContentHeader(0, 0, _REFUSED_BY_FORM)
    connection.write(frame.marshal(publish, _CHANNEL) + frame.marshal(header, _CHANNEL))
    # A message is not answered, unless it is refused; this is, and not behind a refusal.
    return await _refusal(connection, commands.Tx.Rollback())


async def _refusal(connection: Connection, method: Frame) -> Closure:
    """How the broker ends the channel, over this or what came before; where it does not, we do."""
    try:
        await connection.call(_CHANNEL, method)
    except ClosedError as error:
        return error.closure
    await connection.call(_CHANNEL, commands.Channel.Close(200, "", 0, 0))
    return _DONE
