"""What RabbitMQ delivers, read by hand, against pamqp, which knows AMQP independently of us."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp import body, commands, frame, header
from pamqp.heartbeat import Heartbeat

from bridge.brokers.rabbitmq.frames import CHANNEL, Encoder
from bridge.brokers.rabbitmq.message import UNREADABLE, Message, event_of
from bridge.brokers.rabbitmq.reader import BrokenStreamError, Delivered, FrameReader
from tests.support.events import make_event
from tests.support.frames import together

short = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)
values = st.recursive(
    short
    | st.integers(-(2**63), 2**63 - 1)
    | st.booleans()
    | st.none()
    | st.just(Decimal("1.5"))
    | st.binary(max_size=9).map(bytearray),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(short, inner, max_size=2),
    max_leaves=4,
) | st.just(datetime(2026, 1, 2, tzinfo=UTC))
properties = st.builds(
    commands.Basic.Properties,
    content_type=st.none() | short,
    content_encoding=st.none() | short,
    headers=st.none() | st.dictionaries(short, short | values, max_size=4),
    delivery_mode=st.sampled_from([None, 1, 2]),
    priority=st.none() | st.integers(0, 9),
    correlation_id=st.none() | short,
    reply_to=st.none() | short,
    message_id=st.none() | short,
    timestamp=st.none() | st.just(datetime(2026, 1, 2, tzinfo=UTC)),
    app_id=st.none() | short,
)


def reader_into(seen: list[Delivered]) -> FrameReader:
    return FrameReader(lambda *_: None, lambda *_: None, lambda *_: None, seen.append)


def frames_of(tag: int, exchange: str, key: str, found: commands.Basic.Properties, payload: bytes, step: int) -> bytes:
    parts: list[Any] = [
        commands.Basic.Deliver("consumer", tag, False, exchange, key),
        header.ContentHeader(0, len(payload), found),
        *(body.ContentBody(payload[start : start + step]) for start in range(0, len(payload), step)),
    ]
    # Heartbeats, and answers on other channels, come between the frames of a content.
    return b"".join(frame.marshal(part, CHANNEL) + Heartbeat.marshal() for part in parts)


@given(st.data(), st.integers(0, 2**40), st.text("abc.:-", max_size=40), short, properties, st.binary(max_size=60))
def test_a_delivery_is_read_as_pamqp_writes_it_in_whatever_pieces_it_comes(
    data: st.DataObject, tag: int, exchange: str, key: str, found: commands.Basic.Properties, payload: bytes
) -> None:
    seen: list[Delivered] = []
    reader = reader_into(seen)
    stream = frames_of(tag, exchange, key, found, payload, step=25) * 2
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=8)))
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        reader.feed(stream[start:stop])
    assert [(each.channel, each.tag, each.exchange, each.routing_key, each.body) for each in seen] == [
        (CHANNEL, tag, exchange, key, payload)
    ] * 2


@given(properties)
@example(commands.Basic.Properties(content_type="x", headers={"a": "ä", "x-delivery-count": 3}))
def test_content_type_and_headers_are_what_pamqp_reads(found: commands.Basic.Properties) -> None:
    encoded = frame.marshal(header.ContentHeader(0, 0, found), CHANNEL)[7:-1]
    by_pamqp = header.ContentHeader()
    by_pamqp.unmarshal(encoded)
    message = Message(1, "x", "y", encoded, b"")
    assert message.content_type == by_pamqp.properties.content_type
    assert message.headers == (by_pamqp.properties.headers or {})
    assert dict(message.properties) == dict(by_pamqp.properties)


@given(st.binary(max_size=80), properties)
def test_properties_of_any_bytes_are_read_or_said_to_be_unreadable(
    noise: bytes, found: commands.Basic.Properties
) -> None:
    whole = frame.marshal(header.ContentHeader(0, 0, found), CHANNEL)[7:-1]
    for encoded in (whole[:14] + noise, whole[: 14 + len(noise)], whole + noise):
        message = Message(1, "x", "y", encoded, b"")
        assert isinstance(message.headers, dict)
        event_of(message)


def test_properties_that_cannot_be_decoded_say_why() -> None:
    encoded = frame.marshal(header.ContentHeader(0, 0, commands.Basic.Properties(headers={"a": "b"})), CHANNEL)[7:-1]
    message = Message(1, "x", "y", encoded.replace(b"\x01aS", b"\x01a?"), b"")
    assert UNREADABLE in message.headers


def test_an_event_of_ours_is_read_as_it_was_written() -> None:
    event = make_event(7, topic="shop.order.placed", key="k")
    seen: list[Delivered] = []
    publish, *content = _split(together(Encoder("events", 4096, 10_000).encode(event)))
    assert isinstance(frame.unmarshal(publish)[2], commands.Basic.Publish)
    deliver = frame.marshal(commands.Basic.Deliver("c", 1, False, "events", event.topic), CHANNEL)
    reader_into(seen).feed(b"".join([deliver, *content]))
    [delivered] = seen
    assert event_of(Message(*delivered[1:])) == event._replace(sequence=0)


def _split(stream: bytes) -> list[bytes]:
    found = []
    while stream:
        size = 8 + int.from_bytes(stream[3:7])
        found.append(stream[:size])
        stream = stream[size:]
    return found


@pytest.mark.parametrize(
    "spoil",
    [
        lambda stream: stream.replace(b"consumer", b"consume\xff", 1).replace(b"\x08consume", b"\xffconsume", 1),
        lambda stream: stream.replace(b"\x08consumer", b"\x07consumer", 1),
        lambda stream: stream.replace(b"\0\0\0\0\0\0\0\x05", b"\0\0\0\0\0\0\0\x03", 1),
    ],
    ids=["tag beyond the frame", "fields that do not fill the frame", "body longer than its header says"],
)
def test_a_delivery_that_contradicts_itself_is_told(spoil: Any) -> None:
    stream = frames_of(1, "x", "key", commands.Basic.Properties(), b"12345", step=25)
    spoilt = spoil(stream)
    assert spoilt != stream
    with pytest.raises(BrokenStreamError):
        reader_into([]).feed(spoilt)
