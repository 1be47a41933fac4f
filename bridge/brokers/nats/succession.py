"""What a process that has become pinned to a consumer must have in hand before it hands out anything.

Its predecessor may have left messages behind, which JetStream gives to the successor only after `ack_wait`, behind
newer ones, and says of them no more than their number. So the successor collects, until it knows that whatever of the
consumer is unsettled is in its hand; then all of that can be put in the order of the stream, and what comes later
comes in that order.

One look at the number would not tell: what a predecessor acknowledges late, after it has been delivered again, is in
hand and counts no more, so as many others could be missing. Hence the successor compares two looks, made while nothing
was on its way to it. From one to the other the number grows by the messages that were never delivered before, and by
nothing else. When it has grown by exactly those, nobody has settled anything in between; then whatever came in between
is still unsettled, and if it is as many as are unsettled, it is all of them. When it has not, what is in hand goes
back, comes again, and is compared anew.
"""

from typing import Generic, Literal, TypeVar

M = TypeVar("M")

Verdict = Literal["all", "some", "unsure"]
"""What is unsettled is in hand; it is not yet; or what is in hand must be given back, to come again."""


class Succession(Generic[M]):
    """Messages of the stream's sequence numbers, as they come. It knows nothing of NATS."""

    def __init__(self) -> None:
        self._hand: dict[int, M] = {}
        self._before: int | None = None
        """How many were unsettled when the hand was empty; None before the first look."""
        self._new = 0
        """Of what came since, how many had never been delivered before."""
        self._missing = 0
        self._only_old = False

    def add(self, sequence: int, message: M, *, first: bool) -> M | None:
        """Takes one that has come; `first` when it was never delivered before, to anyone. The same message, as it came
        before, if it did."""
        before = self._hand.get(sequence)
        self._hand[sequence] = message
        self._new += first
        self._only_old = not first
        return before

    def judge(self, unsettled: int) -> Verdict:
        """Looks at how many messages of the consumer are unsettled, while nothing is on its way."""
        self._missing = max(0, unsettled - len(self._hand))
        if unsettled == 0:
            self._hand.clear()
            return "all"
        if self._before is None:
            # Nobody but this process was ever given these, so nobody has settled them.
            return "all" if self._new == len(self._hand) == unsettled else "unsure"
        if self._missing:
            return "some"
        return "all" if unsettled == self._before + self._new else "unsure"

    def begin_again(self, unsettled: int) -> list[M]:
        """Empties the hand, of which all is to come again. What was in it."""
        given_back = self.in_order()
        self._hand.clear()
        self._before, self._new = unsettled, 0
        self._missing, self._only_old = unsettled, True
        return given_back

    def room(self, prefetch: int) -> int:
        """How many to ask for: the missing ones, while they come, and never fewer than one, since they may come now."""
        return max(1, prefetch - len(self._hand), self._missing if self._only_old else 0)

    def in_order(self) -> list[M]:
        """What is in hand, in the order of the stream."""
        return [self._hand[sequence] for sequence in sorted(self._hand)]
