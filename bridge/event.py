"""An event, and how it travels: CloudEvents 1.0 in binary mode, over AMQP 0-9-1, Pub/Sub and NATS.

The bridge writes this form and the workers read it, both through this module; events of other programs are read in
structured mode, too. The payload's bytes are never parsed or changed on the way. `matches` is how routes and
subscriptions choose topics; `TimeWriter` writes an event's time.
"""

import json
import re
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from bridge.structured import MEDIA_TYPE, take_apart

SPECVERSION: Final = "1.0"
"""The CloudEvents version that the attributes follow."""

AMQP_PREFIX: Final = "cloudEvents_"
"""Prefix of CloudEvents attributes in an AMQP header table (CloudEvents AMQP binding, 3.1.3)."""

ATTRIBUTE_PREFIX: Final = "ce-"
"""Prefix of CloudEvents attributes in Pub/Sub attributes and NATS headers."""

REPLAYED: Final = "replayed"
"""The header that tells consumers of a replay; its value is that replay's own, see `replay_mark`. The event's id stays
what it was, so an inbox recognises it."""

TRACEPARENT: Final = "traceparent"
"""The header with the trace that an event belongs to, and the last step in it (W3C Trace Context)."""

NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})
"""What an event without headers of its own carries; one object, shared."""


INBOX_NAMESPACE: Final = uuid.UUID("6873494e-5b5e-421c-a6b9-7fee1425ef24")
"""The namespace of `Event.inbox_id`. It never changes: handled events would be handled again."""

_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

_TRACEPARENT: Final = re.compile(
    # Only versions after 00 may say more behind the flags, and there is no version ff.
    r"(?!ff)(?!00-.{53})[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?"
)


def replay_mark() -> dict[str, str]:
    """The header that marks what one replay publishes. Every call is another replay; what it publishes more than once,
    since a confirm was lost, has one mark, and is told from a second replay by it."""
    return {REPLAYED: str(uuid.uuid4())}


class Malformed(ValueError):  # noqa: N818 - named for what the message is
    """A message is not an event: an attribute is missing or not legal. The text says which."""


_ODD: Final = frozenset("13579bdf")
"""What the last digit of `traceparent`'s flags is where the trace is sampled."""


class Trace(NamedTuple):
    """Where an event belongs, as its header `traceparent` says."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 of them: the last step before this one."""


class Event(NamedTuple):
    """Something that happened in the database, as committed; or what another program published as a CloudEvent."""

    id: str
    """As its author gave it. The bridge gives UUIDs in their text form; others are unique only with their `source`."""
    topic: str
    """Dotted words; routing key, subject and CloudEvents type."""
    payload: bytes
    """The payload as the database stored it, UTF-8."""
    key: str | None
    """Events with one key are published in the order in which they were committed."""
    source: str
    """``/<database>/<bridge name>``; of another program's event, what that gave."""
    time: datetime
    """When the event was recorded, by the database's clock. Of another program's event without a time: when the broker
    took the message, on RabbitMQ its property `timestamp`, without which it is when the worker received it."""
    content_type: str
    """``application/json`` or ``text/plain``; of another program's event, what that gave."""
    headers: Mapping[str, str]
    """The author's own headers, with ``traceparent`` and ``actor`` where they were known. Of another program's event
    also its further attributes, such as ``dataschema`` and extensions, by their names without the prefix."""
    sequence: int = 0
    """Position in the log; 0 for an event that did not come from it. It does not travel."""

    @property
    def inbox_id(self) -> str:
        """The UUID that a worker's inbox, its reply function and its idempotency keys know the event by.

        An id of the form 8-4-4-4-12 is that UUID itself, in lower case. Any other becomes the UUIDv5 (RFC 9562) in
        INBOX_NAMESPACE of ``<bytes of source>:<source><id>``, in UTF-8, since only source and id together are unique.
        """
        if _UUID.fullmatch(self.id):
            return self.id.lower()
        return str(uuid.uuid5(INBOX_NAMESPACE, f"{len(self.source.encode())}:{self.source}{self.id}"))

    @property
    def replay(self) -> str | None:
        """Which replay brought it; None for no replay."""
        return self.headers.get(REPLAYED)

    @property
    def trace(self) -> Trace | None:
        """The trace it belongs to; None without one, and where the header is none of W3C's."""
        text = self.headers.get(TRACEPARENT)
        if text is None or not _TRACEPARENT.fullmatch(text):
            return None
        return Trace(text[3:35], text[36:52])

    @property
    def is_sampled(self) -> bool:
        """Whether it belongs to a trace that its beginner wants to see. Quick to say of those that do not."""
        text = self.headers.get(TRACEPARENT)
        return text is not None and text[54:55] in _ODD and _TRACEPARENT.fullmatch(text) is not None

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
        except (ValueError, RecursionError) as error:
            raise Malformed(f"the payload of event {self.id} is not JSON: {error}") from error


def trace_fields(event: "Event | Malformed") -> Mapping[str, str]:
    """For log lines about an event: the trace that it belongs to, and the last step in it; nothing without one."""
    trace = event.trace if isinstance(event, Event) else None
    return NO_HEADERS if trace is None else {"trace_id": trace.trace_id, "span_id": trace.span_id}


def read_headers(texts: str | None) -> Mapping[str, str]:
    """The headers in what `bridge.header_texts()` gives for a row: None, or the text of an object of strings.

    It holds no number and no nesting, which Python's reader may refuse; what an author wrote stays inside the strings.
    """
    return json.loads(texts) if texts else NO_HEADERS


NO_TOPIC: Final = "the event has no topic; it is its type as a CloudEvent, which must not be empty"
"""Why a sink refuses such an event, which only a row can be that was written past `bridge.emit()`."""


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


def _now() -> datetime:
    return datetime.now(UTC)


def from_attributes(
    flat: Mapping[str, str],
    payload: bytes,
    content_type: str | None = None,
    prefix: str = ATTRIBUTE_PREFIX,
    sent: Callable[[], datetime] = _now,
) -> Event:
    """The event in a message that `attributes` or another program wrote, be it in binary or in structured mode.

    `sent` is asked for the time of one whose author gave none. Raises Malformed, which says what is wrong.
    """
    if content_type is not None and content_type[: len(MEDIA_TYPE)].lower() == MEDIA_TYPE:
        try:
            own, payload, content_type = take_apart(payload, content_type)
        except ValueError as error:
            raise Malformed(f"the message is no CloudEvent in JSON: {error}") from error
        beside = {name: value for name, value in flat.items() if not name.startswith(prefix)}
        flat = beside | {prefix + name: value for name, value in own.items()}
    names = _names(prefix)
    attribute = flat.get
    event_id, topic, source = attribute(names.id), attribute(names.type), attribute(names.source)
    if not event_id or not topic or not source or attribute(names.specversion) != SPECVERSION:
        raise _not_an_event(flat, prefix)
    written = attribute(names.time)
    try:
        time = sent() if written is None else datetime.fromisoformat(written.upper())
        if time.tzinfo is not UTC:
            time = _in_utc(time)
    except (ValueError, OverflowError) as error:
        raise Malformed(f"{prefix}time is not an RFC 3339 time: {error}") from error
    key = attribute(names.subject)
    headers = {name: value for name, value in flat.items() if not name.startswith(prefix)}
    if len(flat) - len(headers) > _REQUIRED + (written is not None) + (key is not None):
        content_type = content_type or attribute(names.datacontenttype)
        for name, value in flat.items():
            if name.startswith(prefix) and name not in names:
                headers.setdefault(name.removeprefix(prefix), value)
    return Event(event_id, topic, payload, key, source, time, content_type or "application/json", headers)


class _Names(NamedTuple):
    """The attributes that have a field of `Event`, with a broker's prefix."""

    specversion: str
    id: str
    type: str
    source: str
    time: str
    subject: str
    datacontenttype: str


_REQUIRED: Final = 4
"""Those that every CloudEvent has: the first of `_Names`."""


@lru_cache(maxsize=8)
def _names(prefix: str) -> _Names:
    return _Names(*(prefix + name for name in _Names._fields))


def _not_an_event(flat: Mapping[str, str], prefix: str) -> Malformed:
    version = flat.get(f"{prefix}specversion")
    if version and version != SPECVERSION:
        return Malformed(f"{prefix}specversion is {version[:80]!r}; CloudEvents {SPECVERSION} are read")
    missing = next(name for name in ("specversion", "id", "type", "source") if not flat.get(prefix + name))
    return Malformed(f"the message has no attribute {prefix}{missing}, so it is not a CloudEvent")


def _in_utc(time: datetime) -> datetime:
    """Raises ValueError for a time without an offset, which no one could place."""
    if time.tzinfo is None:
        raise ValueError("it has no offset, as Z or +01:00")
    return time.astimezone(UTC)


def matches(pattern: str, topic: str) -> bool:
    """Whether the pattern takes the topic.

    Patterns are AMQP's: words between dots, ``*`` for exactly one word, ``#`` for any number of words, also none.
    """
    wanted, words = pattern.split("."), topic.split(".")
    at = taken = 0
    behind = resumed = -1  # the place behind the last `#`, and how many words it was tried with
    while taken < len(words):
        if at < len(wanted) and wanted[at] == "#":
            at += 1
            if at == len(wanted):
                return True
            behind, resumed = at, taken
        elif at < len(wanted) and wanted[at] in ("*", words[taken]):
            at, taken = at + 1, taken + 1
        elif resumed >= 0:
            # Only the last `#` need take more: what stood before it has found its words already.
            resumed += 1
            at, taken = behind, resumed
        else:
            return False
    return all(word == "#" for word in wanted[at:])


def overlap(one: str, other: str) -> bool:
    """Whether some topic is taken by both patterns."""
    ours, theirs = one.split("."), other.split(".")
    # From the ends: whether what is left of both from a place on has a topic in common.
    below = [False] * len(theirs) + [True]
    for at in range(len(theirs) - 1, -1, -1):
        below[at] = theirs[at] == "#" and below[at + 1]
    for word in reversed(ours):
        here = [False] * len(theirs) + [word == "#" and below[-1]]
        for at in range(len(theirs) - 1, -1, -1):
            if "#" in (word, theirs[at]):
                here[at] = below[at] or here[at + 1]
            else:
                here[at] = ("*" in (word, theirs[at]) or word == theirs[at]) and below[at + 1]
        below = here
    return below[0]


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
