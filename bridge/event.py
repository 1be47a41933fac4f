"""An event, and how it travels: CloudEvents 1.0 in binary mode, over AMQP 0-9-1, Pub/Sub and NATS.

The bridge writes this form and the workers read it, both through this module. The payload's bytes are never parsed or
changed on the way. `matches` is how routes and subscriptions choose topics; `TimeWriter` writes an event's time.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, Final, NamedTuple

SPECVERSION: Final = "1.0"
"""The CloudEvents version that the attributes follow."""

AMQP_PREFIX: Final = "cloudEvents_"
"""Prefix of CloudEvents attributes in an AMQP header table (CloudEvents AMQP binding, 3.1.3)."""

ATTRIBUTE_PREFIX: Final = "ce-"
"""Prefix of CloudEvents attributes in Pub/Sub attributes and NATS headers."""

REPLAYED: Final = "replayed"
"""The header that tells consumers of a replay. The event's id stays what it was, so an inbox recognises it."""

NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})
"""What an event without headers of its own carries; one object, shared."""


class Malformed(ValueError):  # noqa: N818 - named for what the message is
    """A message is not an event: an attribute is missing or not legal. The text says which."""


class Event(NamedTuple):
    """Something that happened in the database, as committed."""

    id: str
    """UUID in its text form; it never changes, so it serves as an idempotency key."""
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

    @property
    def weight(self) -> int:
        """Bytes of payload, key and headers: what the event takes of a limit on memory."""
        size = len(self.payload)
        if self.key is not None:
            size += len(self.key)
        if self.headers:
            size += sum([len(name) + len(value) for name, value in self.headers.items()])
        return size

    def json(self) -> Any:
        """The payload, parsed. Raises Malformed when it is not JSON."""
        try:
            return json.loads(self.payload)
        except ValueError as error:
            raise Malformed(f"the payload of event {self.id} is not JSON: {error}") from error


def read_headers(texts: str | None) -> Mapping[str, str]:
    """The headers in what `bridge.header_texts()` gives for a row: None, or the text of an object of strings.

    It holds no number and no nesting, which Python's reader may refuse; what an author wrote stays inside the strings.
    """
    return json.loads(texts) if texts else NO_HEADERS


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
            raise Malformed(f"the message has no attribute {prefix}{name}, so it is not a CloudEvent")
        return value

    try:
        time = datetime.fromisoformat(required("time")).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise Malformed(f"{prefix}time is not an RFC 3339 time: {error}") from error
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


def matches(pattern: str, topic: str) -> bool:
    """Whether the pattern takes the topic.

    Patterns are AMQP's: words between dots, ``*`` for exactly one word, ``#`` for any number of words, also none.
    """
    return _words_match(pattern.split("."), topic.split("."))


def _words_match(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    head, rest = pattern[0], pattern[1:]
    if head == "#":
        return any(_words_match(rest, words[taken:]) for taken in range(len(words) + 1))
    return bool(words) and head in ("*", words[0]) and _words_match(rest, words[1:])


_ONE_SECOND: Final = timedelta(seconds=1)
_ZERO: Final = timedelta(0)


class TimeWriter:
    """Writes times as ISO 8601 text and as AMQP's timestamp, both computed once a second.

    Events come nearly in order, so most share their second with the one before, and `isoformat()` costs 1.2 us a call.
    """

    def __init__(self) -> None:
        self._set_second(datetime(1970, 1, 1, tzinfo=UTC))

    def _set_second(self, time: datetime) -> None:
        self._second = second = time.replace(microsecond=0)
        self._zone, self._fold = time.tzinfo, time.fold
        text = second.isoformat()
        self._whole = text.encode()
        self._date, self._offset = self._whole[:19], self._whole[19:]
        self.timestamp = int(second.timestamp())

    def iso(self, time: datetime) -> bytes:
        """As `time.isoformat()`. Afterwards `timestamp` holds its whole seconds since 1970."""
        # The zone first: two zones write one time differently. The same zone may, when clocks are set back (fold).
        if time.tzinfo is not self._zone or time.fold != self._fold or not _ZERO <= time - self._second < _ONE_SECOND:
            self._set_second(time)
        microsecond = time.microsecond
        return b"%b.%06d%b" % (self._date, microsecond, self._offset) if microsecond else self._whole
