"""Takes received bytes apart. Confirms, which come for every message or two, are read by hand; the rest by pamqp."""

import struct
from collections.abc import Callable
from typing import Final

from pamqp import commands, exceptions, frame
from pamqp.base import Frame
from pamqp.header import ContentHeader

from bridge.brokers.rabbitmq.frames import CHANNEL

_OVERHEAD: Final = 8
_FRAME_END: Final = 0xCE
_METHOD, _BODY = 1, 3
_FRAME_TYPES: Final = (1, 2, 3, 8)
FRAME_MAX: Final = 131_072
"""What we ask for, and RabbitMQ's own default."""
_CONFIRM_SIZE: Final = 21
"""Bytes of the frame of one confirm."""
# A method frame of 13 bytes on the publishing channel: class 60, method 80 (basic.ack) or 120 (basic.nack).
_ACK: Final = struct.pack(">BHIHH", _METHOD, CHANNEL, 13, 60, 80)
_NACK: Final = struct.pack(">BHIHH", _METHOD, CHANNEL, 13, 60, 120)
_TAG_AND_FLAGS: Final = struct.Struct(">QB")


class BrokenStreamError(Exception):
    """The bytes are not AMQP frames."""


class FrameReader:
    """Give it bytes as they come; it calls back once for each frame."""

    def __init__(
        self,
        on_confirm: Callable[[int, bool, bool], None],
        on_method: Callable[[int, Frame], None],
        on_return: Callable[[commands.Basic.Return, str], None],
    ) -> None:
        """`on_confirm` takes the delivery tag, whether it stands for all tags below too, and whether it is a nack;
        `on_method` the channel and the method; `on_return` the method and the message id of what came back."""
        self.frame_max = FRAME_MAX
        """Largest whole frame, in bytes, that the peer may send; 0: no limit."""
        self.on_confirm = on_confirm
        self._on_method = on_method
        self._on_return = on_return
        self._rest = b""
        self._returned: commands.Basic.Return | None = None

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
        if data[0] == _BODY:
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
