"""A message of RabbitMQ: the event in it, and its counts."""

from datetime import datetime
from typing import Any, Final

from aio_pika.abc import AbstractIncomingMessage

from bridge.brokers.letters import PREFIX
from bridge.event import AMQP_PREFIX, Event, Malformed, from_attributes

BROKERS: Final = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count")
"""What RabbitMQ adds to a message's headers; no part of the event, and not to be published again."""


def event_of(message: AbstractIncomingMessage) -> Event | Malformed:
    """The event, or why the message is none."""
    flat = {name: _text(value) for name, value in message.headers.items() if not name.startswith((*BROKERS, PREFIX))}
    try:
        return from_attributes(flat, message.body, message.content_type, AMQP_PREFIX)
    except Malformed as error:
        return error


def count_of(message: AbstractIncomingMessage, name: str) -> int:
    """A count from a header; 0 for what is none, since anyone may have published it."""
    value = message.headers.get(name)
    return max(0, int(value)) if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) else 0


def _text(value: Any) -> str:
    """A header's value, also as other publishers write it."""
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode(errors="replace")
    return value.isoformat() if isinstance(value, datetime) else str(value)
