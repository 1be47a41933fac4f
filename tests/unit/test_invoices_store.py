"""The files that invoices become: names that cannot collide or escape, and writes that are whole."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from workers.invoices.files import file_name, write_whole

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)
AWKWARD = st.text("./~+%-_aA\u0301á\x00 ", min_size=1, max_size=6)


@given(NAMES | AWKWARD)
@example("..")
@example(".")
@example("../../etc/passwd")
@example("/etc/passwd")
@example("\x00")
@example("ы" * 200)
def test_a_name_is_one_visible_file_in_its_folder(name: str) -> None:
    made = file_name(name, ".pdf")
    folder = Path("/srv/invoices")
    assert (folder / made).resolve() == folder / made
    assert (folder / made).parent == folder
    assert made.endswith(".pdf")
    assert made.isascii()
    assert made.isprintable()
    assert not made.startswith(".")
    assert len(made) < 200


@given(NAMES | AWKWARD, NAMES | AWKWARD)
@example("a/b", "a%2Fb")
@example("~", "%7E")
@example(".a", "%2Ea")
@example("á", "a\u0301")
@example("x" * 190, "x" * 191)
@example("x" * 190, file_name("x" * 190, ""))
def test_two_names_never_share_a_file(one: str, other: str) -> None:
    assert (file_name(one, ".pdf") == file_name(other, ".pdf")) == (one == other)


def test_an_ordinary_number_stays_readable() -> None:
    assert file_name("INV-2026_0001.a", ".pdf") == "INV-2026_0001.a.pdf"


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    (path / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=r"a\.pdf"):
        write_whole(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
