"""Copies of messages for a queue by its name: retries, dead letters and their replays, over a connection of their own.

An alarm of RabbitMQ blocks every connection that has published; what is acknowledged over another one still passes.
"""

import asyncio
import struct
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple
from uuid import uuid4

from pamqp import commands, frame
from pamqp.header import ContentHeader

from bridge.brokers.contract import Confirmed, Never, Outcome, Refused
from bridge.brokers.letters import PREFIX
from bridge.brokers.rabbitmq.closure import APPLY, Closure, error_of, rabbitmq_at
from bridge.brokers.rabbitmq.connection import Connection, answers, connect
from bridge.brokers.rabbitmq.frames import CHANNEL, ROUTING_HEADERS, Frames, malformed, payload_limit, with_body
from bridge.brokers.rabbitmq.message import BROKERS, UNREADABLE, Message, sent_at
from bridge.brokers.rabbitmq.publisher import Publisher
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.topology import Needed, require
from bridge.errors import BrokerUnavailableError, RefusedError, TopologyError
from bridge.process.batching import Batcher

_START_LIMIT: Final = 10.0
"""Seconds that all questions before the first copy may take, once connected."""

_TOGETHER: Final = 1000
"""Most copies that are published together."""

_PERSISTENT: Final = 2
"""AMQP's delivery mode."""


class Copy(NamedTuple):
    """A message on its way to one queue."""

    id: str
    """Its message id, by which the broker gives it back."""
    topic: str
    """The queue: on the default exchange a routing key is the name of one."""
    payload: bytes
    properties: commands.Basic.Properties


def copy_of(message: Message, queue: str, headers: Mapping[str, str]) -> Copy:
    """The same message, persistent, with our headers beside its own, in place of those that it had of us.

    It has no time to live of its own, or it would expire in a queue that must lose nothing. And no user id: RabbitMQ
    takes only that of whoever publishes.
    """
    properties = message.properties
    kept = {
        name: value
        for name, value in message.headers.items()
        if name == UNREADABLE or not name.startswith((*BROKERS, PREFIX))
    }
    # RabbitMQ would route the copy by these once more.
    for name in ROUTING_HEADERS:
        kept.pop(name, None)
    # A lone surrogate in an exception's text has no UTF-8.
    kept.update((name, value.encode(errors="backslashreplace").decode()) for name, value in headers.items())
    return Copy(
        properties.message_id or "",
        queue,
        message.body,
        commands.Basic.Properties(
            content_type=properties.content_type,
            content_encoding=properties.content_encoding,
            headers=kept,
            delivery_mode=_PERSISTENT,
            priority=properties.priority,
            correlation_id=properties.correlation_id,
            reply_to=properties.reply_to,
            message_id=properties.message_id,
            # One without a time has that at which it came here, also when it comes again.
            timestamp=sent_at(message),
            message_type=properties.message_type,
            app_id=properties.app_id,
        ),
    )


class CopyEncoder:
    """Encodes for the default exchange of one connection."""

    def __init__(self, frame_max: int) -> None:
        """`frame_max` is the negotiated limit of a whole frame in bytes, 0 for none."""
        self._payload_max = payload_limit(frame_max)

    def encode(self, copy: Copy) -> Frames:
        """What publishes a copy, mandatory. Raises RefusedEvent when AMQP cannot take it."""
        try:
            publish = frame.marshal(commands.Basic.Publish(routing_key=copy.topic, mandatory=True), CHANNEL)
            header = frame.marshal(ContentHeader(0, len(copy.payload), copy.properties), CHANNEL)
        except (ValueError, TypeError, OverflowError, struct.error) as error:
            raise malformed(f"its copy has no AMQP form: {error}") from error
        if len(header) > self._payload_max:
            raise malformed(
                f"headers and properties of its copy take {len(header)} bytes and must fit into one frame of "
                f"{self._payload_max}"
            )
        return with_body(publish + header, copy.payload, self._payload_max)


class Copies:
    """Publishes copies, any number at a time: those that are asked for together, for one queue, together. A queue that
    does not answer holds up no other. Once its connection is lost, it is of no more use.
    """

    def __init__(self, settings: RabbitMQSettings, on_lost: Callable[[Closure], None] = lambda closure: None) -> None:
        """`on_lost` hears of the connection's end, whoever ends it."""
        self._settings = settings
        self._on_lost = on_lost
        self._connection: Connection | None = None
        self._publisher: Publisher[Copy] | None = None
        self._to: defaultdict[str, Batcher[Copy, Outcome]] = defaultdict(
            lambda: Batcher(self._publish_together, _TOGETHER)
        )
        """By queue."""

    async def open(self, needed: Sequence[Needed] = ()) -> None:
        """Connects, and checks that what is `needed` exists.

        Raises SettingsError for certificates that cannot be used, BrokerUnavailableError, LoginError, RefusedError
        for the virtual host, TopologyError.
        """
        self._connection = connection = await connect(self._settings)
        try:
            async with answers(self._settings, _START_LIMIT):
                await require(self._settings, connection, needed)
                encode = CopyEncoder(connection.frame_max).encode
                self._publisher = Publisher(connection, encode, self._settings.publish_timeout, self._on_lost)
                await self._publisher.start()
        except BaseException:
            connection.leave(Closure("opening failed"))
            raise

    async def probe(self) -> None:
        """Asks whether this user may publish to a queue: what is for none comes back, and leaves nothing behind.

        A broker that blocks publishers does not answer before its alarm ends; then the first copy will tell.
        Raises PrivilegeError, BrokerUnavailableError.
        """
        connection = self._connected()
        nowhere = f"pgbridge.probe.{uuid4()}"
        asked = asyncio.ensure_future(
            self._publish_together([Copy(nowhere, nowhere, b"", commands.Basic.Properties())])
        )
        blocked = asyncio.ensure_future(connection.blocking.wait())
        try:
            async with answers(self._settings, _START_LIMIT):
                await asyncio.wait((asked, blocked), return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                [outcome] = asked.result()
                self._known(outcome, nowhere)
        finally:
            asked.cancel()
            blocked.cancel()

    async def publish(self, copy: Copy) -> None:
        """Returns once the broker has confirmed that the queue holds the copy; waits while it blocks publishers.

        Raises TopologyError when the queue is gone, RefusedError when it takes no more, BrokerUnavailableError or
        PrivilegeError when the connection is lost.
        """
        match self._known(await self._to[copy.topic].ask(copy), copy.topic):
            case Never(code="unroutable"):
                raise TopologyError(f"{rabbitmq_at(self._settings)} lacks queue {copy.topic}; {APPLY}")
            case Refused(reason=reason):
                raise RefusedError(
                    f"{rabbitmq_at(self._settings)} did not take a message for queue {copy.topic}: {reason}; make room "
                    "there"
                )
            case Never(reason=reason):
                raise RefusedError(
                    f"{rabbitmq_at(self._settings)} cannot take a message for queue {copy.topic}: {reason}"
                )

    async def _publish_together(self, copies: Sequence[Copy]) -> Sequence[Outcome]:
        if self._publisher is None:
            raise BrokerUnavailableError(f"{rabbitmq_at(self._settings)} is not open for copies")
        return await self._publisher.publish(copies)

    def _known(self, outcome: Outcome, queue: str) -> Confirmed | Never | Refused:
        """What the broker said. Raises BrokerUnavailableError or PrivilegeError where the connection ended before."""
        if isinstance(outcome, Confirmed | Never | Refused):
            return outcome
        lost = self._connected().lost
        if lost is not None:
            raise error_of(self._settings, lost)
        raise BrokerUnavailableError(
            f"{rabbitmq_at(self._settings)} may not hold a message for queue {queue}: {outcome.reason}"
        )

    def _connected(self) -> Connection:
        if self._connection is None:
            raise BrokerUnavailableError(f"{rabbitmq_at(self._settings)} is not connected: the queue is not open")
        return self._connection

    def leave(self, closure: Closure) -> None:
        """Ends the connection, and with it whatever waits, for this reason."""
        if self._connection is not None:
            self._connection.leave(closure)

    async def close(self) -> None:
        """Disconnects. What is on the way may or may not arrive."""
        if self._connection is not None:
            await self._connection.close()
