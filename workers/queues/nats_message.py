"""A message of JetStream: the event in it, and its headers once it is a dead letter."""

from nats.aio.msg import Msg

from bridge.brokers.letters import PREFIX
from bridge.brokers.nats.message import CONTENT_TYPE, ID_HEADER, headers_size, quote_headers, unquote_headers
from bridge.event import Event, Malformed, from_attributes

_HEADERS_LIMIT = 60_000
"""Bytes; JetStream stores no more than 65535 of headers."""

_TRACE = f"{PREFIX}trace"


def event_of(message: Msg) -> Event | Malformed:
    """The event, or why the message is none."""
    headers = message.headers or {}
    flat = {name: value for name, value in unquote_headers(headers).items() if not name.startswith(PREFIX)}
    try:
        return from_attributes(flat, message.data, headers.get(CONTENT_TYPE))
    except Malformed as error:
        return error


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
