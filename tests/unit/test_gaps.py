"""Marks and gaps against a model that knows the truth."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.sources import gaps as module
from bridge.sources.gaps import MANY, Gaps, Ranges, Snapshot, all_joined, between, joined, without

ids = st.lists(st.integers(1, 60), unique=True).map(sorted)


def members(ranges: Ranges) -> set[int]:
    return {number for low, high in ranges for number in range(low, high)}


def as_ranges(numbers: set[int]) -> Ranges:
    return joined((), tuple((number, number + 1) for number in sorted(numbers))) if numbers else ()


@given(ids, ids)
def test_without_removes_exactly_these(inside: list[int], gone: list[int]) -> None:
    assert members(without(as_ranges(set(inside)), gone)) == set(inside) - set(gone)


@given(st.integers(0, 30), ids)
def test_between_finds_what_a_page_leaves_out(mark: int, seen: list[int]) -> None:
    fresh = [number for number in seen if number > mark]
    expected = set(range(mark + 1, fresh[-1])) - set(fresh) if fresh else set()
    assert members(between(mark, fresh)) == expected


@given(ids, ids)
def test_joined_is_the_union_in_order_and_apart(first: list[int], second: list[int]) -> None:
    union = joined(as_ranges(set(first)), as_ranges(set(second)))
    assert members(union) == set(first) | set(second)
    assert list(union) == sorted(union)


def every(gaps: Gaps) -> Ranges:
    return all_joined([gaps.recent, *gaps.old])


def snapshot(xmax: int, *running: int) -> Snapshot:
    return Snapshot(min(running, default=xmax), xmax, running)


def test_a_snapshot_is_read_from_its_text() -> None:
    assert Snapshot.read("10:20:10,14") == Snapshot(10, 20, (10, 14))
    assert Snapshot.read("20:20:") == Snapshot(20, 20, ())


def test_a_gap_closes_only_once_a_snapshot_has_reached_its_horizon() -> None:
    gaps = Gaps()
    assert gaps.saw(0, [1, 2, 5]) == 5
    assert every(gaps) == ((3, 5),)
    gaps.looked(snapshot(1000))
    assert every(gaps) == ((3, 5),), "without a horizon nothing may close"
    gaps.set_horizon(100)
    gaps.looked(snapshot(99))
    assert every(gaps) == ((3, 5),), "whoever has 99 may fill it, and may be running unseen"
    gaps.looked(snapshot(110, 99))
    assert every(gaps) == ((3, 5),)
    gaps.looked(snapshot(110, 100))
    assert every(gaps) == ()


def test_stores_under_steady_load_do_not_put_the_closing_off() -> None:
    gaps = Gaps()
    mark = gaps.saw(0, [1, 3])
    gaps.set_horizon(100)
    mark = gaps.saw(mark, [4, 6])
    gaps.set_horizon(200)
    gaps.looked(snapshot(150, 120))
    assert every(gaps) == ((5, 6),), "the older gap keeps its horizon"
    gaps.set_horizon(300)
    gaps.looked(snapshot(301))
    assert every(gaps) == ()


def test_late_rows_leave_their_gap_and_do_not_move_the_mark() -> None:
    gaps = Gaps(((3, 10),), 50)
    assert gaps.saw(20, [4, 5]) == 20
    assert every(gaps) == ((3, 4), (6, 10))
    assert gaps.saw(20, [3, 6, 22]) == 22
    assert every(gaps) == ((7, 10), (21, 22))


def test_an_old_gap_is_due_again_only_when_a_suspect_has_ended() -> None:
    gaps = Gaps(((3, 10),), 50)
    assert gaps.due(100) == (((3, 10),), True), "who may fill what is stored is not known"
    gaps.looked(snapshot(60, 40, 45, 55))
    assert gaps.due(100) == ((), True)
    assert gaps.suspects == {40, 45}
    gaps.ended(snapshot(61, 40, 45))
    assert gaps.due(100) == ((), True), "55 took its id later"
    gaps.ended(snapshot(62, 45))
    assert gaps.due(100) == (((3, 10),), True)
    gaps.looked(snapshot(62, 45))
    assert gaps.suspects == {45}
    gaps.ended(snapshot(63))
    gaps.looked(snapshot(63))
    assert every(gaps) == ()


def test_young_gaps_grow_old_when_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OLD_AFTER", 1e9)
    gaps = Gaps()
    gaps.saw(0, range(2, 2 * MANY, 2))
    gaps.set_horizon(100)
    gaps.looked(snapshot(101, 7))
    assert len(gaps.recent) == MANY - 1, "they may wait for a short transaction"
    gaps.saw(2 * MANY - 2, [2 * MANY, 2 * MANY + 2])
    gaps.set_horizon(200)
    gaps.looked(snapshot(201, 7))
    assert len(gaps.recent) == MANY + 1, "some of them have no horizon yet"

    gaps = Gaps()
    gaps.saw(0, range(2, 2 * MANY + 2, 2))
    assert gaps.many_fresh
    gaps.set_horizon(100)
    gaps.looked(snapshot(101, 7))
    assert gaps.recent == ()
    assert [len(part) for part in gaps.old] == [MANY]


def test_a_look_that_ended_half_way_leaves_the_rest_due() -> None:
    stored = tuple((low, low + 1) for low in range(10, 100, 10))
    gaps = Gaps(stored, 50)
    due = gaps.due(4)
    assert due == (stored[:4], False)
    gaps.looked(snapshot(60, 40), below=due.ranges[-1][1])
    assert gaps.due(100) == (stored[4:], True)
    assert gaps.saw(200, [50]) == 200
    gaps.looked(snapshot(60, 40), below=51)
    assert gaps.due(100) == (stored[5:], True)


def test_recent_gaps_above_a_cut_wait_for_it() -> None:
    gaps = Gaps(((10, 11), (20, 21), (40, 41)), 50)
    gaps.saw(50, [51, 53])
    assert gaps.due(1) == (((10, 11),), False)
    assert gaps.due(3) == (((10, 11), (20, 21), (40, 41), (52, 53)), True)


def test_parts_that_wait_for_the_same_stay_few_and_large_ones_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OLD_AFTER", 0)
    gaps = Gaps(tuple((low, low + 1) for low in range(0, 20_000, 2)), 50)
    gaps.looked(snapshot(51, 7))
    (large,) = gaps.old
    mark, most = 20_000, 0
    for number in range(500):
        mark = gaps.saw(mark, [mark + 1, mark + 3])
        gaps.set_horizon(100 + number)
        gaps.looked(snapshot(101 + number, 7))
        most = max(most, len(gaps.old))
        assert any(part is large for part in gaps.old)
    assert most < 12
    assert len(every(gaps)) == 10_500


# A server in small: transactions take their id, then ids of the log, and end in any order. The reader's page is that of
# `bridge.read_page`.


@dataclass(slots=True, eq=False)
class Row:
    id: int
    writer: int
    taken: int
    """When its id was taken."""


class Server:
    def __init__(self) -> None:
        self.clock = 0
        self.next_xid = 100
        self.next_id = 1
        self.running: list[int] = []
        self.highest_ended = 99
        self.rows: list[Row] = []
        self.committed: dict[int, int] = {}
        """When each transaction committed."""

    def begin(self) -> int:
        xid, self.next_xid = self.next_xid, self.next_xid + 1
        self.running.append(xid)
        return xid

    def emit(self, xid: int) -> None:
        self.clock += 1
        self.rows.append(Row(self.next_id, xid, self.clock))
        self.next_id += 1

    def end(self, xid: int, *, commit: bool) -> None:
        self.clock += 1
        self.running.remove(xid)
        self.highest_ended = max(self.highest_ended, xid)
        if commit:
            self.committed[xid] = self.clock

    def horizon(self) -> int:
        xid = self.begin()
        self.end(xid, commit=True)
        return xid

    def snapshot(self) -> Snapshot:
        xmax = self.highest_ended + 1
        running = tuple(xid for xid in self.running if xid < xmax)
        return Snapshot(min(running, default=xmax), xmax, running)


class Reader:
    """As `bridge.sources.log.LogReader`, with every page stored."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.gaps = Gaps()
        self.mark = 0
        self.seen: list[Row] = []

    def page(self, size: int, most: int) -> bool:
        """Whether it saw everything that there was to see."""
        snapshot = self.server.snapshot()
        due = self.gaps.due(most)
        if any(snapshot.ended(suspect) for suspect in self.gaps.suspects):
            self.gaps.ended(snapshot)
            return False
        visible = [row for row in self.server.rows if row.writer in self.server.committed]
        late = [row for row in visible if row.id in members(due.ranges)]
        above = [row for row in visible if row.id > self.mark] if due.whole else []
        rows = (late + above)[:size]
        self.mark = self.gaps.saw(self.mark, [row.id for row in rows])
        self.seen += rows
        if len(late) >= size:
            self.gaps.looked(snapshot, below=rows[-1].id + 1)
        elif not due.whole:
            self.gaps.looked(snapshot, below=due.ranges[-1][1])
        else:
            self.gaps.looked(snapshot)
        return due.whole and len(rows) < size

    def restart(self) -> None:
        """Goes on from what is stored, with the horizon of the transaction that stored it."""
        self.gaps = Gaps(every(self.gaps), self.server.horizon())


def run(random: Random) -> Iterator[Reader]:
    server = Server()
    reader = Reader(server)
    for _ in range(random.randrange(20, 200)):
        what = random.random()
        if what < 0.15:
            server.begin()
        elif what < 0.5 and server.running:
            server.emit(random.choice(server.running))
        elif what < 0.65 and server.running:
            server.end(random.choice(server.running), commit=random.random() < 0.6)
        elif what < 0.72:
            reader.gaps.set_horizon(server.horizon())
        elif what < 0.74:
            reader.restart()
        else:
            reader.page(random.randrange(1, 6), random.randrange(1, 5))
        yield reader
    for xid in list(server.running):
        server.end(xid, commit=random.random() < 0.6)
    for _ in range(4):
        while not reader.page(5, 3):
            yield reader
        reader.gaps.set_horizon(server.horizon())
    yield reader


@settings(max_examples=400)
@given(st.randoms(use_true_random=False), st.booleans())
def test_every_committed_row_is_seen_once_and_after_all_that_was_committed_before_it(
    random: Random, at_once: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "OLD_AFTER", 0 if at_once else 1e9)
        patch.setattr(module, "MANY", 3)
        *_, reader = run(random)
    server = reader.server
    committed = [row for row in server.rows if row.writer in server.committed]
    assert sorted(row.id for row in reader.seen) == [row.id for row in committed]
    place = {row.id: number for number, row in enumerate(reader.seen)}
    for before, after in ((a, b) for a in committed for b in committed):
        if server.committed[before.writer] < after.taken:
            assert place[before.id] < place[after.id], (before, after)
    assert every(reader.gaps) == (), "all has ended, so nothing can be waited for"
