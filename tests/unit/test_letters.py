"""What a dead letter says of itself, whoever wrote its headers."""

from datetime import UTC, datetime

import pytest

from bridge.brokers.contract import Letter
from bridge.brokers.letters import ATTEMPTS, PREFIX, letter_of
from bridge.commands.dead_groups import grouped
from bridge.commands.dead_letters import Choice
from bridge.event import Malformed


def letter(**marks: str) -> Letter:
    named = {f"{PREFIX}{name.replace('_', '-')}": value for name, value in marks.items()}
    return letter_of("invoices", "events", Malformed("no id"), "1", named, b"", None)


def test_a_time_without_an_offset_can_be_compared_with_the_others() -> None:
    """Else one letter that somebody made by hand would end every list and filter with a TypeError."""
    naive, aware = letter(failed_at="2026-02-03T14:05:00"), letter(failed_at="2026-02-03T15:05:00+00:00")
    assert naive.failed_at == datetime(2026, 2, 3, 14, 5, tzinfo=UTC)
    assert Choice(since=datetime(2026, 2, 3, tzinfo=UTC)).takes(naive)
    assert [group.letters for group in grouped([naive, aware])] == [2]


@pytest.mark.parametrize("count", ["9" * 5000, "-1", "many", ""])
def test_attempts_that_are_no_number_of_ours_are_none(count: str) -> None:
    assert letter(**{ATTEMPTS.removeprefix(PREFIX): count}).attempts == 0


def test_until_leaves_out_what_came_later_and_keeps_what_has_no_time() -> None:
    until = Choice(until=datetime(2026, 2, 3, 14, 5, tzinfo=UTC))
    assert until.takes(letter(failed_at="2026-02-03T14:05:00"))
    assert until.takes(letter())
    assert not until.takes(letter(failed_at="2026-02-03T14:05:01"))
