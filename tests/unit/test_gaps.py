"""Marks and gaps against a model that knows the truth."""

from hypothesis import given
from hypothesis import strategies as st

from bridge.sources.gaps import Gaps, Ranges, between, joined, without

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


def test_a_gap_closes_only_once_a_snapshot_has_reached_its_horizon() -> None:
    gaps = Gaps()
    assert gaps.saw(0, [1, 2, 5]) == 5
    assert gaps.all() == ((3, 5),)
    gaps.looked(1000)
    assert gaps.all() == ((3, 5),), "without a horizon nothing may close"
    gaps.set_horizon(100)
    gaps.looked(99)
    assert gaps.all() == ((3, 5),)
    gaps.looked(100)
    assert gaps.all() == ()


def test_stores_under_steady_load_do_not_put_the_closing_off() -> None:
    gaps = Gaps()
    mark = gaps.saw(0, [1, 3])
    gaps.set_horizon(100)
    mark = gaps.saw(mark, [4, 6])
    gaps.set_horizon(200)
    assert gaps.horizon == 100, "the older generation keeps its horizon"
    gaps.looked(100)
    assert gaps.all() == ((5, 6),)
    gaps.set_horizon(300)
    gaps.looked(300)
    assert gaps.all() == ()


def test_late_rows_leave_their_gap_and_do_not_move_the_mark() -> None:
    gaps = Gaps(((3, 10),), 50)
    assert gaps.saw(20, [4, 5]) == 20
    assert gaps.all() == ((3, 4), (6, 10))
    assert gaps.saw(20, [3, 6, 22]) == 22
    assert gaps.all() == ((7, 10), (21, 22))
