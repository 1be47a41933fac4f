"""Which ids below the mark may still appear: the gaps, in two generations.

A gap is a run of ids that were handed out and not seen: rolled back, or not committed yet. It may be forgotten once
every transaction that could fill it has ended, that is once the snapshot that looked for it has an xmin at or above
the gap's *horizon*: a transaction id taken after the gap was found. One horizon for all gaps would move on with every
store and so, under steady load, never be reached; hence two generations: `old` waits for its horizon while `young`
collects, and takes the old one's place with the next horizon.
"""

from collections.abc import Sequence

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of ids, ascending, apart from each other."""


def without(ranges: Ranges, ids: Sequence[int]) -> Ranges:
    """The ranges less these ascending ids. An id outside of every range changes nothing."""
    if not ids or not ranges:
        return ranges
    left: list[tuple[int, int]] = []
    index = 0
    for low, high in ranges:
        while index < len(ids) and ids[index] < low:
            index += 1
        while index < len(ids) and ids[index] < high:
            if ids[index] > low:
                left.append((low, ids[index]))
            low = ids[index] + 1
            index += 1
        if low < high:
            left.append((low, high))
    return tuple(left)


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


class Gaps:
    """The gaps of one reader. Transaction ids are 64 bits wide (xid8)."""

    def __init__(self, ranges: Ranges = (), horizon: int | None = None) -> None:
        """As stored: every range, and the id of the transaction that stored them."""
        self.old = ranges
        self.horizon = horizon
        self.young: Ranges = ()

    def all(self) -> Ranges:
        """Every range to look into."""
        return joined(self.old, self.young)

    def saw(self, mark: int, ids: Sequence[int]) -> int:
        """Takes the ascending ids of a page that was read from `mark`; gives the new mark."""
        late = 0
        while late < len(ids) and ids[late] <= mark:
            late += 1
        if late:
            self.old = without(self.old, ids[:late])
            self.young = without(self.young, ids[:late])
        fresh = ids[late:]
        self.young = joined(self.young, between(mark, fresh))
        return fresh[-1] if fresh else mark

    def looked(self, xmin: int) -> None:
        """A snapshot with this xmin has looked into every range, so those past their horizon close."""
        if self.horizon is not None and xmin >= self.horizon:
            self.old, self.horizon = (), None

    @property
    def wants_horizon(self) -> bool:
        """Whether a horizon taken now would let gaps close that none covers yet."""
        return self.horizon is None and bool(self.young or self.old)

    def set_horizon(self, xid: int) -> None:
        """A transaction id, taken after every page so far was read."""
        if self.horizon is None and (self.young or self.old):
            self.old, self.young, self.horizon = self.all(), (), xid
