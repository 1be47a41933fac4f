"""An event as a Pub/Sub message, and the limits that the service sets for messages.

Attributes are those of CloudEvents (``ce-``), the author's own headers, ``content-type``, and the trace under both
the name of W3C and the one that Google's clients read. Limits: https://cloud.google.com/pubsub/quotas.
"""

from typing import Any, Final

from google.pubsub_v1 import types

from bridge.event import Event, Malformed, attributes, from_attributes

REQUEST_BYTES: Final = 10_000_000
"""Most bytes of a publish request, and so of a message."""
FRAME_BYTES: Final = 6
"""Most bytes that a message takes in a request beyond its own: a tag and a length."""
MAX_ATTRIBUTES: Final = 100
NAME_BYTES: Final = 256
VALUE_BYTES: Final = 1024
KEY_BYTES: Final = 1024
RESERVED_ATTRIBUTES: Final = 8
"""Of the hundred, those that are kept free for what a dead letter is marked with."""

NOT_THE_EVENTS: Final = ("goog", "x-pgbridge-", "CloudPubSubDeadLetterSource")
"""Begin the names of attributes that Google's clients, our queues and the service add on the way."""
CONTENT_TYPE: Final = "content-type"
GOOGLE_TRACE: Final = "googclient_traceparent"
_Message: Final = types.PubsubMessage.pb()


class Unsendable(ValueError):  # noqa: N818 - named for what the event is
    """Pub/Sub could never take this event. `code` is that of the sink's failure."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def to_message(event: Event, *, ordering: bool, max_payload: int) -> Any:
    """The event as a protobuf PubsubMessage. Raises Unsendable, naming the limit that it breaks."""
    if len(event.payload) > max_payload:
        raise _too_large(f"the payload has {len(event.payload)} bytes; max_message_bytes is {max_payload}")
    flat = attributes(event)
    flat[CONTENT_TYPE] = event.content_type
    if "traceparent" in flat:
        flat[GOOGLE_TRACE] = flat["traceparent"]
    key = (event.key or "") if ordering else ""
    _check(event, flat, key)
    message = _Message(data=event.payload, attributes=flat, ordering_key=key)
    size = message.ByteSize() + FRAME_BYTES
    if size > REQUEST_BYTES - 1024:
        raise _too_large(f"payload and attributes have {size} bytes; Pub/Sub takes requests of {REQUEST_BYTES}")
    return message


def _check(event: Event, flat: dict[str, str], key: str) -> None:
    if len(flat) > MAX_ATTRIBUTES - RESERVED_ATTRIBUTES:
        raise _too_large(
            f"the event has {len(flat)} attributes; Pub/Sub takes {MAX_ATTRIBUTES}, of which {RESERVED_ATTRIBUTES} are "
            "kept for dead letters"
        )
    if len(key) * 4 > KEY_BYTES and (size := len(key.encode())) > KEY_BYTES:
        raise _too_large(f"the key has {size} bytes; Pub/Sub takes {KEY_BYTES}")
    for name, value in flat.items():
        # Four bytes are the most that a character takes, so short ones need no encoding to be measured.
        if len(value) * 4 > VALUE_BYTES and (size := len(value.encode())) > VALUE_BYTES:
            raise _too_large(f"the attribute {name[:80]!r} has {size} bytes; Pub/Sub takes {VALUE_BYTES}")
        if len(name) * 4 > NAME_BYTES and (size := len(name.encode())) > NAME_BYTES:
            raise _too_large(f"the name of attribute {name[:80]!r} has {size} bytes; Pub/Sub takes {NAME_BYTES}")
    for name in event.headers:
        if not name or name.startswith("goog") or name == CONTENT_TYPE:
            reason = f"the header {name!r} cannot travel: Pub/Sub keeps empty names, 'goog...' and '{CONTENT_TYPE}'"
            raise Unsendable("malformed", reason)


def _too_large(reason: str) -> Unsendable:
    return Unsendable("too_large", reason)


def from_message(message: Any) -> Event | Malformed:
    """The event that a protobuf PubsubMessage carries, or why it carries none."""
    flat = {name: value for name, value in message.attributes.items() if not name.startswith(NOT_THE_EVENTS)}
    content_type = flat.pop(CONTENT_TYPE, None)
    try:
        return from_attributes(flat, bytes(message.data), content_type)
    except Malformed as malformed:
        return malformed
