"""Takes received bytes apart. Confirms and deliveries, which come all the time, are read by hand; the rest by pamqp."""

import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from pamqp import commands, exceptions, frame
from pamqp.base import Frame
from pamqp.header import ContentHeader

from bridge.brokers.rabbitmq.frames import CHANNEL

_OVERHEAD: Final = 8
_FRAME_END: Final = 0xCE
_METHOD, _HEADER, _BODY = 1, 2, 3
_FRAME_TYPES: Final = (1, 2, 3, 8)
FRAME_MAX: Final = 131_072
"""What we ask for, and RabbitMQ's own default."""
_CONFIRM_SIZE: Final = 21
"""Bytes of the frame of one confirm."""
# A method frame of 13 bytes on the publishing channel: class 60, method 80 (basic.ack) or 120 (basic.nack).
_ACK: Final = struct.pack(">BHIHH", _METHOD, CHANNEL, 13, 60, 80)
_NACK: Final = struct.pack(">BHIHH", _METHOD, CHANNEL, 13, 60, 120)
_TAG_AND_FLAGS: Final = struct.Struct(">QB")
_DELIVER: Final = struct.pack(">HH", 60, 60)
"""Class and method of basic.deliver."""
_CONSUMER_TAG: Final = 11
"""Where in the frame of a basic.deliver its consumer's tag begins, with its length."""
_BODY_SIZE: Final = slice(11, 19)
"""Where in the frame of a content header the size of the body stands."""


class Delivered(NamedTuple):
    """A message as the broker delivered it."""

    channel: int
    tag: int
    exchange: str
    routing_key: str
    header: bytes
    """The content header: class, weight, size of the body, and the properties, encoded."""
    body: bytes


class BrokenStreamError(Exception):
    """The bytes are not AMQP frames."""


class FrameReader:
    """Give it bytes as they come; it calls back once for each frame."""

    def __init__(
        self,
        on_confirm: Callable[[int, bool, bool], None],
        on_method: Callable[[int, Frame], None],
        on_return: Callable[[commands.Basic.Return, str], None],
        on_delivery: Callable[[Delivered], None] = lambda message: None,
    ) -> None:
        """`on_confirm` takes the delivery tag, whether it stands for all tags below too, and whether it is a nack;
        `on_method` the channel and the method; `on_return` the method and the message id of what came back;
        `on_delivery` what was delivered, once it is here whole."""
        self.frame_max = FRAME_MAX
        """Largest whole frame, in bytes, that the peer may send; 0: no limit."""
        self.on_confirm = on_confirm
        self._on_method = on_method
        self._on_return = on_return
        self.on_delivery = on_delivery
        self._rest = b""
        self._returned: commands.Basic.Return | None = None
        self._contents: dict[int, _Content] = {}
        """By channel, the message whose content comes."""

    @property
    def unread(self) -> bytes:
        """What came after the last whole frame."""
        return self._rest

    def feed(self, data: bytes) -> bool:
        """Whether a confirm was read. Raises BrokenStreamError."""
        if self._rest:
            data = self._rest + data
        on_confirm, unpack = self.on_confirm, _TAG_AND_FLAGS.unpack_from
        position, end = 0, len(data)
        last_confirm = end - _CONFIRM_SIZE
        confirmed = False
        while True:
            start = position
            while position <= last_confirm:
                if data.startswith(_ACK, position):
                    tag, flags = unpack(data, position + 11)
                    on_confirm(tag, flags == 1, False)
                    position += _CONFIRM_SIZE
                    continue
                if data.startswith(_NACK, position):
                    tag, flags = unpack(data, position + 11)
                    on_confirm(tag, flags & 1 == 1, True)
                    position += _CONFIRM_SIZE
                    continue
                break
            if position > start:
                confirmed = True
            if end - position < _OVERHEAD:
                break
            stop = position + _OVERHEAD + int.from_bytes(data[position + 3 : position + 7])
            if stop > end:
                self._check_head(data[position : position + _OVERHEAD])
                break
            self._read(data[position:stop])
            position = stop
        self._rest = data[position:]
        return confirmed

    def _check_head(self, head: bytes) -> None:
        """A frame that is not yet here whole must at least begin as one, or it would be waited for in vain."""
        size = _OVERHEAD + int.from_bytes(head[3:7])
        if head[0] not in _FRAME_TYPES or 0 < self.frame_max < size:
            raise BrokenStreamError(f"what the server sends is not AMQP 0-9-1: {head!r}")

    def _read(self, data: bytes) -> None:
        if data[-1] != _FRAME_END:
            raise BrokenStreamError(f"a frame does not end as one: {data[:16]!r}")
        kind = data[0]
        if kind == _METHOD and data.startswith(_DELIVER, 7):
            begun = _Content(data)
            self._contents[begun.channel] = begun
            return
        if kind != _METHOD and (open_one := self._contents.get(data[1] << 8 | data[2])) is not None:
            if (message := open_one.add(kind, data)) is not None:
                del self._contents[open_one.channel]
                self.on_delivery(message)
            return
        if kind == _BODY:
            return  # of a message that came back; its id stood in the content header
        try:
            _, channel, content = frame.unmarshal(data)
        except (exceptions.PAMQPException, struct.error, ValueError, TypeError) as error:
            raise BrokenStreamError(f"a frame cannot be decoded: {error}") from error
        if isinstance(content, ContentHeader):
            returned, self._returned = self._returned, None
            if returned is not None:
                self._on_return(returned, str(content.properties.message_id or ""))
        elif isinstance(content, commands.Basic.Return):
            self._returned = content
        elif isinstance(content, Frame):
            self._on_method(channel, content)


class _Content:
    """A message that comes in frames: basic.deliver, content header, bodies."""

    __slots__ = ("_exchange", "_header", "_missing", "_pieces", "_routing_key", "_tag", "channel")

    def __init__(self, data: bytes) -> None:
        """Of the first frame: consumer's tag, delivery tag, whether it comes again, exchange, routing key.

        Raises BrokenStreamError.
        """
        self.channel = data[1] << 8 | data[2]
        try:
            at = _CONSUMER_TAG + 1 + data[_CONSUMER_TAG]
            exchange_at = at + 10
            key_at = exchange_at + data[exchange_at - 1]
            self._tag = int.from_bytes(data[at : at + 8])
            self._exchange, self._routing_key = data[exchange_at:key_at].decode(), data[key_at + 1 : -1].decode()
            is_whole = len(data) == key_at + 2 + data[key_at]
        except (IndexError, ValueError) as error:
            raise BrokenStreamError(f"a delivery cannot be decoded: {error}") from error
        if not is_whole:
            raise BrokenStreamError(f"the fields of a delivery do not fill it: {data[:80]!r}")
        self._header = b""
        self._missing = 0
        """Bytes of the body that are still to come."""
        self._pieces: list[bytes] = []

    def add(self, kind: int, data: bytes) -> Delivered | None:
        """Takes the next frame; gives the message once it is whole. Raises BrokenStreamError."""
        piece = data[7:-1]
        if kind == _HEADER:
            self._header = piece
            self._missing = int.from_bytes(data[_BODY_SIZE])
        else:
            self._missing -= len(piece)
            self._pieces.append(piece)
        if self._missing < 0:
            raise BrokenStreamError(f"a body is {-self._missing} bytes longer than its content header says")
        if self._missing:
            return None
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        return Delivered(self.channel, self._tag, self._exchange, self._routing_key, self._header, body)
