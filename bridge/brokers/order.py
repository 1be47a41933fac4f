"""What a worker has in hand of a Pub/Sub subscription: the next of a key follows once the one before is settled."""

from collections import deque
from typing import Generic, Protocol, TypeVar


class Keyed(Protocol):
    """A delivery; "" is no key."""

    @property
    def key(self) -> str: ...


D = TypeVar("D", bound=Keyed)


class InOrder(Generic[D]):
    """Deliveries that are ready, and behind each handed-out one those that wait for it."""

    def __init__(self) -> None:
        self._ready: deque[D] = deque()
        self._of_key: dict[str, deque[D]] = {}

    def __bool__(self) -> bool:
        """Whether one is ready."""
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

    def settled(self, delivery: D) -> None:
        """It is done with: what waits behind it is ready."""
        waiting = self._of_key.get(delivery.key)
        if waiting is None or waiting[0] is not delivery:
            return
        waiting.popleft()
        if waiting:
            self._ready.append(waiting[0])
        else:
            del self._of_key[delivery.key]

    def take_back(self, delivery: D) -> list[D]:
        """Removes one with all that wait behind it, and gives them in order."""
        waiting = self._of_key.get(delivery.key)
        if waiting is None or waiting[0] is not delivery:
            return [delivery]
        del self._of_key[delivery.key]
        return list(waiting)

    def take_back_ready(self) -> list[D]:
        """The same for all that were not handed out, unless they wait for one that was."""
        ready = list(self._ready)
        self._ready.clear()
        return [each for delivery in ready for each in self.take_back(delivery)]
