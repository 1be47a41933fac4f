"""Encodes events as AMQP 0-9-1 frames: basic.publish, content header, body.

Byte for byte what pamqp gives for the same properties (tests/unit/test_amqp_frames.py), at a tenth of its cost:
what is the same for all events of a topic is encoded once. The grammar is that of the AMQP 0-9-1 specification,
4.2 (frames), 4.2.6 (content) and 1.8 (basic properties).
"""

import struct
from collections.abc import Mapping
from functools import lru_cache
from struct import Struct
from typing import Final, NamedTuple

from bridge.brokers.contract import Never
from bridge.brokers.rabbitmq.lanes import LANE, TEXTS, lane_of
from bridge.event import AMQP_PREFIX, NO_TOPIC, SPECVERSION, Event, TimeWriter

CHANNEL: Final = 1
"""The channel that publishes."""

SHORT_STRING: Final = 255
"""Most bytes of an AMQP short string: routing key, message id, app id, content type, exchange."""

HEADER_NAME: Final = 128
"""Most bytes of a header's name (AMQP 0-9-1, 4.2.5.5)."""

ROUTING_HEADERS: Final = frozenset({"CC", "BCC"})
"""Headers in which RabbitMQ looks for lists of further routing keys; it closes the channel over one that holds text."""

_FRAME_OVERHEAD: Final = 8
_FRAME_END: Final = b"\xce"
_FRAME: Final = Struct(">BHI")
_LONG: Final = Struct(">I")
_METHOD, _HEADER, _BODY = 1, 2, 3
_BASIC, _PUBLISH = 60, 40
_MANDATORY: Final = b"\x01"
_PERSISTENT: Final = b"\x02"
# content_type, headers, delivery_mode, message_id, timestamp, app_id
_FLAGS: Final = 0x8000 | 0x2000 | 0x1000 | 0x0080 | 0x0040 | 0x0008
_CONTENT_TYPE_FLAG: Final = 0x8000
_APP_ID_FLAG: Final = 0x0008
_CACHED_TOPICS: Final = 4096
_LARGE: Final = 4096
"""Bytes of a payload above which it is not copied, but written as a piece of its own."""
_BYTE: Final = [bytes([number]) for number in range(256)]
_LENGTH: Final = [_LONG.pack(number) for number in range(1024)]


Frames = bytes | list[bytes | memoryview]
"""The frames of one message. Those of a large one come in pieces, between which its payload stays where it is."""


class RefusedEvent(Exception):  # noqa: N818 - an outcome on its way
    """An event that cannot be sent, and what to answer for it."""

    def __init__(self, failure: Never) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def too_large(size: int, limit: int) -> Never:
    """The answer for a payload of `size` bytes."""
    return Never(
        "too_large",
        f"the payload has {size} bytes and the broker takes {limit}: raise RabbitMQ's max_message_size and the "
        "sink's max_message_bytes, or send less",
    )


def malformed(reason: str) -> RefusedEvent:
    """For what has no form in AMQP."""
    return RefusedEvent(Never("malformed", reason))


def payload_limit(frame_max: int) -> int:
    """Most bytes in one frame, where `frame_max` is the negotiated limit of a whole one, 0 for none."""
    return frame_max - _FRAME_OVERHEAD if frame_max else 0xFFFFFFFF


def with_body(head: bytes, payload: bytes, payload_max: int) -> Frames:
    """The frames of a message whose method and content header are `head`: the body in frames of `payload_max` bytes at
    most. A message without content has no body frame."""
    size = len(payload)
    if size <= min(_LARGE, payload_max):
        return b"".join((head, _FRAME.pack(_BODY, CHANNEL, size), payload, _FRAME_END)) if payload else head
    pieces: list[bytes | memoryview] = []
    body = memoryview(payload)
    before = head
    for start in range(0, size, payload_max):
        piece = body[start : start + payload_max]
        pieces += (before + _FRAME.pack(_BODY, CHANNEL, len(piece)), piece)
        before = _FRAME_END
    pieces.append(before)
    return pieces


class _Template(NamedTuple):
    """What all events of a topic, content type and source share."""

    method: bytes
    """The whole frame of basic.publish."""
    head: Struct
    """Packs the content header up to the header table's length."""
    flags: bytes
    """Property flags and content type."""
    source: bytes
    """The header fields cloudEvents_source and cloudEvents_specversion."""
    topic: bytes
    """The header field cloudEvents_type."""
    tail: Struct
    """Packs the timestamp, `app_id`, and the head of the body frame."""
    app_id: bytes
    """The property app_id and the content header's end."""
    size: int
    """Bytes of the content header that are the same for every event."""
    table_size: int
    """Bytes of the header table that are the same for every event."""


def _short(text: str, what: str) -> bytes:
    data = text.encode()
    if len(data) > SHORT_STRING:
        raise malformed(f"{what} has {len(data)} bytes; AMQP takes at most {SHORT_STRING}")
    return _BYTE[len(data)] + data


def _long(data: bytes) -> bytes:
    size = len(data)
    return (_LENGTH[size] if size < 1024 else _LONG.pack(size)) + data


@lru_cache(maxsize=1024)
def _field_name(name: str) -> bytes:
    """A header's name and the mark of a long string."""
    data = name.encode()
    if len(data) > HEADER_NAME:
        raise malformed(f"the header {name!r} has a name of {len(data)} bytes; AMQP takes {HEADER_NAME}")
    if name in ROUTING_HEADERS:
        raise malformed(f"the header {name!r}: RabbitMQ takes it for a list of routing keys; use another name")
    return _BYTE[len(data)] + data + b"S"


def _field(name: str, value: str) -> bytes:
    return _field_name(name) + _long(value.encode())


_ID: Final = _field_name(f"{AMQP_PREFIX}id")
_SUBJECT: Final = _field_name(f"{AMQP_PREFIX}subject")
_TIME: Final = _field_name(f"{AMQP_PREFIX}time")
_LANES: Final = [_field(LANE, lane) for lane in TEXTS]


def _own_headers(headers: Mapping[str, str]) -> tuple[bytes, bytes]:
    """The author's headers that sort before the CloudEvents attributes, and those that sort behind."""
    before: list[bytes] = []
    behind: list[bytes] = []
    for name in sorted(headers):
        if name.startswith(AMQP_PREFIX):
            raise malformed(f"the header {name!r}: {AMQP_PREFIX} is reserved for the event's own attributes")
        (before if name < AMQP_PREFIX else behind).append(_field(name, headers[name]))
    return b"".join(before), b"".join(behind)


class Encoder:
    """Encodes for one exchange on one connection."""

    def __init__(self, exchange: str, frame_max: int, max_message_bytes: int) -> None:
        """`frame_max` is the negotiated limit of a whole frame in bytes, 0 for none."""
        self.max_message_bytes = max_message_bytes
        self._exchange = _short(exchange, "the exchange's name")
        self._payload_max = payload_limit(frame_max)
        self._whole_max = min(_LARGE, self._payload_max)
        self._template = lru_cache(maxsize=_CACHED_TOPICS)(self._make_template)
        self._times = TimeWriter()

    def _make_template(self, topic: str, content_type: str, source: str) -> _Template:
        if not topic:
            raise malformed(NO_TOPIC)
        routing_key = _short(topic, "the topic")
        publish = b"\x00\x3c\x00\x28\x00\x00" + self._exchange + routing_key + _MANDATORY
        kind = _short(content_type, "the content type") if content_type else b""
        app_id = _short(source, "the source (app_id)") if source else b""
        flags = _FLAGS & ~(0 if kind else _CONTENT_TYPE_FLAG) & ~(0 if app_id else _APP_ID_FLAG)
        shared = flags.to_bytes(2) + kind
        source_fields = _field(f"{AMQP_PREFIX}source", source) + _field(f"{AMQP_PREFIX}specversion", SPECVERSION)
        topic_field = _field(f"{AMQP_PREFIX}type", topic)
        return _Template(
            method=_FRAME.pack(_METHOD, CHANNEL, len(publish)) + publish + _FRAME_END,
            head=Struct(f">BHIHHQ{len(shared)}sI"),
            flags=shared,
            source=source_fields,
            topic=topic_field,
            tail=Struct(f">Q{len(app_id) + 1}sBHI"),
            app_id=app_id + _FRAME_END,
            # class and weight, body size, flags and content type, table length, delivery mode, message id's length,
            # timestamp, app id
            size=2 + 2 + 8 + len(shared) + 4 + 1 + 1 + 8 + len(app_id),
            table_size=len(_ID) + 4 + len(_LANES[0]) + len(source_fields) + len(_TIME) + 4 + len(topic_field),
        )

    def encode(self, event: Event) -> Frames:
        """What publishes an event. Raises RefusedEvent when AMQP, or the broker's limit, cannot take it."""
        try:
            event_id, topic, payload, key, source, time, content_type, headers, _ = event
            template = self._template(topic, content_type, source)
            message_id = event_id.encode()
            id_size = len(message_id)
            if id_size > SHORT_STRING:
                raise malformed(f"the event's id has {id_size} bytes; AMQP takes at most {SHORT_STRING}")
            if key is None:
                subject, lane = b"", _LANES[lane_of(message_id)]
            else:
                key_bytes = key.encode()
                subject, lane = _SUBJECT + _long(key_bytes), _LANES[lane_of(key_bytes)]
            before, behind = _own_headers(headers) if headers else (b"", b"")
            iso_time = self._times.iso(time)
            time_size = len(iso_time)
            table_size = template.table_size + id_size + time_size + len(subject) + len(before) + len(behind)
            size = template.size + table_size + id_size
            body_size = len(payload)
            if size > self._payload_max or body_size > self.max_message_bytes:
                self._check_size(size, body_size)
            tail = template.tail.pack(self._times.timestamp, template.app_id, _BODY, CHANNEL, body_size)
            end = _FRAME_END
            whole = 0 < body_size <= self._whole_max
            if not whole:
                tail, body, payload, end = tail[: -_FRAME.size], payload, b"", b""
            frames = b"".join(
                (
                    template.method,
                    template.head.pack(_HEADER, CHANNEL, size, _BASIC, 0, body_size, template.flags, table_size),
                    before,
                    _ID,
                    _LENGTH[id_size],
                    message_id,
                    lane,
                    template.source,
                    subject,
                    _TIME,
                    _LENGTH[time_size],
                    iso_time,
                    template.topic,
                    behind,
                    _PERSISTENT,
                    _BYTE[id_size],
                    message_id,
                    tail,
                    payload,
                    end,
                )
            )
            return frames if whole else with_body(frames, body, self._payload_max)
        except (ValueError, TypeError, AttributeError, OverflowError, struct.error) as error:
            # A lone surrogate, a time before 1970, a header that is not a string: it must not stop the other events.
            raise malformed(f"the event has no AMQP form: {error}") from error

    def _check_size(self, header_size: int, body_size: int) -> None:
        if body_size > self.max_message_bytes:
            raise RefusedEvent(too_large(body_size, self.max_message_bytes))
        if header_size > self._payload_max:
            raise malformed(
                f"headers and properties take {header_size} bytes and must fit into one frame of {self._payload_max}: "
                "use fewer or shorter headers, or a shorter key",
            )
