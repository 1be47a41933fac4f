"""Attributes of an event, as they come back from a broker, and the UUID that an inbox knows it by."""

import uuid
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.event import AMQP_PREFIX, INBOX_NAMESPACE, Malformed, attributes, from_attributes
from tests.support.events import make_event

FLAT = {
    "ce-specversion": "1.0",
    "ce-id": "5f0c8a5e-0000-4000-8000-000000000001",
    "ce-type": "shop.order.inserted",
    "ce-source": "/shop/test",
    "ce-time": "2026-01-02T03:04:05+00:00",
}


@pytest.mark.parametrize(
    "time", ["yesterday", "2026-13-01T00:00:00Z", "0001-01-01T00:00:00+02:00", "2026-01-02T03:04:05", "2026-01-02", ""]
)
def test_a_time_that_is_none_makes_the_message_malformed(time: str) -> None:
    with pytest.raises(Malformed, match="ce-time is not an RFC 3339 time"):
        from_attributes(FLAT | {"ce-time": time}, b"{}")


@pytest.mark.parametrize(
    "time", ["2026-01-02T03:04:05Z", "2026-01-02t03:04:05z", "2026-01-02T04:04:05.000000000+01:00"]
)
def test_a_time_may_be_written_in_every_form_of_rfc_3339(time: str) -> None:
    assert from_attributes(FLAT | {"ce-time": time}, b"").time == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize("name", ["ce-specversion", "ce-id", "ce-type", "ce-source"])
def test_an_attribute_that_is_missing_or_empty_is_named(name: str) -> None:
    missing = {key: value for key, value in FLAT.items() if key != name}
    for flat in (missing, missing | {name: ""}):
        with pytest.raises(Malformed, match=name):
            from_attributes(flat, b"{}")


def test_another_version_of_cloudevents_is_malformed() -> None:
    with pytest.raises(Malformed, match=r"ce-specversion is '0\.3'; CloudEvents 1\.0 are read"):
        from_attributes(FLAT | {"ce-specversion": "0.3"}, b"{}")


def test_an_event_without_a_time_has_the_one_that_the_broker_knows() -> None:
    sent = datetime(2026, 1, 2, tzinfo=UTC)
    flat = {name: value for name, value in FLAT.items() if name != "ce-time"}
    assert from_attributes(flat, b"", sent=lambda: sent).time == sent


def test_an_event_without_a_time_that_no_broker_knows_has_the_present_one() -> None:
    before = datetime.now(UTC)
    flat = {name: value for name, value in FLAT.items() if name != "ce-time"}
    assert before <= from_attributes(flat, b"").time <= datetime.now(UTC)


def test_attributes_that_have_no_field_are_headers_unless_the_message_has_such_a_header() -> None:
    extensions = {"ce-dataschema": "https://schema", "ce-traceparent": "theirs", "traceparent": "its own"}
    event = from_attributes(FLAT | extensions, b"")
    assert event.headers == {"dataschema": "https://schema", "traceparent": "its own"}


def test_the_attribute_of_the_content_type_counts_where_the_message_has_none() -> None:
    assert from_attributes(FLAT | {"ce-datacontenttype": "text/xml"}, b"").content_type == "text/xml"
    without_time = {name: value for name, value in FLAT.items() if name != "ce-time"}
    assert from_attributes(without_time | {"ce-datacontenttype": "text/xml"}, b"").content_type == "text/xml"
    both = from_attributes(FLAT | {"ce-datacontenttype": "text/xml"}, b"", "text/plain")
    assert (both.content_type, both.headers) == ("text/plain", {})


@pytest.mark.parametrize("prefix", ["ce-", AMQP_PREFIX])
def test_an_event_of_the_bridge_comes_back_as_it_was(prefix: str) -> None:
    for event in (make_event(1, headers={"actor": "eve"}), make_event(2, key=None)):
        assert from_attributes(attributes(event, prefix), event.payload, event.content_type, prefix) == event


@pytest.mark.parametrize("payload", [b"[" * 100_000, b"{", b"\xff", b"1" * 5000])
def test_a_payload_that_cannot_be_parsed_is_malformed(payload: bytes) -> None:
    with pytest.raises(Malformed, match="is not JSON"):
        make_event(payload=payload).json()


@pytest.mark.parametrize(
    ("source", "event_id", "known_as"),
    [
        ("/shop/test", "5f0c8a5e-0000-4000-8000-000000000001", "5f0c8a5e-0000-4000-8000-000000000001"),
        ("/shop/test", "5F0C8A5E-0000-4000-8000-00000000000A", "5f0c8a5e-0000-4000-8000-00000000000a"),
        ("/shop/test", "order-17", "9a6be2ce-227a-59a2-851b-ab2774186dfb"),
        ("/other", "order-17", "cff2ddb6-57ad-5759-bdd1-7270bdb647bd"),
        ("/shop/tes", "torder-17", "e7fe7274-42c3-5702-be78-627c8f1130a7"),
        # 32 digits, as a hash has them, are none of ours.
        ("/shop/test", "5f0c8a5e000040008000000000000001", "894b12a0-3420-557a-9b7e-771080bf6c96"),
        ("urn:é", "ü", "a42e3697-2185-59e7-bc6d-dfec304fd7c0"),
    ],
)
def test_the_inbox_knows_an_event_by_its_uuid_or_by_one_of_source_and_id(
    source: str, event_id: str, known_as: str
) -> None:
    assert make_event(source=source, id=event_id).inbox_id == known_as


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_the_rule_of_the_inbox_id_is_the_documented_one(source: str, event_id: str) -> None:
    name = b"%d:%b%b" % (len(source.encode()), source.encode(), event_id.encode())
    known_as = make_event(source=source, id=event_id).inbox_id
    assert known_as == str(uuid.uuid5(INBOX_NAMESPACE, name.decode()))
    assert uuid.UUID(known_as).version == 5
