"""One AMQP 0-9-1 connection: handshake, heartbeats, flow control, and what ended it."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from pamqp import commands, frame
from pamqp.base import Frame
from pamqp.common import FieldTable
from pamqp.header import ProtocolHeader
from pamqp.heartbeat import Heartbeat

import bridge
from bridge.brokers.rabbitmq.frames import CHANNEL
from bridge.brokers.rabbitmq.reader import FRAME_MAX, BrokenStreamError, FrameReader
from bridge.brokers.rabbitmq.settings import Address

ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED, NOT_ALLOWED = 403, 404, 406, 530
"""AMQP's reply codes, as far as we act on them."""


@dataclass(frozen=True, slots=True)
class Closure:
    """Why a connection or channel ended. `code` is AMQP's reply code; 0 when the broker gave none."""

    reason: str
    code: int = 0

    def __str__(self) -> str:
        return f"{self.reason} ({self.code})" if self.code else self.reason


class ClosedError(Exception):
    """The connection or channel ended before the answer came."""

    def __init__(self, closure: Closure) -> None:
        super().__init__(str(closure))
        self.closure = closure


_CLOSE_LIMIT = 3.0
_BUFFER_HIGH = 1_048_576
_BUFFER_LOW = 262_144
_HEARTBEAT = Heartbeat.marshal()
_CHANNEL_MAX = 16
_PROPERTIES: FieldTable = {
    "product": "pgbridge",
    "version": bridge.__version__,
    "platform": "Python",
    "capabilities": {
        "publisher_confirms": True,
        "basic.nack": True,
        "connection.blocked": True,
        # A wrong password is told with connection.close, instead of a socket that closes without a word.
        "authentication_failure_close": True,
    },
}


class Connection(asyncio.Protocol):
    """Made by `connect`. After `lost` it is of no more use."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.lost: Closure | None = None
        self.blocked: str | None = None
        """Why the broker takes no publishes now: its `connection.blocked`."""
        self.frame_max = FRAME_MAX
        self._loop = loop
        self._transport: asyncio.Transport
        self._paused = False
        self._closing = False
        self._answers: dict[int, asyncio.Future[Frame]] = {}
        self._closed = loop.create_future()
        self._heard = False
        self._silent_ticks = 0
        self._heartbeat: asyncio.TimerHandle | None = None
        self._on_room: Callable[[], None] = lambda: None
        self._on_lost: Callable[[Closure], None] = lambda closure: None
        self._on_return: Callable[[commands.Basic.Return, str], None] = lambda method, message_id: None
        self._reader = FrameReader(
            on_confirm=lambda tag, multiple, nacked: None,
            on_method=self._method_received,
            on_return=lambda method, message_id: self._on_return(method, message_id),
        )

    def listen(
        self,
        *,
        confirmed: Callable[[int, bool, bool], None],
        returned: Callable[[commands.Basic.Return, str], None],
        room: Callable[[], None],
        lost: Callable[[Closure], None],
    ) -> None:
        """Who hears of confirms and returns, that `has_room` became true, and of the end."""
        self._reader.on_confirm = confirmed
        self._on_return, self._on_room, self._on_lost = returned, room, lost

    @property
    def has_room(self) -> bool:
        """Whether more may be written now."""
        return not (self._paused or self._closing or self.blocked is not None or self.lost is not None)

    def write(self, data: bytes) -> None:
        self._transport.write(data)

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

    async def handshake(self, address: Address, heartbeat: float) -> None:
        """From the protocol header to connection.open-ok. Raises ClosedError."""
        self._answers[0] = answer = self._loop.create_future()
        self.write(ProtocolHeader().marshal())
        start = cast(commands.Connection.Start, await answer)
        if "PLAIN" not in start.mechanisms.split():
            raise ClosedError(Closure(f"the broker offers {start.mechanisms}, and no PLAIN, to log in"))
        tune = cast(
            commands.Connection.Tune,
            await self.call(
                0,
                commands.Connection.StartOk(
                    client_properties={**_PROPERTIES, "connection_name": f"pgbridge on {socket.gethostname()}"},
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
        await self.call(
            0,
            commands.Connection.TuneOk(min(tune.channel_max or _CHANNEL_MAX, _CHANNEL_MAX), self.frame_max, seconds),
            commands.Connection.Open(address.virtual_host),
        )
        if seconds:
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
                self.lose(Closure(f"the broker closed the connection: {method.reply_text}", method.reply_code or 0))
            case commands.Connection.CloseOk():
                self.lose(Closure("this side closed the connection"))
            case commands.Connection.Blocked():
                self.blocked = method.reason or "no reason given"
            case commands.Connection.Unblocked():
                self.blocked = None
                if self.has_room:
                    self._on_room()
            case commands.Channel.Close():
                self._channel_closed(channel, method)
            case _:
                answer = self._answers.get(channel)
                if answer is not None and not answer.done():
                    answer.set_result(method)

    def _channel_closed(self, channel: int, method: commands.Channel.Close) -> None:
        closure = Closure(f"the broker closed the channel: {method.reply_text}", method.reply_code or 0)
        self.send(channel, commands.Channel.CloseOk())
        answer = self._answers.get(channel)
        if answer is not None and not answer.done():
            answer.set_exception(ClosedError(closure))
        elif channel == CHANNEL:
            self.leave(closure)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_BUFFER_HIGH, _BUFFER_LOW)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        try:
            self._reader.feed(data)
        except BrokenStreamError as error:
            self.abort(Closure(str(error)))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lose(Closure(f"the connection broke: {exc}" if exc else "the broker ended the connection"))
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self.has_room:
            self._on_room()


async def connect(address: Address, heartbeat: float) -> Connection:
    """A connection after its handshake. `heartbeat` in seconds, 0 for none. The caller bounds the time.

    Raises ClosedError when the broker says no, OSError when it does not answer.
    """
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Connection(loop), address.host, address.port, ssl=address.tls)
    try:
        await connection.handshake(address, heartbeat)
    except BaseException:
        connection.abort(Closure("the handshake failed"))
        raise
    return connection
