"""RabbitMQ: persistent, mandatory publishes on one confirm channel, as CloudEvents in binary mode.

It speaks AMQP itself (`bridge.brokers.rabbitmq`), since a client library's task and future for each message would
cost thirty times as much.
"""

import asyncio
import ssl
from collections.abc import Sequence
from typing import Literal

from pamqp import commands

from bridge.brokers.contract import Declaration, NotSent, Outcome
from bridge.brokers.rabbitmq.connection import (
    ACCESS_REFUSED,
    NOT_ALLOWED,
    NOT_FOUND,
    PRECONDITION_FAILED,
    ClosedError,
    Closure,
    Connection,
    connect,
)
from bridge.brokers.rabbitmq.frames import Encoder
from bridge.brokers.rabbitmq.publisher import Publisher
from bridge.brokers.rabbitmq.settings import RabbitMQSettings, address_of
from bridge.errors import BrokerUnavailableError, PgbridgeError, RefusedError, SettingsError, TopologyError
from bridge.event import Event

_CHECK_CHANNEL, _DECLARE_CHANNEL = 2, 3
_OPEN_LIMIT = 10.0
"""Seconds that connecting, TLS, the handshake and the look for the exchange may take together."""

_NOT_OPEN = NotSent("the sink is not open")


class RabbitMQSink:
    """Publishes to one topic exchange; the routing key is the event's topic."""

    def __init__(self, settings: RabbitMQSettings) -> None:
        """Raises SettingsError when the URL, the exchange's name or a certificate cannot be used."""
        self._settings = settings
        self._address = address_of(settings)
        try:
            self._check_exchange = commands.Exchange.Declare(exchange=settings.exchange, passive=True)
        except ValueError as error:
            raise SettingsError(
                f"exchange: {settings.exchange!r} is no name: letters, digits and -_.:@#,/+ and spaces, 127 at most"
            ) from error
        self._opening = asyncio.Lock()
        self._connection: Connection | None = None
        self._publisher: Publisher | None = None

    @property
    def is_open(self) -> bool:
        """As `Sink.is_open`."""
        return self._publisher is not None and self._publisher.lost is None

    async def open(self) -> None:
        """As `Sink.open`. Also raises RefusedError when RabbitMQ refuses the user or the virtual host."""
        async with self._opening:
            if self.is_open:
                return
            try:
                async with asyncio.timeout(_OPEN_LIMIT):
                    self._connection = connection = await connect(self._address, self._settings.heartbeat)
                    try:
                        self._publisher = await self._start(connection)
                    except BaseException:
                        connection.leave(Closure("opening failed"))
                        raise
            except ClosedError as error:
                raise self._refusal(error.closure) from error
            except OSError as error:
                raise self._unavailable(error) from error

    async def _start(self, connection: Connection) -> Publisher:
        """The exchange is looked for on a channel of its own, since the broker closes the channel if it is missing."""
        await connection.call(_CHECK_CHANNEL, commands.Channel.Open())
        await connection.call(_CHECK_CHANNEL, self._check_exchange)
        await connection.call(_CHECK_CHANNEL, commands.Channel.Close(200, "", 0, 0))
        learned = self._publisher.learned_limit if self._publisher is not None else None
        limit = min(self._settings.max_message_bytes, learned or self._settings.max_message_bytes)
        encoder = Encoder(self._settings.exchange, connection.frame_max, limit)
        publisher = Publisher(connection, encoder, self._settings.publish_timeout)
        await publisher.start()
        return publisher

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        """As `Sink.publish`; never for ``unroutable``, ``too_large``, ``malformed`` and ``access_refused``."""
        if self._publisher is None:
            return [_NOT_OPEN] * len(events)
        return await self._publisher.publish(events)

    async def close(self) -> None:
        """As `Sink.close`."""
        async with self._opening:
            connection, self._connection, self._publisher = self._connection, None, None
            if connection is not None:
                await connection.close()

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """As `Sink.topology`: the durable topic exchange. Also raises RefusedError."""
        try:
            async with asyncio.timeout(_OPEN_LIMIT):
                connection = await connect(self._address, self._settings.heartbeat)
                try:
                    return [await self._exchange(connection, apply)]
                finally:
                    await connection.close()
        except ClosedError as error:
            raise self._refusal(error.closure) from error
        except OSError as error:
            raise self._unavailable(error) from error

    async def _exchange(self, connection: Connection, apply: bool) -> Declaration:
        """Looks for the exchange, then declares it, which compares the properties of one that stands."""
        name, detail = self._settings.exchange, "topic exchange, durable"
        state: Literal["present", "declared"] = "present"
        try:
            await connection.call(_CHECK_CHANNEL, commands.Channel.Open())
            await connection.call(_CHECK_CHANNEL, self._check_exchange)
        except ClosedError as error:
            if error.closure.code != NOT_FOUND:
                raise
            if not apply:
                return Declaration("exchange", name, "missing", detail)
            state = "declared"
        try:
            await connection.call(_DECLARE_CHANNEL, commands.Channel.Open())
            await connection.call(
                _DECLARE_CHANNEL, commands.Exchange.Declare(exchange=name, exchange_type="topic", durable=True)
            )
        except ClosedError as error:
            if error.closure.code == PRECONDITION_FAILED:
                mend = "delete it, or name another one in the sink's setting exchange"
                return Declaration("exchange", name, "differs", f"must be a {detail}: {error}; {mend}")
            if error.closure.code != ACCESS_REFUSED or state == "declared":
                raise
            detail = f"{name} stands, but the user may not declare it, so its properties cannot be compared"
        return Declaration("exchange", name, state, detail)

    def _refusal(self, closure: Closure) -> PgbridgeError:
        address, exchange = self._address, self._settings.exchange
        if closure.code == NOT_FOUND:
            return TopologyError(
                f"RabbitMQ at {address} has no exchange {exchange!r} in virtual host {address.virtual_host!r}; "
                "declare it with `pgbridge topology --apply`"
            )
        if closure.code in (ACCESS_REFUSED, NOT_ALLOWED):
            return RefusedError(
                f"RabbitMQ at {address} refuses user {address.user!r} in virtual host {address.virtual_host!r}: "
                f"{closure}; see the user, password and virtual host in the sink's url, and the user's permissions"
            )
        return BrokerUnavailableError(f"RabbitMQ at {address} ended the connection: {closure}")

    def _unavailable(self, error: Exception) -> BrokerUnavailableError:
        if isinstance(error, ssl.SSLCertVerificationError):
            return BrokerUnavailableError(
                f"RabbitMQ at {self._address} has a certificate that is not trusted: {error.verify_message}; name its "
                "authority in the sink's tls.ca_file"
            )
        cause = f"nothing within {_OPEN_LIMIT:g} s" if isinstance(error, TimeoutError) else str(error)
        return BrokerUnavailableError(f"RabbitMQ at {self._address} does not answer: {cause}")
