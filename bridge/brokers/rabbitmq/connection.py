"""One AMQP 0-9-1 connection: handshake, heartbeats, flow control, and what ended it."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Final, TypeVar, cast

import structlog
from pamqp import commands, frame
from pamqp.base import Frame
from pamqp.common import FieldTable
from pamqp.header import ProtocolHeader
from pamqp.heartbeat import Heartbeat

import bridge
from bridge.brokers.rabbitmq.closure import ClosedError, Closure, During, connecting_failed, error_of, rabbitmq_at
from bridge.brokers.rabbitmq.reader import FRAME_MAX, BrokenStreamError, Delivered, FrameReader
from bridge.brokers.rabbitmq.settings import Address, RabbitMQSettings
from bridge.brokers.tls import tls_context
from bridge.errors import BrokerUnavailableError, PgbridgeError, RefusedError

log = structlog.get_logger()

CONNECT_LIMIT: Final = 10.0
"""Seconds that connecting, TLS and the handshake may take together."""

_CLOSE_LIMIT: Final = 3.0
"""Seconds that the broker may take to answer a goodbye."""

_BUFFER_HIGH: Final = 1_048_576
_BUFFER_LOW: Final = 262_144
"""Bytes that are not yet sent, at which `has_room` becomes false, and true again."""

_HEARTBEAT: Final = Heartbeat.marshal()
_CHANNEL_MAX: Final = 80
"""Most channels that we open."""
_EXCHANGE_CLASS, _QUEUE_CLASS = 40, 50
"""AMQP's ids of the classes whose methods ask for, declare and bind."""

_TLS_ALERT: Final = b"\x15\x03"
"""How a server begins that expects TLS and is spoken to in AMQP."""

_PROPERTIES: FieldTable = {
    "product": "pgbridge",
    "version": bridge.__version__,
    "platform": "Python",
    "capabilities": {
        "publisher_confirms": True,
        "basic.nack": True,
        "consumer_cancel_notify": True,
        "connection.blocked": True,
        # A wrong password is answered with connection.close, instead of a socket that closes without a word.
        "authentication_failure_close": True,
    },
}


class Connection(asyncio.Protocol):
    """Made by `connect`. After `lost` it is of no more use."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.lost: Closure | None = None
        self.blocked: str | None = None
        """Why the broker takes no publishes now: its `connection.blocked`."""
        self.blocking = asyncio.Event()
        """Set while `blocked`."""
        self.frame_max = FRAME_MAX
        self.product = ""
        """What the broker calls itself."""
        self.version = ""
        self._loop = loop
        self._transport: asyncio.Transport
        self._paused = False
        self._closing = False
        self._answers: dict[int, asyncio.Future[Frame]] = {}
        self._closed = loop.create_future()
        self._during: During = "greeting"
        self._heard = False
        self._silent_ticks = 0
        self._heartbeat: asyncio.TimerHandle | None = None
        self._heartbeat_seconds = 0
        self._beat_at = 0.0
        """When the last sign of life was due, by the loop's clock."""
        self._was_late = False
        self._on_progress: Callable[[], None] = lambda: None
        self._on_room: Callable[[], None] = lambda: None
        self._on_lost: Callable[[Closure], None] = lambda closure: None
        self._on_return: Callable[[commands.Basic.Return, str], None] = lambda method, message_id: None
        self._on_cancel: Callable[[], None] = lambda: None
        self._reader = FrameReader(
            on_confirm=lambda tag, multiple, nacked: None,
            on_method=self._method_received,
            on_return=lambda method, message_id: self._on_return(method, message_id),
        )

    @property
    def heard(self) -> bool:
        """Whether the broker has said anything during the handshake."""
        return self._heard

    @property
    def stood_still(self) -> bool:
        """Whether this process has once given no sign of life for so long that the broker may have ended the
        connection, which it reads of later: what is overdue happens before."""
        return self._was_late or self._is_late

    @property
    def _is_late(self) -> bool:
        return self._heartbeat_seconds > 0 and self._loop.time() - self._beat_at > self._heartbeat_seconds

    @property
    def during(self) -> During:
        """How far the handshake has come; ``use`` once it is done."""
        return self._during

    def listen(
        self,
        *,
        confirmed: Callable[[int, bool, bool], None],
        returned: Callable[[commands.Basic.Return, str], None],
        progress: Callable[[], None],
        room: Callable[[], None],
        lost: Callable[[Closure], None],
    ) -> None:
        """Who hears of each confirm and return, once of all the confirms that came together (`progress`), that
        `has_room` became true, and of the end."""
        self._reader.on_confirm = confirmed
        self._on_return, self._on_progress, self._on_room, self._on_lost = returned, progress, room, lost

    def consume(
        self,
        *,
        delivered: Callable[[Delivered], None],
        cancelled: Callable[[], None],
        room: Callable[[], None],
        lost: Callable[[Closure], None],
    ) -> None:
        """Who hears of each message, of the broker's end of a consumer, that `has_room` became true, and of the end.
        For a connection that does not publish."""
        self._reader.on_delivery = delivered
        self._on_cancel, self._on_room, self._on_lost = cancelled, room, lost

    @property
    def has_room(self) -> bool:
        """Whether more may be written now."""
        return not (self._paused or self._closing or self.blocked is not None or self.lost is not None)

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def write_pieces(self, pieces: Sequence[bytes | memoryview]) -> None:
        """As `write`, of what would take longer to put together."""
        self._transport.writelines(pieces)

    def send(self, channel: int, *methods: Frame) -> None:
        self._transport.write(b"".join(frame.marshal(method, channel) for method in methods))

    async def call(self, channel: int, *methods: Frame) -> Frame:
        """Sends methods and gives the next one that comes back on the channel. Raises ClosedError."""
        if self.lost is not None:
            raise ClosedError(self.lost)
        answer: asyncio.Future[Frame] = self._loop.create_future()
        self._answers[channel] = answer
        self.send(channel, *methods)
        try:
            return await answer
        finally:
            self._answers.pop(channel, None)

    async def handshake(self, address: Address, heartbeat: float, name: str) -> None:
        """From the broker's greeting to connection.open-ok. The broker lists the connection under `name`.

        Raises ClosedError.
        """
        start = cast(commands.Connection.Start, await self._answers[0])
        server = start.server_properties or {}
        self.product = str(server.get("product", ""))
        self.version = str(server.get("version", ""))
        if "PLAIN" not in start.mechanisms.split():
            raise ClosedError(Closure(f"to log in it offers {start.mechanisms}, and PLAIN is needed", during="login"))
        self._during = "login"
        tune = cast(
            commands.Connection.Tune,
            await self.call(
                0,
                commands.Connection.StartOk(
                    client_properties={**_PROPERTIES, "connection_name": f"{name} on {socket.gethostname()}"},
                    mechanism="PLAIN",
                    response=f"\0{address.user}\0{address.password}",
                    locale="en_US",
                ),
            ),
        )
        self.frame_max = min(tune.frame_max or FRAME_MAX, FRAME_MAX)
        self._reader.frame_max = self.frame_max
        seconds = min(max(1, round(heartbeat)), 65_535) if heartbeat else 0
        if seconds and tune.heartbeat:
            seconds = min(seconds, tune.heartbeat)
        self._during = "virtual host"
        await self.call(
            0,
            commands.Connection.TuneOk(min(tune.channel_max or _CHANNEL_MAX, _CHANNEL_MAX), self.frame_max, seconds),
            commands.Connection.Open(address.virtual_host),
        )
        self._during = "use"
        if seconds:
            self._heartbeat_seconds, self._beat_at = seconds, self._loop.time()
            self._heartbeat = self._loop.call_later(seconds / 2, self._beat, seconds)

    async def close(self) -> None:
        """Says goodbye and closes; a broker that does not answer is left after some seconds."""
        if self.lost is None:
            self._closing = True
            self.send(0, commands.Connection.Close(200, "pgbridge stops", 0, 0))
            await asyncio.wait((self._closed,), timeout=_CLOSE_LIMIT)
        self.abort(Closure("this side closed the connection"))

    def lose(self, closure: Closure) -> None:
        """Ends the connection at once; the first reason counts."""
        if self.lost is not None:
            return
        self.lost = closure
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(ClosedError(closure))
        self._transport.close()
        # Closing sends what is buffered; a broker that does not read must not keep us.
        self._loop.call_later(_CLOSE_LIMIT, self._transport.abort)
        self._on_lost(closure)

    def leave(self, closure: Closure) -> None:
        """As `lose`, after a goodbye whose answer is not awaited."""
        if self.lost is None:
            self.send(0, commands.Connection.Close(200, "goodbye", 0, 0))
            self.lose(closure)

    def abort(self, closure: Closure) -> None:
        """As `lose`, and drops what is buffered."""
        self.lose(closure)
        self._transport.abort()

    def _beat(self, seconds: int) -> None:
        self._was_late = self._was_late or self._is_late
        self._beat_at = self._loop.time()
        self._silent_ticks = 0 if self._heard else self._silent_ticks + 1
        self._heard = False
        if self._silent_ticks >= 4:
            self.abort(Closure(f"the broker was silent for {2 * seconds} s, twice its heartbeat"))
            return
        if not self._paused:  # else bytes are on their way already, and one more buffered beat helps nobody
            self._transport.write(_HEARTBEAT)
        self._heartbeat = self._loop.call_later(seconds / 2, self._beat, seconds)

    def _method_received(self, channel: int, method: Frame) -> None:
        match method:
            case commands.Connection.Close():
                self.send(0, commands.Connection.CloseOk())
                self.lose(
                    Closure(
                        "the broker closed the connection",
                        method.reply_code or 0,
                        said=method.reply_text or "",
                        during=self._during,
                    )
                )
            case commands.Connection.CloseOk():
                self.lose(Closure("this side closed the connection"))
            case commands.Connection.Blocked():
                self.blocked = method.reason or "no reason given"
                self.blocking.set()
            case commands.Connection.Unblocked():
                self.blocked = None
                self.blocking.clear()
                if self.has_room:
                    self._on_room()
            case commands.Basic.Cancel():
                self._on_cancel()
            case commands.Channel.Close():
                self._channel_closed(channel, method)
            case _:
                answer = self._answers.get(channel)
                if answer is not None and not answer.done():
                    answer.set_result(method)

    def _channel_closed(self, channel: int, method: commands.Channel.Close) -> None:
        closure = Closure(
            "the broker closed the channel",
            method.reply_code or 0,
            said=method.reply_text or "",
            during="declaring" if method.class_id in (_EXCHANGE_CLASS, _QUEUE_CLASS) else "use",
        )
        self.send(channel, commands.Channel.CloseOk())
        answer = self._answers.get(channel)
        if answer is not None and not answer.done():
            answer.set_exception(ClosedError(closure))
        else:
            self.leave(closure)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_BUFFER_HIGH, _BUFFER_LOW)
        # At once: written later, to a server that has refused our certificate meanwhile, it would meet a reset, and
        # the refusal would stay unread.
        self._answers[0] = self._loop.create_future()
        self.write(ProtocolHeader().marshal())

    def data_received(self, data: bytes) -> None:
        self._heard = True
        try:
            confirmed = self._reader.feed(data)
        except BrokenStreamError as error:
            self.abort(Closure(str(error), during=self._during))
        else:
            if confirmed:
                self._on_progress()

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f"the connection broke: {exc}" if exc else "the broker ended the connection"
        in_tls = self._during == "greeting" and self._reader.unread.startswith(_TLS_ALERT)
        self.lose(Closure(reason, during=self._during, cause=exc, in_tls=in_tls))
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self.has_room:
            self._on_room()


T = TypeVar("T")


async def first_that_takes_us(settings: RabbitMQSettings, attempt: Callable[[Address], Awaitable[T]]) -> T:
    """What `attempt` makes of the first of the hosts at which it does not fail. Where it fails at all of them, raises
    the first refusal, which says more than that others do not answer; where none answers, the reason of each."""
    failures: dict[Address, PgbridgeError] = {}
    for address in settings.addresses:
        try:
            made = await attempt(address)
        except (BrokerUnavailableError, RefusedError) as error:
            failures[address] = error
            continue
        for other, failure in failures.items():
            log.warning("rabbitmq.host_passed_over", host=str(other), reason=str(failure))
        return made
    if refusal := next((error for error in failures.values() if isinstance(error, RefusedError)), None):
        raise refusal
    first, *others = failures.values()
    if not others:
        raise first
    reasons = "; ".join(str(error).partition(": ")[2] for error in failures.values())
    raise BrokerUnavailableError(f"{settings.key('url')}: none of its {len(failures)} hosts answers: {reasons}")


async def connect(settings: RabbitMQSettings, name: str = "pgbridge", *, at: Address | None = None) -> Connection:
    """A connection after its handshake, within CONNECT_LIMIT for each host, or to the one host `at`; the broker lists
    it as ``<name> on <host>``.

    Raises SettingsError for certificates that cannot be used, BrokerUnavailableError, LoginError, RefusedError.
    """
    tls = tls_context(settings.tls, settings.key) if settings.login.tls else None
    attempt = partial(_connect, settings, name, tls)
    return await (first_that_takes_us(settings, attempt) if at is None else attempt(at))


async def _connect(settings: RabbitMQSettings, name: str, tls: ssl.SSLContext | None, address: Address) -> Connection:
    loop = asyncio.get_running_loop()
    connection: Connection | None = None
    try:
        async with asyncio.timeout(CONNECT_LIMIT):
            _, connection = await loop.create_connection(lambda: Connection(loop), address.host, address.port, ssl=tls)
            await connection.handshake(address, settings.heartbeat, name)
    except BaseException as error:
        if connection is not None:
            connection.abort(Closure("the handshake failed"))
        match error:
            case ClosedError():
                raise error_of(settings, error.closure, address) from error
            case TimeoutError() if connection is not None and connection.heard:
                silence = Closure(f"no more came within {CONNECT_LIMIT:g} s", during=connection.during)
                raise error_of(settings, silence, address) from error
            case TimeoutError():
                raise BrokerUnavailableError(
                    f"{rabbitmq_at(settings, at=address)} does not answer: nothing came within {CONNECT_LIMIT:g} s"
                ) from error
            case OSError():
                raise connecting_failed(settings, error, address) from error
        raise
    return connection


@contextlib.asynccontextmanager
async def connected(settings: RabbitMQSettings, limit: float) -> AsyncIterator[Connection]:
    """A connection for some questions, which together may take `limit` seconds; closed at the end.

    Raises what `connect` raises, and the errors of `error_of` for what ends the connection or one of its channels.
    """
    connection = await connect(settings)
    try:
        async with answers(settings, limit):
            yield connection
    finally:
        if connection.blocked is None:
            await connection.close()
        else:
            connection.leave(Closure("this side left a broker that blocks publishers, and reads no goodbye"))


@contextlib.asynccontextmanager
async def answers(settings: RabbitMQSettings, limit: float) -> AsyncIterator[None]:
    """Bounds the time of questions on a connection, and raises our errors for their refusals."""
    try:
        async with asyncio.timeout(limit):
            yield
    except ClosedError as error:
        raise error_of(settings, error.closure) from error
    except TimeoutError as error:
        raise BrokerUnavailableError(
            f"{rabbitmq_at(settings)} does not answer a question within {limit:g} s"
        ) from error
