"""Which ids below the mark may still appear: the gaps, and when to look into them.

A gap is a run of ids that were handed out and not seen: rolled back, or not committed yet. Whoever may fill it took its
transaction id before the gap's *horizon*, a transaction id that is taken after the gap was found. So a snapshot that
looked into a gap and lies beyond its horizon tells who that may be: the transactions below the horizon that it sees
running, the gap's *suspects*. Nothing can appear before one of them ends, and without any the gap is forgotten.

- *Fresh* gaps have no horizon yet, and *young* ones have had it for less than OLD_AFTER. They are looked into on every
  page: nearly all of them close in this time, with the short transactions that left them.
- *Old* gaps are looked into again, by the rule of `Gaps.due`, once a suspect has ended. Gaps of a moment share their
  suspects and stay together, so that the end of one transaction calls for a look at those that it may have filled.
"""

import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of ids, ascending, apart from each other."""

OLD_AFTER: Final = 0.5
"""Seconds; whatever runs for longer is not counted among the short transactions."""
MANY: Final = 1000
"""Ranges. So many young ones grow old at once, since each of them costs an index scan on every page."""
_LIKE_SIZE: Final = 2
"""Old gaps with the same suspects are put together when one part has at most so many times the ranges of the other: so
each range is copied a few times, however many there are, and the parts stay few."""


def without(ranges: Ranges, ids: Sequence[int]) -> Ranges:
    """The ranges less these ascending ids. An id outside of every range changes nothing."""
    if not ids or not ranges:
        return ranges
    first = max(0, bisect_right(ranges, ids[0], key=_low) - 1)
    last = bisect_right(ranges, ids[-1], key=_low)
    left: list[tuple[int, int]] = []
    index = 0
    touched = ranges[first:last]
    for low, high in touched:
        while index < len(ids) and ids[index] < low:
            index += 1
        while index < len(ids) and ids[index] < high:
            if ids[index] > low:
                left.append((low, ids[index]))
            low = ids[index] + 1
            index += 1
        if low < high:
            left.append((low, high))
    kept = tuple(left)
    return ranges if kept == touched else ranges[:first] + kept + ranges[last:]


def between(mark: int, ids: Sequence[int]) -> Ranges:
    """The ranges that these ascending ids leave out above the mark."""
    if not ids or ids[-1] - mark == len(ids):
        return ()
    found = []
    for id_ in ids:
        if id_ > mark + 1:
            found.append((mark + 1, id_))
        mark = id_
    return tuple(found)


def joined(first: Ranges, second: Ranges) -> Ranges:
    """Both, in order; ranges that touch become one."""
    if not first or not second:
        return first or second
    merged: list[tuple[int, int]] = []
    for low, high in sorted(first + second):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def all_joined(parts: Iterable[Ranges]) -> Ranges:
    """All of them, as `joined`."""
    ranges: Ranges = ()
    for part in parts:
        ranges = joined(ranges, part)
    return ranges


def _low(range_: tuple[int, int]) -> int:
    return range_[0]


class Snapshot(NamedTuple):
    """What a statement saw. Transaction ids are 64 bits wide (xid8)."""

    xmin: int
    """Every transaction below has ended."""
    xmax: int
    """No transaction from here on has."""
    running: tuple[int, ...]
    """Those between that have not."""

    @classmethod
    def read(cls, text: str) -> "Snapshot":
        """From the text of a pg_snapshot: ``xmin:xmax:running,...``."""
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), tuple(map(int, running.split(","))) if running else ())

    def ended(self, transaction: int) -> bool:
        """Whether this snapshot sees what the transaction has committed, if it has."""
        return transaction < self.xmax and transaction not in self.running

    def suspects(self, horizon: int) -> frozenset[int] | None:
        """Who may still fill what this snapshot looked for and did not find; None where it cannot tell, because it
        does not reach the horizon."""
        if self.xmax < horizon:
            return None
        return frozenset(transaction for transaction in self.running if transaction < horizon)


class Due(NamedTuple):
    """The gaps that a page must look into."""

    ranges: Ranges
    whole: bool
    """Whether that is all of them: only then may the page go on above the mark."""


@dataclass(slots=True, eq=False)
class _Old:
    """Gaps that wait for the same transactions."""

    ranges: Ranges
    horizon: int
    suspects: frozenset[int] | None
    """None: one of them has ended, or they are not known yet, so these gaps are due."""


class Gaps:
    """The gaps of one reader."""

    def __init__(self, ranges: Ranges = (), horizon: int | None = None) -> None:
        """As stored; without a horizon they wait for one."""
        self._fresh: Ranges = ()
        self._young: Ranges = ()
        self._horizon = 0
        self._since = 0.0
        self._old: list[_Old] = []
        if horizon is None:
            self._fresh = ranges
        elif ranges:
            self._old.append(_Old(ranges, horizon, None))

    @property
    def recent(self) -> Ranges:
        """The fresh and the young ones."""
        return joined(self._young, self._fresh)

    @property
    def old(self) -> tuple[Ranges, ...]:
        """The old ones, in parts. A part that has not changed is the same object."""
        return tuple([old.ranges for old in self._old])

    @property
    def suspects(self) -> frozenset[int]:
        """Whoever may fill an old gap that is not due."""
        return frozenset().union(*[old.suspects for old in self._old if old.suspects is not None])

    def due(self, most: int) -> Due:
        """What the next page looks into: all recent gaps, and those old ones that are due.

        Of these at most `most`; then nothing that lies above them, since a row there may follow one of its key that is
        still to be looked for.
        """
        due = [old.ranges for old in self._old if old.suspects is None]
        ranges = all_joined([part[:most] for part in due])[:most]
        if sum(map(len, due)) <= most:
            return Due(joined(ranges, self.recent), whole=True)
        recent = self.recent
        below = recent[: bisect_left(recent, ranges[-1][1], key=_low)]
        return Due(joined(ranges, below), whole=False)

    def saw(self, mark: int, ids: Sequence[int]) -> int:
        """Takes the ascending ids of a page that was read from `mark`; gives the new mark."""
        late = bisect_right(ids, mark)
        if late:
            below = ids[:late]
            self._fresh = without(self._fresh, below)
            self._young = without(self._young, below)
            for old in self._old:
                # A page looks into no other: nothing can have appeared there.
                if old.suspects is None:
                    old.ranges = without(old.ranges, below)
            self._old = [old for old in self._old if old.ranges]
        fresh = ids[late:]
        self._fresh = joined(self._fresh, between(mark, fresh))
        return fresh[-1] if fresh else mark

    def ended(self, snapshot: Snapshot) -> None:
        """This snapshot sees that a suspect has ended: what it may have filled is due."""
        for old in self._old:
            if old.suspects is not None and any(snapshot.ended(suspect) for suspect in old.suspects):
                old.suspects = None

    def looked(self, snapshot: Snapshot, below: int | None = None) -> None:
        """This snapshot has looked into what was due, at the ids under `below` (None: everywhere)."""
        changed = False
        for old in list(self._old):
            if old.suspects is None:
                changed |= self._look_at(old, snapshot, below)
        if self._young and below is None:
            changed |= self._grow_old(snapshot)
        if changed:
            self._put_together()

    def _look_at(self, old: _Old, snapshot: Snapshot, below: int | None) -> bool:
        """Whether anything changed."""
        suspects = snapshot.suspects(old.horizon)
        split = len(old.ranges) if below is None else bisect_left(old.ranges, below, key=_low)
        if suspects is None or not split:
            return False
        if split < len(old.ranges):
            self._old.append(_Old(old.ranges[split:], old.horizon, None))
            old.ranges = old.ranges[:split]
        old.suspects = suspects
        return True

    def _grow_old(self, snapshot: Snapshot) -> bool:
        """Whether the young gaps are young no more."""
        suspects = snapshot.suspects(self._horizon)
        if suspects is None:
            return False
        if suspects:
            if len(self._young) < MANY and time.monotonic() - self._since < OLD_AFTER:
                return False
            self._old.append(_Old(self._young, self._horizon, suspects))
        self._young = ()
        return True

    def _put_together(self) -> None:
        """Forgets what nobody can fill, and puts together what waits for the same transactions."""
        kept: list[_Old] = []
        for old in sorted(self._old, key=lambda old: len(old.ranges), reverse=True):
            if old.suspects is None:
                kept.append(old)
                continue
            if not old.suspects:
                continue
            like = next(
                (
                    other
                    for other in kept
                    if other.suspects == old.suspects and len(other.ranges) <= _LIKE_SIZE * len(old.ranges)
                ),
                None,
            )
            if like is None:
                kept.append(old)
            else:
                # Its horizon will do: the suspects, being the same, are below both, and others do not come.
                like.ranges = joined(like.ranges, old.ranges)
        self._old = kept

    @property
    def wants_horizon(self) -> bool:
        """Whether a horizon taken now would let gaps grow old, or close, that have none yet."""
        return bool(self._fresh) and not self._young

    @property
    def many_fresh(self) -> bool:
        """Whether there are so many of them that it should be taken at once."""
        return self.wants_horizon and len(self._fresh) >= MANY

    def set_horizon(self, xid: int) -> None:
        """A transaction id, taken after every page so far was read."""
        if self.wants_horizon:
            self._young, self._fresh, self._horizon, self._since = self._fresh, (), xid, time.monotonic()
