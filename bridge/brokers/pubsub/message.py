"""An event as a Pub/Sub message, and back; and what a dead letter carries beside it.

`Encoder` writes events as the messages of a publish request, and checks the limits that the service sets for them. It
gives what google.pubsub.v1.PublishRequest gives for the same messages (tests/unit/test_pubsub_encode.py), at a tenth
of the cost: what is the same for all events of a topic is encoded once. Fields are those of
google/pubsub/v1/pubsub.proto, their form that of https://protobuf.dev/programming-guides/encoding/; limits:
https://cloud.google.com/pubsub/quotas.
"""

from datetime import UTC
from functools import lru_cache
from typing import Any, Final

from google.pubsub_v1 import types

from bridge.brokers.contract import Failure, Unsendable
from bridge.brokers.letters import PREFIX, letter_headers
from bridge.event import ATTRIBUTE_PREFIX, NO_TOPIC, SPECVERSION, Event, Malformed, TimeWriter, from_attributes

MAX_ATTRIBUTES: Final = 100
VALUE_BYTES: Final = 1024
"""Most bytes of an attribute's value."""

NOT_THE_EVENTS: Final = ("goog", PREFIX, "CloudPubSubDeadLetterSource")
"""Begin the names of attributes that Google's clients, our queues and the service add on the way."""
CONTENT_TYPE: Final = "content-type"
GOOGLE_TRACE: Final = "googclient_traceparent"
FOR_WORKER: Final = f"{PREFIX}for"
"""Names the one worker that a replayed message is meant for; the queues of others pass over it."""


def from_message(message: Any) -> Event | Malformed:
    """The event that a protobuf PubsubMessage carries, or why it carries none."""
    flat = {name: value for name, value in message.attributes.items() if not name.startswith(NOT_THE_EVENTS)}
    content_type = flat.pop(CONTENT_TYPE, None)
    try:
        return from_attributes(
            flat, bytes(message.data), content_type, sent=lambda: message.publish_time.ToDatetime(tzinfo=UTC)
        )
    except Malformed as malformed:
        return malformed


def marked(message: Any, failure: Failure, worker: str, attempts: int) -> Any:
    """The message, with why it failed; texts are cut to what an attribute holds, the trace at its beginning."""
    marks = {
        name: _cut(value, keep_end=name.endswith("trace"))
        for name, value in letter_headers(worker, failure, attempts).items()
    }
    kept = {name: value for name, value in message.attributes.items() if not name.startswith(PREFIX)}
    # A message of ours has room for the marks; a stranger's that has none loses its last attributes.
    kept = dict(sorted(kept.items(), key=lambda item: not item[0].startswith("ce-"))[: MAX_ATTRIBUTES - len(marks)])
    return types.PubsubMessage.pb()(data=message.data, attributes=kept | marks)


def _cut(text: str, *, keep_end: bool) -> str:
    cut = text.encode()[-VALUE_BYTES:] if keep_end else text.encode()[:VALUE_BYTES]
    return cut.decode(errors="ignore")


REQUEST_BYTES: Final = 10_000_000
"""Most bytes of a publish request, and so of a message."""
NAME_BYTES: Final = 256
"""Longest name of an attribute."""
KEY_BYTES: Final = 1024
"""Longest ordering key."""
RESERVED_ATTRIBUTES: Final = 8
"""Of the hundred, those that are kept free for what a dead letter is marked with."""

_TOPIC_NAME_ROOM: Final = 1024
"""Bytes of a request that are left for the name of the topic."""
_OWN_ATTRIBUTES: Final = 8
"""Most attributes that an event has beside its headers: those of CloudEvents, the content type, and Google's trace."""
_CACHED: Final = 4096

# Tags: PublishRequest.topic, PublishRequest.messages; PubsubMessage.data, .attributes, .ordering_key; an attribute's
# name and value.
_REQUEST_TOPIC, _REQUEST_MESSAGE = b"\x0a", b"\x12"
_DATA, _ATTRIBUTE, _ORDERING_KEY = b"\x0a", b"\x12", b"\x2a"
_NAME, _VALUE = b"\x0a", b"\x12"


class Encoder:
    """Encodes for one topic."""

    def __init__(self, *, ordering: bool, max_payload: int) -> None:
        self._ordering = ordering
        self._max_payload = max_payload
        self._shared = lru_cache(maxsize=_CACHED)(_shared_attributes)
        self._times = TimeWriter()

    def encode(self, event: Event) -> tuple[str, bytes]:
        """The ordering key, and the event as a field of a publish request.

        Raises Unsendable, naming the limit that it breaks.
        """
        event_id, topic, payload, key, source, time, content_type, headers, _ = event
        size = len(payload)
        if size > self._max_payload:
            raise _too_large(f"the payload has {size} bytes; max_message_bytes is {self._max_payload}")
        try:
            parts = [
                self._shared(topic, content_type, source),
                _attribute("ce-id", event_id.encode()),
                _attribute("ce-time", self._times.iso(time)),
            ]
            if headers:
                if len(headers) + _OWN_ATTRIBUTES > MAX_ATTRIBUTES - RESERVED_ATTRIBUTES:
                    raise _too_many(len(headers))
                parts += [_header(name, value) for name, value in headers.items()]
                if (trace := headers.get("traceparent")) is not None:
                    parts.append(_attribute(GOOGLE_TRACE, trace.encode()))
            ordering_key = ""
            if key is not None:
                data = key.encode()
                if len(data) > KEY_BYTES:
                    raise _too_large(f"the key has {len(data)} bytes; Pub/Sub takes {KEY_BYTES}")
                parts.append(_attribute("ce-subject", data))
                if key and self._ordering:
                    ordering_key = key
                    parts += (_ORDERING_KEY, _varint(len(data)), data)
        except (UnicodeError, TypeError, AttributeError) as error:
            # A lone surrogate, a header that is not a string: it must not stop the other events.
            raise Unsendable("malformed", f"the event has no Pub/Sub form: {error}") from error
        if payload:
            parts += (_DATA, _varint(size), payload)
        message = b"".join(parts)
        field = b"%b%b%b" % (_REQUEST_MESSAGE, _varint(len(message)), message)
        if len(field) > REQUEST_BYTES - _TOPIC_NAME_ROOM:
            raise _too_large(f"payload and attributes have {len(field)} bytes; Pub/Sub takes {REQUEST_BYTES} a request")
        return ordering_key, field


def topic_field(topic: str) -> bytes:
    """A topic's full name as the field of a publish request; messages follow it."""
    data = topic.encode()
    return b"%b%b%b" % (_REQUEST_TOPIC, _varint(len(data)), data)


@lru_cache(maxsize=_CACHED)
def _varint(number: int) -> bytes:
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


@lru_cache(maxsize=_CACHED)
def _attribute_head(name: str, size: int) -> bytes:
    """An attribute up to its value of `size` bytes."""
    data = name.encode()
    if len(data) > NAME_BYTES:
        raise _too_large(f"the name of attribute {name[:80]!r} has {len(data)} bytes; Pub/Sub takes {NAME_BYTES}")
    if size > VALUE_BYTES:
        raise _too_large(f"the attribute {name[:80]!r} has {size} bytes; Pub/Sub takes {VALUE_BYTES}")
    entry = _NAME + _varint(len(data)) + data + _VALUE + _varint(size)
    return _ATTRIBUTE + _varint(len(entry) + size) + entry


def _attribute(name: str, value: bytes) -> bytes:
    return _attribute_head(name, len(value)) + value


def _header(name: str, value: str) -> bytes:
    if not name or name == CONTENT_TYPE or name.startswith((ATTRIBUTE_PREFIX, *NOT_THE_EVENTS)):
        raise Unsendable(
            "malformed",
            f"the header {name!r} cannot travel: an empty name, '{CONTENT_TYPE}', and what begins with "
            f"{', '.join((ATTRIBUTE_PREFIX, *NOT_THE_EVENTS))} is kept for Pub/Sub, for the event's own attributes and "
            "for dead letters",
        )
    return _attribute(name, value.encode())


def _shared_attributes(topic: str, content_type: str, source: str) -> bytes:
    """What all events of a topic, content type and source carry. Raises Unsendable."""
    if not topic:
        raise Unsendable("malformed", NO_TOPIC)
    return b"".join(
        [
            _attribute("ce-specversion", SPECVERSION.encode()),
            _attribute("ce-type", topic.encode()),
            _attribute("ce-source", source.encode()),
            _attribute(CONTENT_TYPE, content_type.encode()),
        ]
    )


def _too_many(headers: int) -> Unsendable:
    return _too_large(
        f"the event has {headers} headers; Pub/Sub takes {MAX_ATTRIBUTES} attributes, of which {_OWN_ATTRIBUTES} are "
        f"kept for the event's own and {RESERVED_ATTRIBUTES} for dead letters"
    )


def _too_large(reason: str) -> Unsendable:
    return Unsendable("too_large", reason)
