"""Connections of aio-pika, over which a worker consumes and dead letters are walked, in our settings and errors.

Beside `connection`, so that the bridge, which consumes nothing, does not load the library.

A message whose properties pamqp cannot decode would end the connection in the library, again and again, since it comes
again: here its properties are left out but for one header, UNREADABLE.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import aio_pika
from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import AMQPError
from aiormq.exceptions import (
    ChannelAccessRefused,
    ChannelClosed,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ConnectionClosed,
    ConnectionNotAllowed,
)
from pamqp.header import ContentHeader

from bridge.brokers.rabbitmq.closure import Closure, During, Reply, error_of, rabbitmq_at
from bridge.brokers.rabbitmq.connection import CONNECT_LIMIT, connect, first_that_takes_us
from bridge.brokers.rabbitmq.message import UNDECODABLE, unreadable
from bridge.brokers.rabbitmq.settings import Address, RabbitMQSettings
from bridge.brokers.tls import tls_context
from bridge.errors import BrokerUnavailableError

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


_decode_header: Final = ContentHeader.unmarshal


def _decode_header_or_say_why(header: ContentHeader, data: bytes) -> None:
    try:
        _decode_header(header, data)
    except UNDECODABLE as error:
        # Class, weight and size of the body stand before the properties.
        header.properties = unreadable(error)


ContentHeader.unmarshal = _decode_header_or_say_why  # type: ignore[method-assign, assignment]


async def open_client(settings: RabbitMQSettings) -> AbstractConnection:
    """A connection that stays lost once it is lost.

    Raises what `connection.connect` raises; and BrokerUnavailableError where that connects and aio-pika does not.
    """
    tls = tls_context(settings.tls, settings.key) if settings.login.tls else None
    return await first_that_takes_us(settings, partial(_open, settings, tls))


async def _open(settings: RabbitMQSettings, tls: ssl.SSLContext | None, address: Address) -> AbstractConnection:
    try:
        return await aio_pika.connect(
            host=address.host,
            port=address.port,
            login=address.user,
            password=address.password,
            virtualhost=address.virtual_host,
            ssl=address.tls,
            ssl_context=tls,
            timeout=CONNECT_LIMIT,
            heartbeat=max(1, round(settings.heartbeat)),
        )
    except LOST as error:
        own = await connect(settings, at=address)
        await own.close()
        raise BrokerUnavailableError(
            f"{rabbitmq_at(settings, at=address)} cannot be consumed from: {_text(error)}"
        ) from error


def closure_of(error: BaseException | None, during: During = "use") -> Closure:
    """What an exception of aio-pika says of the end of a connection or channel."""
    match error:
        case ChannelClosed(args=(int(code), str(said))) | ConnectionClosed(args=(int(code), str(said))):
            return Closure(_reason(error), code, said=said, during=during)
        case ChannelClosed() | ConnectionClosed() if (reply := _REPLIES.get(type(error))) is not None:
            return Closure(_reason(error), reply, said=str(error), during=during)
        case asyncio.CancelledError():
            return Closure("it was silent for too long", during=during)
        case TimeoutError():
            return Closure("it took nothing for too long", during=during)
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
    except (*LOST, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and _is_cancelled():
            raise
        closure = closure_of(error, during)
        if not closure.code and (known := lost()) is not None:
            # The error says only that the channel is gone. Whatever closed it, for this call the connection is lost.
            closure = Closure(str(known))
        raise error_of(settings, closure) from error


def _is_cancelled() -> bool:
    """Whether somebody cancels this task. If not, the cancellation is that of aiormq's own reader, handed on to whoever
    waits when it leaves a silent connection."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
