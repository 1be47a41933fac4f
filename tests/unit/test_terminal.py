"""What the commands print for people: within 80 columns, aligned, and with ids that can be copied."""

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from rich.cells import cell_len

from bridge.process import terminal

ID = "invoices:0b1f3a52-6d0c-4c0b-9d43-0c2a7e5f9b11"
ROW = {
    "id": ID,
    "failed at": "2026-11-29 21:05:33 CET",
    "code": "attempts_exhausted",
    "topic": "shop.invoice.requested",
    "from": "invoices",
    "reason": "the printer is out of paper, and nobody has found any in the whole of the building since Monday",
}


@pytest.fixture
def berlin() -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "Europe/Berlin"
    time.tzset()
    yield
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_wide_row_goes_on_in_a_second_line_and_no_line_is_longer_than_80(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table([ROW, {**ROW, "id": "outbox:12", "code": "rejected", "reason": "no"}], whole=("id",))
    lines = printed(capsys)
    assert max(map(cell_len, lines)) <= 80
    assert lines[2] == f"{ID}  2026-11-29 21:05:33 CET"
    assert len(lines) == 6
    assert lines[1].index("topic") == lines[3].index("shop.invoice") == lines[5].index("shop.invoice"), "aligned"
    assert lines[1].index("reason") == lines[3].index("the printer") == lines[5].index("no")
    assert lines[3].endswith("…")


def test_a_row_that_fits_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table([{"key": "a", "events": "1"}, {"key": "longer", "events": "20"}])
    assert printed(capsys) == ["key     events", "a       1", "longer  20"]


def test_a_wider_terminal_is_used(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "columns", lambda: 200)
    terminal.table([ROW], whole=("id",))
    lines = printed(capsys)
    assert len(lines) == 2
    assert 80 < cell_len(lines[1]) <= 200


def test_an_id_is_never_cut_however_long_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    long = f"{'w' * 63}:0b1f3a52-6d0c-4c0b-9d43-0c2a7e5f9b11"
    terminal.table([{**ROW, "id": long}], whole=("id",))
    assert long in printed(capsys)


def test_a_long_field_of_one_row_leaves_room_for_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table([{**ROW, "topic": "t" * 255}, ROW], whole=("id",))
    lines = printed(capsys)
    assert max(map(cell_len, lines)) <= 80
    assert any("attempts_exhausted  ttttt" in line for line in lines)


def test_wide_characters_count_twice(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table([{"key": "鍵" * 100, "reason": "紙がない" * 30}])
    assert max(map(cell_len, printed(capsys))) <= 80


def test_what_others_wrote_does_nothing_to_the_terminal_and_stays_in_its_row(
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal.table([{"key": "a\x1b[2J\nb", "reason": "x\ty"}])
    assert printed(capsys)[1:] == ["a\\x1b[2J\\nb  x\\ty"]


def test_the_last_field_goes_on_below_where_all_of_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table([{"name": "q", "detail": "word " * 40}], wrapped=True)
    lines = printed(capsys)
    assert max(map(cell_len, lines)) <= 80
    assert " ".join(lines).count("word") == 40


def test_a_field_goes_on_under_its_beginning_and_breaks_no_id() -> None:
    text = terminal.field("id", f"{'word ' * 12}{ID} and more", label=10)
    first, second = text.split("\n")
    assert second == f"{' ' * 12}{ID} and more"
    assert cell_len(first) <= 80


def test_times_are_those_of_this_machine_and_name_their_zone(berlin: None) -> None:
    assert terminal.moment(datetime(2026, 11, 29, 20, 5, 33, 99, tzinfo=UTC)) == "2026-11-29 21:05:33 CET"
    assert terminal.moment(datetime(2026, 7, 1, 20, 5, 33, tzinfo=UTC)) == "2026-07-01 22:05:33 CEST"
    assert terminal.moment(None) == "-"


def test_a_command_in_a_text_is_never_broken() -> None:
    text = (
        "postgres.dsn: something is missing. Run: grant bridge_relay to some_role; or use `pgbridge check --for bridge`"
    )
    lines = terminal.wrapped(text, first=50, rest=25).split("\n")
    assert lines == [
        "postgres.dsn: something is",
        " " * 25 + "missing. Run: grant bridge_relay to some_role; or use",
        " " * 25 + "`pgbridge check --for bridge`",
    ]
