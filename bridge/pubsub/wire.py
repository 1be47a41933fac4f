"""What an event's attributes are called in Pub/Sub, and the way back from a message to an event.

Attributes are those of CloudEvents (``ce-``), the author's own headers, ``content-type``, and the trace under both
the name of W3C and the one that Google's clients read. `encode.py` writes them.
"""

from typing import Any, Final

from bridge.event import Event, Malformed, from_attributes

MAX_ATTRIBUTES: Final = 100
VALUE_BYTES: Final = 1024

NOT_THE_EVENTS: Final = ("goog", "x-pgbridge-", "CloudPubSubDeadLetterSource")
"""Begin the names of attributes that Google's clients, our queues and the service add on the way."""
CONTENT_TYPE: Final = "content-type"
GOOGLE_TRACE: Final = "googclient_traceparent"


def from_message(message: Any) -> Event | Malformed:
    """The event that a protobuf PubsubMessage carries, or why it carries none."""
    flat = {name: value for name, value in message.attributes.items() if not name.startswith(NOT_THE_EVENTS)}
    content_type = flat.pop(CONTENT_TYPE, None)
    try:
        return from_attributes(flat, bytes(message.data), content_type)
    except Malformed as malformed:
        return malformed
