"""CloudEvents in structured mode, as other programs write them, and whatever else may stand in their place."""

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.event import Event, Malformed, from_attributes

JSON = "application/cloudevents+json"
EVENT = {
    "specversion": "1.0",
    "id": "order-17",
    "type": "shop.order.placed",
    "source": "/other",
    "time": "2026-01-02T03:04:05Z",
}


def read(document: object, content_type: str = JSON, headers: dict[str, str] | None = None) -> Event:
    payload = document if isinstance(document, bytes) else json.dumps(document).encode()
    return from_attributes(headers or {}, payload, content_type)


def reason(document: object, content_type: str = JSON) -> str:
    with pytest.raises(Malformed) as refused:
        read(document, content_type)
    return str(refused.value)


@pytest.mark.parametrize(
    "content_type",
    [JSON, f"{JSON}; charset=utf-8", 'Application/CloudEvents+JSON ;x=y; Charset="UTF-8"', "application/cloudevents"],
)
def test_an_event_is_read_with_its_data_as_it_was_sent(content_type: str) -> None:
    data = b'{"total": 34.260, "list": [1e2, {}]}'
    document = json.dumps(EVENT | {"subject": "7", "rush": True, "tries": 5, "actor": "\xe9", "none": None})
    event = read(document.encode()[:-1] + b' , "data" : ' + data + b" } ", content_type, {"traceparent": "00-1"})
    assert event == Event(
        id="order-17",
        topic="shop.order.placed",
        payload=data,
        key="7",
        source="/other",
        time=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        content_type="application/json",
        headers={"traceparent": "00-1", "rush": "true", "tries": "5", "actor": "\xe9"},
    )


@pytest.mark.parametrize(
    ("members", "payload", "content_type"),
    [
        ({}, b"", "application/json"),
        ({"data": None}, b"null", "application/json"),
        ({"data": "text"}, b'"text"', "application/json"),
        ({"data": [1], "datacontenttype": "Application/Problem+JSON; x=y"}, b"[1]", "Application/Problem+JSON; x=y"),
        ({"data": "<a/>", "datacontenttype": "text/xml"}, b"<a/>", "text/xml"),
        ({"data": "\xe9", "datacontenttype": "text/plain; charset=utf-8"}, b"\xc3\xa9", "text/plain; charset=utf-8"),
        ({"data_base64": "AP8="}, b"\0\xff", "application/octet-stream"),
        ({"data_base64": "e30=", "datacontenttype": "application/json"}, b"{}", "application/json"),
        ({"data_base64": None, "data": 1}, b"1", "application/json"),
        # An event within an event stays as it is.
        ({"data": {"specversion": "9"}, "datacontenttype": JSON}, b'{"specversion": "9"}', JSON),
    ],
)
def test_data_is_read_as_its_content_type_says(members: dict[str, Any], payload: bytes, content_type: str) -> None:
    event = read(EVENT | members)
    assert (event.payload, event.content_type) == (payload, content_type)


def test_the_document_counts_and_not_the_attributes_beside_it() -> None:
    event = read(EVENT, headers={"ce-id": "another", "ce-subject": "another", "own": "1"})
    assert (event.id, event.key, event.headers) == ("order-17", None, {"own": "1"})


def test_an_event_without_a_time_has_the_one_that_the_broker_knows() -> None:
    sent = datetime(2026, 1, 1, tzinfo=UTC)
    document = json.dumps(EVENT | {"time": None}).encode()
    assert from_attributes({}, document, JSON, sent=lambda: sent).time == sent


TEXT = json.dumps(EVENT).encode()


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (b"", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"{" + TEXT, "the name of a member is wanted"),
        (TEXT[:-1], "comma or the object's end"),
        (TEXT[:-1] + b",}", "the name of a member is wanted"),
        (TEXT + b"x", "something follows"),
        (TEXT + TEXT, "something follows"),
        (b'{"id" 1}', "colon is wanted"),
        (b"{1: 2}", "the name of a member is wanted"),
        (TEXT.replace(b"order-17", b"\xff\xfe"), "codec can't decode"),
        (TEXT.decode().encode("utf-16"), "codec can't decode"),
        (TEXT.replace(b"order-17", b"\\ud800"), "surrogates not allowed"),
        (TEXT[:-1] + b', "\\udc00": "x"}', "surrogates not allowed"),
        (TEXT[:-1] + b', "id": "other"}', "'id' is there twice"),
        (TEXT[:-1] + b', "data": 1, "data": 2}', "'data' is there twice"),
        (TEXT[:-1] + b', "data": NaN}', "NaN is no number"),
        (TEXT[:-1] + b', "data": [-Infinity]}', "Infinity is no number"),
        (TEXT[:-1] + b', "data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (TEXT[:-1] + b', "data": ' + b"9" * 100_000 + b"}", "digits"),
        (TEXT[:-1] + b', "data": 1, "data_base64": ""}', "both data and data_base64"),
        (TEXT[:-1] + b', "data_base64": "A"}', "padding|base64"),
        (TEXT[:-1] + b', "data_base64": "\xc3\xa9"}', "ASCII"),
        (TEXT[:-1] + b', "data_base64": 1}', "data_base64 is no text"),
        (TEXT[:-1] + b', "data": 1, "datacontenttype": "text/plain"}', "data is no text"),
        (TEXT[:-1] + b', "data": "", "datacontenttype": "text/plain; charset=latin1"}', "charset 'latin1'"),
        (TEXT[:-1] + b', "data": "\\ud800", "datacontenttype": "text/plain"}', "surrogates not allowed"),
        (TEXT.replace(b"order-17", b"x" * 65_537), "attribute 'id' has 65537 characters"),
        (TEXT.replace(b'"order-17"', b"17.5"), "attribute 'id' is neither text"),
        (TEXT.replace(b'"order-17"', b"{}"), "attribute 'id' is neither text"),
        (TEXT.replace(b'"order-17"', b"null"), "no attribute ce-id"),
        (TEXT.replace(b'"order-17"', b'""'), "no attribute ce-id"),
        (TEXT.replace(b'"1.0"', b'"0.3"'), "specversion is '0.3'"),
        (TEXT.replace(b'"2026-01-02T03:04:05Z"', b"17"), "ce-time is not an RFC 3339 time"),
        (TEXT.replace(b'"2026-01-02T03:04:05Z"', b'"9999-12-31T23:59:59-01:00"'), "not an RFC 3339 time"),
    ],
)
def test_what_is_no_event_is_malformed_and_says_why(document: bytes, said: str) -> None:
    with pytest.raises(Malformed, match=said):
        read(document)


@pytest.mark.parametrize(
    ("content_type", "said"),
    [
        ("application/cloudevents-batch+json", "it is a batch; publish every event as a message of its own"),
        ("application/cloudevents-batch+json; charset=utf-8", "it is a batch"),
        ("application/cloudevents+avro", "its format 'application/cloudevents+avro' is not read"),
        (f"{JSON}; charset=utf-16", "the charset 'utf-16' is not read"),
    ],
)
def test_a_form_that_is_not_read_is_malformed_and_named(content_type: str, said: str) -> None:
    assert said in reason(EVENT, content_type)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
members = st.dictionaries(
    st.sampled_from([*EVENT, "subject", "datacontenttype", "data", "data_base64", "x", "ce-id"]) | st.text(max_size=5),
    values | st.sampled_from([JSON, "text/plain", "1.0", base64.b64encode(b"x").decode()]),
    max_size=6,
)
content_types = st.sampled_from([JSON, f"{JSON};charset=utf-8"]) | st.text(max_size=20).map(JSON.__add__)


@given(
    document=st.binary(max_size=60)
    | members.map(lambda found: json.dumps(EVENT | found).encode())
    | st.tuples(members, st.integers(0, 400), st.binary(max_size=3)).map(
        lambda cut: json.dumps(EVENT | cut[0]).encode()[: cut[1]] + cut[2]
    ),
    content_type=content_types,
    headers=st.dictionaries(st.sampled_from(["ce-id", "ce-x", "own"]) | st.text(max_size=5), st.text(max_size=5)),
)
def test_whatever_comes_is_an_event_or_malformed(document: bytes, content_type: str, headers: dict[str, str]) -> None:
    try:
        event = from_attributes(headers, document, content_type)
    except Malformed:
        return
    assert event.id
    assert event.topic
    assert event.time.tzinfo is UTC
    assert len(event.inbox_id) == 36
    "".join([event.id, event.topic, event.source, event.key or "", event.content_type]).encode()


@given(values)
def test_data_comes_back_with_its_value(value: object) -> None:
    assert read(EVENT | {"data": value}).json() == value
