"""Encoded messages against Google's own protobuf classes, which read them independently of us."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from google.pubsub_v1 import types
from hypothesis import given
from hypothesis import strategies as st

from bridge.brokers.contract import Unsendable
from bridge.brokers.pubsub.message import (
    CONTENT_TYPE,
    GOOGLE_TRACE,
    REQUEST_BYTES,
    Encoder,
    from_message,
    topic_field,
)
from bridge.event import Event, attributes
from tests.support.events import make_event

TOPIC = "projects/test/topics/events"
EVENT = make_event(key="1")
Request = types.PublishRequest.pb()


def at_most(size: int, **options: Any) -> st.SearchStrategy[str]:
    return st.text(alphabet=st.characters(exclude_categories=["Cs"]), **options).filter(
        lambda text: len(text.encode()) <= size
    )


headers: st.SearchStrategy[Mapping[str, str]] = st.dictionaries(
    st.one_of(
        at_most(256, min_size=1, max_size=80).filter(
            lambda name: name != CONTENT_TYPE and not name.startswith(("goog", "ce-"))
        ),
        st.just("traceparent"),
    ),
    at_most(1024, max_size=300),
    max_size=4,
)
events = st.builds(
    Event,
    id=st.uuids().map(str),
    topic=at_most(1024, min_size=1, max_size=80),
    payload=st.one_of(st.binary(max_size=100), st.integers(0, 70_000).map(bytes)),
    key=st.one_of(st.none(), at_most(1024, max_size=300)),
    source=at_most(1024, max_size=60),
    time=st.datetimes(
        # A day inside the calendar's ends, so that no zone shifts a time out of it.
        min_value=datetime(1, 1, 2),
        max_value=datetime(9999, 12, 30),
        timezones=st.sampled_from([UTC, timezone(timedelta(hours=2))]),
    ),
    content_type=st.sampled_from(["application/json", "text/plain"]),
    headers=headers,
)


@given(st.lists(events, max_size=4), st.booleans())
def test_a_request_is_what_googles_classes_read_as_these_messages(sent: list[Event], ordering: bool) -> None:
    encoder = Encoder(ordering=ordering, max_payload=100_000)
    encoded = [encoder.encode(event) for event in sent]
    request = Request.FromString(topic_field(TOPIC) + b"".join(field for _, field in encoded))
    expected = Request(topic=TOPIC)
    for event in sent:
        flat = attributes(event) | {CONTENT_TYPE: event.content_type}
        if "traceparent" in flat:
            flat[GOOGLE_TRACE] = flat["traceparent"]
        expected.messages.add(data=event.payload, attributes=flat, ordering_key=(event.key or "") if ordering else "")
    assert request == expected
    assert request.ByteSize() == expected.ByteSize()
    assert [key for key, _ in encoded] == [message.ordering_key for message in expected.messages]


@given(events.filter(lambda event: bool(event.topic and event.source)))
def test_an_event_comes_back_as_it_was(event: Event) -> None:
    _, field = Encoder(ordering=True, max_payload=100_000).encode(event)
    [message] = Request.FromString(field).messages
    back = from_message(message)
    assert back == event._replace(time=event.time.astimezone(UTC), sequence=0)


@pytest.mark.parametrize("name", ["ce-type", "google", CONTENT_TYPE, ""])
def test_a_header_in_the_name_of_an_attribute_that_is_not_the_authors_is_refused(name: str) -> None:
    with pytest.raises(Unsendable, match="cannot travel") as refused:
        Encoder(ordering=True, max_payload=100).encode(EVENT._replace(headers={name: "x"}))
    assert refused.value.outcome.code == "malformed"


@pytest.mark.parametrize("broken", [{"key": "\ud800"}, {"topic": "\ud800"}, {"headers": {"h": 1}}])
def test_what_has_no_form_is_refused_and_stops_no_other(broken: dict[str, Any]) -> None:
    encoder = Encoder(ordering=True, max_payload=100)
    with pytest.raises(Unsendable, match="no Pub/Sub form") as refused:
        encoder.encode(EVENT._replace(**broken))
    assert refused.value.outcome.code == "malformed"
    assert encoder.encode(EVENT)[0] == "1"


def test_a_message_that_leaves_no_room_for_the_topic_is_too_large() -> None:
    with pytest.raises(Unsendable, match="a request"):
        Encoder(ordering=True, max_payload=REQUEST_BYTES).encode(EVENT._replace(payload=bytes(REQUEST_BYTES - 1000)))
