"""A message of RabbitMQ: its properties, the event in it, and its counts.

Content type and headers are read by hand, since every event needs them and pamqp takes thirty times as long; whatever
else there is, and headers that are neither texts nor counts, is pamqp's.
"""

import struct
from datetime import UTC, datetime
from typing import Any, Final, cast

from pamqp import commands
from pamqp.header import ContentHeader

from bridge.brokers.letters import PREFIX
from bridge.brokers.rabbitmq.lanes import LANE
from bridge.event import AMQP_PREFIX, Event, Malformed, from_attributes

BROKERS: Final = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count")
"""What RabbitMQ adds to a message's headers; no part of the event, and not to be published again."""

_OTHER_PREFIX: Final = "cloudEvents:"
"""What other programs may write for AMQP_PREFIX (CloudEvents AMQP binding 1.0.2, 3.1.3.1)."""

_NOT_OF_THE_EVENT: Final = (*BROKERS, PREFIX, LANE)

UNREADABLE: Final = f"{PREFIX}unreadable"
"""In place of all properties of a message that cannot be decoded: why."""

UNDECODABLE: Final = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    OSError,
    RecursionError,
    struct.error,
)
"""What pamqp raises for properties that it cannot decode."""

_FLAGS_AT, _PROPERTIES_AT = 12, 14
"""Where in a content header the flags that tell which properties there are stand, and the first property."""
_CONTENT_TYPE, _CONTENT_ENCODING, _HEADERS, _MORE_FLAGS = 0x8000, 0x4000, 0x2000, 0x0001
_TEXT, _LONG = ord("S"), ord("l")
"""How a field table marks a long string, and a signed integer of eight bytes."""


class Message:
    """One message that was delivered."""

    __slots__ = ("_header", "_properties", "body", "content_type", "exchange", "headers", "routing_key", "tag")

    def __init__(
        self,
        tag: int,
        exchange: str,
        routing_key: str,
        header: bytes | commands.Basic.Properties,
        body: bytes,
    ) -> None:
        """`header` is the content header's payload, as `reader.Delivered` has it, or the properties in it."""
        self.tag = tag
        """By which it is settled, on the channel that delivered it."""
        self.exchange = exchange
        self.routing_key = routing_key
        self.body = body
        self.content_type: str | None
        self.headers: dict[str, Any]
        self._header = b""
        self._properties: commands.Basic.Properties | None = None
        if isinstance(header, bytes):
            self._header = header
            if (common := _content_type_and_headers(header)) is not None:
                self.content_type, self.headers = common
                return
        else:
            self._properties = header
        self.content_type = self.properties.content_type
        self.headers = cast("dict[str, Any]", self.properties.headers or {})

    @property
    def properties(self) -> commands.Basic.Properties:
        """All of its properties; of one whose properties cannot be decoded only the header UNREADABLE."""
        if self._properties is None:
            content = ContentHeader()
            try:
                content.unmarshal(self._header)
            except UNDECODABLE as error:
                content.properties = unreadable(error)
            self._properties = content.properties
        return self._properties


def unreadable(error: BaseException) -> commands.Basic.Properties:
    """What stands for properties that cannot be decoded."""
    return commands.Basic.Properties(headers={UNREADABLE: f"{type(error).__name__}: {error}"})


def _content_type_and_headers(header: bytes) -> tuple[str | None, dict[str, Any]] | None:
    """Those two, where they are the first properties and every header is a text or a count; None where pamqp must look,
    also at what is wrong."""
    try:
        flags = header[_FLAGS_AT] << 8 | header[_FLAGS_AT + 1]
        if flags & (_CONTENT_ENCODING | _MORE_FLAGS):
            return None
        at = _PROPERTIES_AT
        content_type = None
        if flags & _CONTENT_TYPE:
            start = at + 1
            at = start + header[at]
            content_type = header[start:at].decode()
        headers: dict[str, Any] = {}
        if flags & _HEADERS:
            end = at + 4 + int.from_bytes(header[at : at + 4])
            at += 4
            while at < end:
                name_at = at + 1
                kind_at = name_at + header[at]
                name = header[name_at:kind_at].decode()
                kind = header[kind_at]
                if kind == _TEXT:
                    start = kind_at + 5
                    at = start + int.from_bytes(header[kind_at + 1 : start])
                    headers[name] = header[start:at].decode()
                elif kind == _LONG:
                    start, at = kind_at + 1, kind_at + 9
                    headers[name] = int.from_bytes(header[start:at], signed=True)
                else:
                    return None
            if at != end:
                return None
    except (IndexError, UnicodeDecodeError):
        return None
    return (content_type, headers) if at <= len(header) else None


def event_of(message: Message) -> Event | Malformed:
    """The event, or why the message is none."""
    headers = message.headers
    if UNREADABLE in headers:
        return Malformed(f"its properties cannot be decoded: {_text(headers[UNREADABLE])}")
    flat = {
        name: value if type(value) is str else _text(value)
        for name, value in headers.items()
        if not name.startswith(_NOT_OF_THE_EVENT)
    }
    if f"{AMQP_PREFIX}specversion" not in flat:
        flat = {_with_our_prefix(name): value for name, value in flat.items()}
    try:
        return from_attributes(flat, message.body, message.content_type, AMQP_PREFIX, lambda: sent_at(message))
    except Malformed as error:
        return error


def _with_our_prefix(name: str) -> str:
    return AMQP_PREFIX + name.removeprefix(_OTHER_PREFIX) if name.startswith(_OTHER_PREFIX) else name


def sent_at(message: Message) -> datetime:
    """When it was sent, as whoever sent it says, else when it came here."""
    return message.properties.timestamp or datetime.now(UTC)


def count_of(message: Message, name: str) -> int:
    """A count from a header; 0 for what is none, since anyone may have published it."""
    value = message.headers.get(name)
    return max(0, int(value)) if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) else 0


def _text(value: Any) -> str:
    """A header's value, also as other publishers write it."""
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode(errors="replace")
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.isoformat() if isinstance(value, datetime) else str(value)
