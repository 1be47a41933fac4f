"""Publish frames against pamqp, which knows AMQP independently of us."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import body, commands, frame, header

from bridge.brokers.rabbitmq.frames import CHANNEL, Encoder, RefusedEvent
from bridge.brokers.rabbitmq.lanes import LANE, TEXTS, lane_of
from bridge.event import AMQP_PREFIX, Event, attributes
from tests.support.events import make_event
from tests.support.frames import together

FRAME_MAX = 4096
EVENT = make_event()


def by_pamqp(event: Event, exchange: str, frame_max: int) -> bytes:
    properties = commands.Basic.Properties(
        content_type=event.content_type,
        headers={
            **attributes(event, AMQP_PREFIX),
            LANE: TEXTS[lane_of((event.id if event.key is None else event.key).encode())],
        },
        delivery_mode=2,
        message_id=event.id,
        timestamp=event.time,
        app_id=event.source,
    )
    step = frame_max - 8
    frames: list[Any] = [
        commands.Basic.Publish(exchange=exchange, routing_key=event.topic, mandatory=True),
        header.ContentHeader(body_size=len(event.payload), properties=properties),
        *(body.ContentBody(event.payload[start : start + step]) for start in range(0, len(event.payload), step)),
    ]
    return b"".join(frame.marshal(each, CHANNEL) for each in frames)


def encoder(*, frame_max: int = FRAME_MAX, max_message_bytes: int = 1_000_000) -> Encoder:
    return Encoder("events", frame_max, max_message_bytes)


def at_most(size: int, **options: Any) -> st.SearchStrategy[str]:
    return st.text(**options).filter(lambda text: len(text.encode()) <= size)


text = st.characters(exclude_categories=["Cs"])
headers: st.SearchStrategy[Mapping[str, str]] = st.dictionaries(
    at_most(128, alphabet=text, min_size=1, max_size=40).filter(lambda name: not name.startswith(AMQP_PREFIX)),
    at_most(300, alphabet=text, max_size=80),
    max_size=4,
)
events = st.builds(
    Event,
    id=st.one_of(st.uuids().map(str), at_most(255, alphabet=text, min_size=1, max_size=60)),
    topic=at_most(255, alphabet=text, min_size=1, max_size=80),
    payload=st.one_of(st.binary(max_size=100), st.integers(0, 20_000).map(bytes)),
    key=st.one_of(st.none(), at_most(600, alphabet=text, max_size=150)),
    source=at_most(255, alphabet=text, max_size=60),
    time=st.datetimes(
        min_value=datetime(1970, 1, 2),
        # pamqp counts in floating point, which rounds later times up to the next second.
        max_value=datetime(2200, 1, 1),
        timezones=st.sampled_from([UTC, timezone(timedelta(hours=2)), timezone(-timedelta(hours=5, minutes=30))]),
    ),
    content_type=st.sampled_from(["application/json", "text/plain", ""]),
    headers=headers,
)


@given(st.lists(events, min_size=1, max_size=4), st.sampled_from([FRAME_MAX, 5000, 131_072]))
def test_frames_are_byte_for_byte_those_of_pamqp(batch: list[Event], frame_max: int) -> None:
    ours = encoder(frame_max=frame_max)
    for event in [*batch, *batch]:  # the second time from the caches
        assert together(ours.encode(event)) == by_pamqp(event, "events", frame_max)


def test_an_hour_that_happens_twice_is_written_with_its_own_offset() -> None:
    ours = encoder()
    berlin = ZoneInfo("Europe/Berlin")
    for fold in (0, 1, 0):
        event = EVENT._replace(time=datetime(2026, 10, 25, 2, 30, 0, 5, tzinfo=berlin, fold=fold))
        assert together(ours.encode(event)) == by_pamqp(event, "events", FRAME_MAX)


@given(st.lists(st.integers(0, 3_000_000), min_size=2, max_size=8))
def test_times_within_and_across_a_second_in_any_order(microseconds: list[int]) -> None:
    ours = encoder()
    for shift in microseconds:
        event = EVENT._replace(time=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(microseconds=shift))
        assert together(ours.encode(event)) == by_pamqp(event, "events", FRAME_MAX)


def test_equal_times_of_different_zones_are_written_as_they_are() -> None:
    ours = encoder()
    for time in (EVENT.time, EVENT.time.astimezone(timezone(timedelta(hours=2))), EVENT.time):
        event = EVENT._replace(time=time)
        assert together(ours.encode(event)) == by_pamqp(event, "events", FRAME_MAX)


@pytest.mark.parametrize("size", [0, 1, FRAME_MAX - 9, FRAME_MAX - 8, FRAME_MAX - 7, 3 * (FRAME_MAX - 8), 50_000])
def test_a_body_is_split_at_the_frame_limit(size: int) -> None:
    event = EVENT._replace(payload=bytes(range(256)) * (size // 256) + bytes(size % 256))
    assert together(encoder().encode(event)) == by_pamqp(event, "events", FRAME_MAX)


def test_without_a_frame_limit_a_body_is_one_frame() -> None:
    event = EVENT._replace(payload=bytes(300_000))
    assert together(encoder(frame_max=0).encode(event)) == by_pamqp(event, "events", 300_008)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"topic": "ü" * 128}, "the topic has 256 bytes"),
        ({"source": "s" * 256}, "app_id"),
        ({"id": "i" * 256}, "the event's id has 256 bytes"),
        ({"content_type": "c" * 256}, "the content type"),
        ({"headers": {"n" * 129: "v"}}, "a name of 129 bytes"),
        ({"headers": {"cloudEvents_id": "forged"}}, "reserved"),
        ({"headers": {"long": "v" * FRAME_MAX}}, "must fit into one frame"),
        ({"key": "k" * FRAME_MAX}, "must fit into one frame"),
        ({"key": "\ud800"}, "no AMQP form"),
        ({"headers": {"number": 1}}, "no AMQP form"),
        ({"time": datetime(1969, 12, 31, tzinfo=UTC)}, "no AMQP form"),
    ],
)
def test_what_amqp_cannot_carry_is_malformed_and_says_why(changes: dict[str, Any], says: str) -> None:
    ours = encoder()
    with pytest.raises(RefusedEvent) as caught:
        ours.encode(EVENT._replace(**changes))
    failure = caught.value.failure
    assert failure.code == "malformed"
    assert says in failure.reason
    assert together(ours.encode(EVENT)) == by_pamqp(EVENT, "events", FRAME_MAX)


def test_the_largest_header_that_fits_is_sent() -> None:
    fitting = next(event for size in range(FRAME_MAX, 0, -1) if _is_taken(event := EVENT._replace(key="k" * size)))
    frames = together(encoder().encode(fitting))
    assert frames == by_pamqp(fitting, "events", FRAME_MAX)
    content_header = next(size for kind, size in _frames(frames) if kind == 2)
    assert content_header + 8 == FRAME_MAX


def _is_taken(event: Event) -> bool:
    try:
        encoder().encode(event)
    except RefusedEvent:
        return False
    return True


def _frames(data: bytes) -> list[tuple[int, int]]:
    found = []
    while data:
        size = int.from_bytes(data[3:7])
        found.append((data[0], size))
        data = data[size + 8 :]
    return found


def test_a_payload_beyond_the_limit_names_limit_and_setting() -> None:
    ours = encoder(max_message_bytes=10)
    ours.encode(EVENT._replace(payload=bytes(10)))
    with pytest.raises(RefusedEvent, match=r"11 bytes.* 10: .*max_message_bytes") as caught:
        ours.encode(EVENT._replace(payload=bytes(11)))
    assert caught.value.failure.code == "too_large"
