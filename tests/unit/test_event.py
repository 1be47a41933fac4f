"""Attributes of an event, as they come back from a broker."""

import pytest

from bridge.event import Malformed, from_attributes

FLAT = {
    "ce-specversion": "1.0",
    "ce-id": "5f0c8a5e-0000-4000-8000-000000000001",
    "ce-type": "shop.order.inserted",
    "ce-source": "/shop/test",
    "ce-time": "2026-01-02T03:04:05+00:00",
}


@pytest.mark.parametrize("time", ["yesterday", "2026-13-01T00:00:00Z", "0001-01-01T00:00:00+02:00"])
def test_a_time_that_is_none_makes_the_message_malformed(time: str) -> None:
    with pytest.raises(Malformed, match="ce-time is not an RFC 3339 time"):
        from_attributes(FLAT | {"ce-time": time}, b"{}")


@pytest.mark.parametrize("name", ["ce-id", "ce-type", "ce-source", "ce-time"])
def test_an_attribute_that_is_missing_or_empty_is_named(name: str) -> None:
    missing = {key: value for key, value in FLAT.items() if key != name}
    for flat in (missing, missing | {name: ""}):
        with pytest.raises(Malformed, match=name):
            from_attributes(flat, b"{}")
