"""How an event is named and labelled on NATS.

**Subjects.** A stream ``S`` takes the subjects ``S.>``, and an event goes to ``S.<topic>``: the prefix lets several
streams stand side by side, since NATS forbids streams that overlap, and ``>`` alone would overlap with NATS's own
subjects. What a subject cannot hold is percent-encoded, byte by byte in UTF-8: all but printable ASCII, and
``* > %``; an empty word becomes a lone ``%``. That is reversible, and ``ce-type`` holds the topic as it is.

**Headers.** Values are percent-encoded as the CloudEvents HTTP binding says (1.0.2, 3.1.3.2), which its NATS binding
refers to: all but printable ASCII, and space, ``"`` and ``%``. Headers of the author's travel in the same way, so that
line breaks and letters of all languages survive. Characters that a header's name cannot hold are percent-encoded too,
and so is the first letter of a name that NATS, its clients or the bridge would take for their own: ``Nats-...``,
``Status``, ``Description``, ``content-type``, ``CE-...``. An empty name becomes a lone ``%``.

Other programs may write the names of attributes in any case, and their values in double quotes.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final
from urllib.parse import quote, unquote

from nats.aio.msg import Msg

from bridge.brokers.letters import PREFIX
from bridge.event import ATTRIBUTE_PREFIX, NO_TOPIC, Event, Malformed, attributes, from_attributes

ID_HEADER: Final = "Nats-Msg-Id"
"""JetStream stores one message with this id within the stream's duplicate window."""

CONTENT_TYPE: Final = "content-type"

_PRINTABLE: Final = "".join(map(chr, range(0x21, 0x7F)))
_SUBJECT_SAFE: Final = _PRINTABLE.translate({ord(character): None for character in "*>%"})
_VALUE_SAFE: Final = _PRINTABLE.translate({ord(character): None for character in '"%'})
_NAME_SAFE: Final = "!#$&'*+-.^_`|~"
_NAME: Final = re.compile(r"[!#$&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE: Final = re.compile(r"[!#$&-~]*")
_OURS: Final = re.compile(r"nats-|content-type\Z", re.IGNORECASE)
"""Headers that are not the author's."""
_ACTING: Final = re.compile(r"nats-|(content-type|status|description)\Z|(?-i:(?!ce-))ce-", re.IGNORECASE)
"""What clients, servers or readers act upon, so that an author's header of this name must not be read as it stands."""
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)


@lru_cache(4096)
def subject_of(stream: str, topic: str) -> str:
    """The subject of a topic. Raises UnicodeError for a topic that UTF-8 cannot hold."""
    return f"{stream}.{'.'.join(quote_word(word) for word in topic.split('.'))}"


def quote_word(word: str) -> str:
    """One word of a topic, as a subject holds it."""
    return quote(word, safe=_SUBJECT_SAFE) or "%"


def topic_of(subject: str) -> str:
    """The topic that `subject_of` was given."""
    _, _, words = subject.partition(".")
    return ".".join("" if word == "%" else unquote(word) for word in words.split("."))


@lru_cache(4096)
def _quote_name(name: str) -> str:
    quoted = name if _NAME.fullmatch(name) else quote(name, safe=_NAME_SAFE) or "%"
    return f"%{ord(quoted[0]):02X}{quoted[1:]}" if _ACTING.match(quoted) else quoted


def quote_value(value: str) -> str:
    """A header's value as it travels. Raises UnicodeError for a string that UTF-8 cannot hold."""
    return quote(value, safe=_VALUE_SAFE)


def quote_headers(flat: Mapping[str, str]) -> dict[str, str]:
    """Attributes and headers as they travel. Raises UnicodeError for a string that UTF-8 cannot hold."""
    values: Iterable[str] = flat.values()
    # One look at all of them, since most need nothing.
    if not _VALUE.fullmatch("".join(values)):
        values = map(quote_value, values)
    return dict(zip(map(_quote_name, flat), values, strict=True))


@lru_cache(4096)
def _plain_name(name: str) -> str | None:
    """What `_quote_name` was given; None for what is not the author's."""
    return None if _OURS.match(name) else "" if name == "%" else unquote(name)


def unquote_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """What `quote_headers` was given; headers of NATS's own are left out."""
    return {
        plain: unquote(value) if "%" in value else value
        for name, value in headers.items()
        if (plain := _plain_name(name)) is not None
    }


def headers_of(event: Event) -> dict[str, str]:
    """Every attribute and header of an event, and its content type, as they travel.

    Raises Malformed for a header that would be read as another's, and UnicodeError as `quote_headers` does.
    """
    if not event.topic:
        raise Malformed(NO_TOPIC)
    for name in event.headers:
        if name.startswith(PREFIX):
            raise Malformed(f"the header {name!r}: {PREFIX} is reserved for what queues add to a dead letter")
    headers = quote_headers(attributes(event))
    headers[CONTENT_TYPE] = event.content_type
    return headers


def headers_size(headers: Mapping[str, str]) -> int:
    """Bytes of the header block on the wire; they count towards the server's `max_payload`."""
    text = len("".join(headers)) + len("".join(headers.values()))
    return len("NATS/1.0\r\n\r\n") + text + len(": \r\n") * len(headers)


_HEADERS_LIMIT: Final = 60_000
"""Bytes; JetStream stores no more than 65535 of headers."""

_TRACE: Final = f"{PREFIX}trace"
_VERSION: Final = f"{ATTRIBUTE_PREFIX}specversion"


def event_of(message: Msg) -> Event | Malformed:
    """The event, or why the message does not carry one."""
    headers = message.headers or {}
    try:
        # One look at all of them, since most are written by the bridge and hold neither.
        written = "".join(headers.values())
        if '"' in written or "%" in written or _VERSION not in headers or CONTENT_TYPE not in headers:
            headers = _as_the_bridge_writes(headers)
        flat = {name: value for name, value in unquote_headers(headers).items() if not name.startswith(PREFIX)}
        return from_attributes(flat, message.data, headers.get(CONTENT_TYPE), sent=lambda: message.metadata.timestamp)
    except Malformed as error:
        return error


def _as_the_bridge_writes(headers: Mapping[str, str]) -> dict[str, str]:
    """Any program's headers, with names and quotes of attributes as `headers_of` gives them.

    Raises Malformed for an attribute that is not UTF-8.
    """
    written: dict[str, str] = {}
    for name, value in headers.items():
        lower = name.lower()
        if lower != CONTENT_TYPE and not lower.startswith(ATTRIBUTE_PREFIX):
            written[name] = value
        elif name == lower or lower not in headers:
            written[lower] = _unquoted(lower, value)
    return written


def _unquoted(name: str, value: str) -> str:
    try:
        unquote(value, errors="strict")
    except UnicodeDecodeError as error:
        raise Malformed(f"the header {name[:80]!r} is not UTF-8: {error}") from error
    quoted = len(value) > 1 and value[0] == value[-1] == '"'
    return _ESCAPED.sub(r"\1", value[1:-1]) if quoted else value


def dead_headers(message: Msg, letter: dict[str, str], max_payload: int) -> dict[str, str]:
    """The message's own headers and those of the letter; the trace is cut to what the server takes."""
    kept = {name: value for name, value in (message.headers or {}).items() if not name.lower().startswith("nats-")}
    # JetStream stores the letter once, however often it is sent.
    kept[ID_HEADER] = f"{message.metadata.stream}:{message.metadata.sequence.stream}"
    room = min(max_payload - len(message.data), _HEADERS_LIMIT)
    while headers_size(headers := kept | quote_headers(letter)) > room and _TRACE in letter:
        trace = letter.pop(_TRACE)
        if len(trace) > 1:
            letter[_TRACE] = trace[len(trace) // 2 + len(trace) % 2 :]
    return headers
