"""An event, and how it travels: CloudEvents 1.0 in binary mode, over AMQP 0-9-1, Pub/Sub and NATS.

The bridge writes this form and the workers read it, both through this module. The payload's bytes are
never parsed or changed on the way.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, NamedTuple

SPECVERSION = "1.0"
"""The CloudEvents version that the attributes follow."""

AMQP_PREFIX = "cloudEvents_"
"""Prefix of CloudEvents attributes in an AMQP header table (CloudEvents AMQP binding, 3.1.3)."""

ATTRIBUTE_PREFIX = "ce-"
"""Prefix of CloudEvents attributes in Pub/Sub attributes and NATS headers."""

REPLAYED = "replayed"
"""The header that tells consumers of a replay. The event's id stays what it was, so an inbox recognises it."""

NO_HEADERS: Mapping[str, str] = MappingProxyType({})
"""What an event without headers of its own carries; one object, shared."""


class Malformed(ValueError):  # noqa: N818 - named for what the message is
    """A message is no event: an attribute is missing or has no legal form. The text says which."""


class Event(NamedTuple):
    """Something that happened in the database, as committed."""

    id: str
    """UUID in its text form; stable for ever, so it serves as an idempotency key."""
    topic: str
    """Dotted words; routing key, subject and CloudEvents type."""
    payload: bytes
    """The payload as the database stored it, UTF-8."""
    key: str | None
    """Events with one key are published in the order in which they were committed."""
    source: str
    """``/<database>/<bridge name>``."""
    time: datetime
    """When the event was recorded, by the database's clock."""
    content_type: str
    """``application/json`` or ``text/plain``."""
    headers: Mapping[str, str]
    """The author's own headers, with ``traceparent`` and ``actor`` where they were known."""
    sequence: int = 0
    """Position in the log; 0 for an event that did not come from it. It does not travel."""

    def json(self) -> Any:
        """The payload, parsed. Raises Malformed when it is no JSON."""
        try:
            return json.loads(self.payload)
        except ValueError as error:
            raise Malformed(f"the payload of event {self.id} is no JSON: {error}") from error


def header_values(headers: Mapping[str, Any]) -> Mapping[str, str]:
    """Headers as they travel: a string as it is, any other JSON value as its JSON text."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in headers.items()
    }


def attributes(event: Event, prefix: str = ATTRIBUTE_PREFIX) -> dict[str, str]:
    """Every attribute and header of an event but its payload, as flat strings.

    Raises Malformed when a header has the name of one of the event's own attributes.
    """
    for name in event.headers:
        if name.startswith(prefix):
            raise Malformed(f"the header {name!r}: {prefix} is reserved for the event's own attributes")
    flat = {
        f"{prefix}specversion": SPECVERSION,
        f"{prefix}id": event.id,
        f"{prefix}type": event.topic,
        f"{prefix}source": event.source,
        f"{prefix}time": event.time.isoformat(),
    }
    if event.key is not None:
        flat[f"{prefix}subject"] = event.key
    flat.update(event.headers)
    return flat


def from_attributes(
    flat: Mapping[str, str], payload: bytes, content_type: str | None = None, prefix: str = ATTRIBUTE_PREFIX
) -> Event:
    """The event that `attributes` wrote. Raises Malformed when an attribute is missing or illegal."""

    def required(name: str) -> str:
        value = flat.get(prefix + name)
        if not value:
            raise Malformed(f"the message has no attribute {prefix}{name}, so it is no CloudEvent")
        return value

    try:
        time = datetime.fromisoformat(required("time")).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise Malformed(f"{prefix}time is no RFC 3339 time: {error}") from error
    return Event(
        id=required("id"),
        topic=required("type"),
        payload=payload,
        key=flat.get(f"{prefix}subject"),
        source=required("source"),
        time=time,
        content_type=content_type or "application/json",
        headers={name: value for name, value in flat.items() if not name.startswith(prefix)},
    )
