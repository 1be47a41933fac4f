"""Parallel across keys, one after the other within a key: the order of what one process has in hand, for every queue.

A queue adds deliveries as they come, which must be the order of each key. `InOrder` keeps two things: those that may
be handed out now, and for each key that has one in hand a line, whose first is that one and whose rest waits for it.

- One without a key is ready at once, and belongs to no line.
- The first of a key is ready at once. Those behind it become ready one by one, each once the one before is `settled`.
- What has to come again, as for a retry or at a stop, is taken back together with its line, since whatever is behind it
  must not overtake it. The caller gives all of that back to the broker, in this order.

It knows nothing of brokers, settles nothing, and waits for nothing. Order across processes is the broker's.
"""

from collections import deque
from typing import Final, Generic, Protocol, TypeVar

MOST_HELD: Final = 10
"""Times the prefetch: most messages in hand with those that wait behind one of their key."""


class Keyed(Protocol):
    """A delivery. Its key is empty where it has none."""

    @property
    def key(self) -> str: ...


D = TypeVar("D", bound=Keyed)


class InOrder(Generic[D]):
    """Deliveries that are ready, and behind each that has a key those that wait for it. True while one is ready."""

    def __init__(self) -> None:
        self._ready: deque[D] = deque()
        self._of_key: dict[str, deque[D]] = {}

    def __bool__(self) -> bool:
        """Whether `hand_out` has one to give."""
        return bool(self._ready)

    @property
    def behind(self) -> int:
        """How many wait behind another of their key."""
        return sum(len(waiting) - 1 for waiting in self._of_key.values())

    def add(self, delivery: D) -> None:
        """Takes one that has come."""
        key = delivery.key
        if key and key in self._of_key:
            self._of_key[key].append(delivery)
            return
        if key:
            self._of_key[key] = deque([delivery])
        self._ready.append(delivery)

    def hand_out(self) -> D:
        """The next that is ready."""
        return self._ready.popleft()

    def again(self, delivery: D) -> None:
        """One that was handed out is ready once more, before whatever waits behind it."""
        self._ready.append(delivery)

    def settled(self, delivery: D) -> None:
        """It is done, and never comes again: the next of its key is ready."""
        waiting = self._of_key.get(delivery.key)
        if waiting is None or waiting[0] is not delivery:
            return
        waiting.popleft()
        if waiting:
            self._ready.append(waiting[0])
        else:
            del self._of_key[delivery.key]

    def line_of(self, delivery: D) -> list[D]:
        """One that was handed out, and all that wait behind it, in order."""
        waiting = self._of_key.get(delivery.key)
        return [delivery] if waiting is None or waiting[0] is not delivery else list(waiting)

    def take_back(self, delivery: D) -> list[D]:
        """Removes one that was handed out, with all that wait behind it, and returns them in order."""
        waiting = self._of_key.get(delivery.key)
        if waiting is None or waiting[0] is not delivery:
            return [delivery]
        del self._of_key[delivery.key]
        return list(waiting)

    def take_back_ready(self) -> list[D]:
        """Removes all that are ready, each with what waits behind it; not what waits for one that was handed out."""
        ready = list(self._ready)
        self._ready.clear()
        return [each for delivery in ready for each in self.take_back(delivery)]
