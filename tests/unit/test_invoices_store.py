"""The files that invoices become: names that cannot collide or escape, and files that are created whole and once."""

import errno
import multiprocessing
import os
import time
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workers.invoices.store import Directory, file_name, open_store

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


@given(NAMES | AWKWARD, NAMES | AWKWARD, st.integers(1, 999))
@example("a+1", "a", 1)
@example("x" * 191, "x" * 191, 1)
def test_a_correction_never_shares_a_file_with_an_invoice(one: str, other: str, correction: int) -> None:
    assert file_name(one, ".pdf") != file_name(other, f"+{correction}.pdf")


def test_an_ordinary_number_stays_readable() -> None:
    assert file_name("INV-2026_0001.a", ".pdf") == "INV-2026_0001.a.pdf"


async def test_a_file_is_created_once_and_stays_as_it_is(tmp_path: Path) -> None:
    store = Directory(tmp_path)
    assert await store.get("a.pdf") is None
    assert await store.create("a.pdf", b"first")
    assert not await store.create("a.pdf", b"second")
    assert await store.get("a.pdf") == b"first"
    assert store.place("a.pdf") == str(tmp_path / "a.pdf")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pdf"]


async def test_of_processes_that_create_one_file_at_the_same_moment_one_does(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    rounds, processes = 50, 4
    barrier = context.Barrier(processes)
    created: multiprocessing.Queue[tuple[int, int]] = context.Queue()

    def create(number: int) -> None:
        store = Directory(tmp_path)
        for turn in range(rounds):
            barrier.wait(30)
            if store._create(f"{turn}.pdf", b"%d" % number * 10_000):
                created.put((turn, number))

    running = [context.Process(target=create, args=(number,)) for number in range(processes)]
    for process in running:
        process.start()
    winners = dict(created.get(timeout=30) for _ in range(rounds))
    for process in running:
        process.join(30)
        assert process.exitcode == 0
    assert created.empty()
    assert sorted(winners) == list(range(rounds))
    for turn, number in winners.items():
        assert (tmp_path / f"{turn}.pdf").read_bytes() == b"%d" % number * 10_000
    assert len(list(tmp_path.iterdir())) == rounds


async def test_a_write_that_fails_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Directory(tmp_path)

    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        await store.create("a.pdf", b"new")
    assert list(tmp_path.iterdir()) == []


async def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Directory(tmp_path)

    def unable(*_: object) -> NoReturn:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", unable)
    with pytest.raises(OSError, match=f"the file system has no hard links; use another: '{tmp_path}'"):
        await store.create("a.pdf", b"new")
    assert list(tmp_path.iterdir()) == []


async def test_a_folder_that_went_away_is_an_error_and_not_an_absent_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    store = Directory(tmp_path / "out")
    (tmp_path / "out").rmdir()
    with pytest.raises(FileNotFoundError):
        await store.create("a.pdf", b"new")


def test_what_a_crash_left_is_removed_when_the_folder_is_opened(tmp_path: Path) -> None:
    old, young = time.time() - 3600, time.time()
    for name, written in {
        ".a.pdf.0123abcd.tmp": old,
        ".b.pdf.0123abcd.tmp": young,  # another process writes it now
        "a.pdf": old,
        ".hidden": old,
        ".a.pdf.0123ABCD.tmp": old,
        "a.pdf.0123abcd.tmp": old,
        ".a.pdf.0123abcd.tmp.keep": old,
    }.items():
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (written, written))
    open_store(str(tmp_path))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        ".a.pdf.0123ABCD.tmp",
        ".a.pdf.0123abcd.tmp.keep",
        ".b.pdf.0123abcd.tmp",
        ".hidden",
        "a.pdf",
        "a.pdf.0123abcd.tmp",
    ]
