"""A message of RabbitMQ: the event in it, and its counts."""

from datetime import UTC, datetime
from typing import Any, Final

from aio_pika.abc import AbstractIncomingMessage

from bridge.brokers.letters import PREFIX
from bridge.event import AMQP_PREFIX, Event, Malformed, from_attributes

BROKERS: Final = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count")
"""What RabbitMQ adds to a message's headers; no part of the event, and not to be published again."""

_OTHER_PREFIX: Final = "cloudEvents:"
"""What other programs may write for AMQP_PREFIX (CloudEvents AMQP binding 1.0.2, 3.1.3.1)."""

UNREADABLE: Final = f"{PREFIX}unreadable"
"""In place of all properties of a message that cannot be decoded: why."""


def event_of(message: AbstractIncomingMessage) -> Event | Malformed:
    """The event, or why the message is none."""
    if UNREADABLE in message.headers:
        return Malformed(f"its properties cannot be decoded: {_text(message.headers[UNREADABLE])}")
    flat = {name: _text(value) for name, value in message.headers.items() if not name.startswith((*BROKERS, PREFIX))}
    if f"{AMQP_PREFIX}specversion" not in flat:
        flat = {_with_our_prefix(name): value for name, value in flat.items()}
    try:
        return from_attributes(flat, message.body, message.content_type, AMQP_PREFIX, lambda: sent_at(message))
    except Malformed as error:
        return error


def _with_our_prefix(name: str) -> str:
    return AMQP_PREFIX + name.removeprefix(_OTHER_PREFIX) if name.startswith(_OTHER_PREFIX) else name


def sent_at(message: AbstractIncomingMessage) -> datetime:
    """When it was sent, as whoever sent it says, else when it came here."""
    return message.timestamp or datetime.now(UTC)


def count_of(message: AbstractIncomingMessage, name: str) -> int:
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
