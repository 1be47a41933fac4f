"""Payloads as people read them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.console.payload import indented

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES, st.sampled_from([None, 1, "\t"]))
def test_it_says_what_the_payload_says(value: object, indent: int | str | None) -> None:
    text = json.dumps(value, indent=indent)
    shown = indented(text)
    assert shown is not None
    assert json.loads(shown) == value
    assert shown == json.dumps(value, indent=2)


def test_numbers_keep_their_digits_and_names_that_come_twice_stay() -> None:
    text = '{"amount":1234567890123456789.10,"a":1e400,"a":-0.0,"s":"a: [1,2], \\"{\\" é\\u0000"}'
    assert indented(text) == (
        '{\n  "amount": 1234567890123456789.10,\n  "a": 1e400,\n  "a": -0.0,\n  "s": "a: [1,2], \\"{\\" é\\u0000"\n}'
    )


@pytest.mark.parametrize("text", ["", "{", "not json", "[1,]", "[" * 60 + "]" * 60, "[" * 100_000])
def test_what_is_no_json_or_too_deep_is_left_as_it_is(text: str) -> None:
    assert indented(text) is None
