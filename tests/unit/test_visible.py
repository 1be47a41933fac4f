"""What others wrote does nothing to the terminal that it is shown on, and means the same to whoever parses it."""

import json

import click
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bridge.process.terminal import complain, field
from bridge.process.visible import json_text, one_line, visible

HOSTILE = "a\x1b[2J\x07\x08\rb\x7f\x9b31m\u202egnp.\u200b\ud800\u2028c"
"""Clears a screen, rings, moves back, begins a sequence in the C1 set, turns text around, and more."""


@given(st.text())
def test_what_is_visible_holds_nothing_else(text: str) -> None:
    assert all(one.isprintable() or one in "\n\t" for one in visible(text))
    assert one_line(text).isprintable()
    visible(text).encode()


@given(
    st.recursive(
        st.none() | st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_json_is_printable_and_parses_to_the_same(value: object) -> None:
    for indent in (None, 2):
        text = json_text(value, indent=indent)
        assert text.replace("\n", "").isprintable()
        assert json.loads(text) == value


@given(st.characters(exclude_categories=["C", "Z"]))
def test_what_can_be_read_stays_as_it_is(one: str) -> None:
    assert visible(one) == one
    assert json_text(one).strip('"') in (one, f"\\{one}")


def test_names_of_fields_are_shown_like_their_values() -> None:
    assert field(f"header {HOSTILE}", HOSTILE).replace("\n", "").isprintable()


def test_an_error_that_quotes_others_is_shown_like_what_it_quotes() -> None:
    @click.command()
    def command() -> None:
        complain(f"the broker says: {HOSTILE}\nand more")

    said = CliRunner().invoke(command).stderr
    assert said.replace("\n", "").isprintable()
    assert len(said.splitlines()) == 2
