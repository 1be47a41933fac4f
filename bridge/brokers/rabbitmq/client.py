"""Connections of aio-pika, over which a worker consumes and dead letters are walked, in our settings and errors.

Beside `connection`, so that the bridge, which consumes nothing, does not load the library.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Final

import aio_pika
from aio_pika.abc import AbstractConnection, AbstractExchange
from aio_pika.exceptions import AMQPError, DeliveryError, PublishError
from aiormq.exceptions import (
    ChannelAccessRefused,
    ChannelClosed,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ConnectionClosed,
    ConnectionNotAllowed,
)
from pamqp import commands

from bridge.brokers.rabbitmq.closure import APPLY, Closure, During, Reply, error_of, rabbitmq_at
from bridge.brokers.rabbitmq.connection import CONNECT_LIMIT, connect
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.tls import tls_context
from bridge.errors import BrokerUnavailableError, TopologyError

CONFIRM_LIMIT: Final = 30.0
"""Seconds for the confirm of a message that is copied to another queue."""

LOST: Final = (AMQPError, RuntimeError, OSError)
"""What aio-pika raises when the broker refuses, or when connection or channel are gone (ChannelInvalidStateError is a
RuntimeError)."""

_REPLIES: Final = {
    ChannelAccessRefused: Reply.ACCESS_REFUSED,
    ChannelNotFoundEntity: Reply.NOT_FOUND,
    ChannelLockedResource: Reply.RESOURCE_LOCKED,
    ChannelPreconditionFailed: Reply.PRECONDITION_FAILED,
    ConnectionNotAllowed: Reply.NOT_ALLOWED,
}
"""aio-pika drops the reply code where it has a class for it."""


async def open_client(settings: RabbitMQSettings) -> AbstractConnection:
    """A connection that stays lost once it is lost.

    Raises what `connection.connect` raises; and BrokerUnavailableError where that connects and aio-pika does not.
    """
    address = settings.address
    try:
        return await aio_pika.connect(
            host=address.host,
            port=address.port,
            login=address.user,
            password=address.password,
            virtualhost=address.virtual_host,
            ssl=address.tls,
            ssl_context=tls_context(settings.tls, settings.key) if address.tls else None,
            timeout=CONNECT_LIMIT,
            heartbeat=max(1, round(settings.heartbeat)),
        )
    except LOST as error:
        own = await connect(settings)
        await own.close()
        raise BrokerUnavailableError(f"{rabbitmq_at(settings)} cannot be consumed from: {_text(error)}") from error


def closure_of(error: BaseException | None, during: During = "use") -> Closure:
    """What an exception of aio-pika says of the end of a connection or channel."""
    match error:
        case ChannelClosed(args=(int(code), str(said))) | ConnectionClosed(args=(int(code), str(said))):
            return Closure(_reason(error), code, said=said, during=during)
        case ChannelClosed() | ConnectionClosed() if (reply := _REPLIES.get(type(error))) is not None:
            return Closure(_reason(error), reply, said=str(error), during=during)
    return Closure("closed" if error is None else _text(error), during=during)


def _reason(error: ChannelClosed | ConnectionClosed) -> str:
    return f"the broker closed the {'channel' if isinstance(error, ChannelClosed) else 'connection'}"


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


@contextlib.contextmanager
def refusals(
    settings: RabbitMQSettings, lost: Callable[[], Closure | None] = lambda: None, *, during: During = "use"
) -> Iterator[None]:
    """Turns what aio-pika raises into our errors. `lost` gives what ended the connection, where that is known."""
    try:
        yield
    except LOST as error:
        closure = closure_of(error, during)
        if not closure.code and (known := lost()) is not None:
            # The error says only that the channel is gone. Whatever closed it, for this call the connection is lost.
            closure = Closure(str(known))
        raise error_of(settings, closure) from error


async def copy_to(
    settings: RabbitMQSettings, exchange: AbstractExchange, message: aio_pika.Message, queue: str
) -> None:
    """Publishes a message to one queue through the default exchange; returns once confirmed.

    Raises TopologyError when the queue is gone, BrokerUnavailableError when the broker does not take it, and whatever
    aio-pika raises (see LOST).
    """
    try:
        result = await exchange.publish(message, queue, mandatory=True, timeout=CONFIRM_LIMIT)
    except PublishError as error:
        raise TopologyError(f"{rabbitmq_at(settings)} lacks queue {queue}; {APPLY}") from error
    except DeliveryError as error:
        raise BrokerUnavailableError(f"{rabbitmq_at(settings)} refused a message for queue {queue}: {error}") from error
    if not isinstance(result, commands.Basic.Ack):
        raise BrokerUnavailableError(f"{rabbitmq_at(settings)} did not confirm a message for queue {queue}: {result}")
