"""What waits to be published to Pub/Sub: a `publish` call and its outcomes, and per ordering key a queue."""

import asyncio
from collections import deque

from bridge.brokers.contract import Outcome


class Call:
    """One call of `publish`: its outcomes, and the keys that it has news about which the relay must hear first."""

    def __init__(self, count: int) -> None:
        self.outcomes: list[Outcome | None] = [None] * count
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed: set[KeyQueue] = set()
        self.returned = False
        self._open = count
        if not count:
            self.done.set_result(None)

    def settle(self, index: int, outcome: Outcome) -> None:
        self.outcomes[index] = outcome
        self._open -= 1
        if not self._open and not self.done.done():
            self.done.set_result(None)


Waiting = tuple[bytes, Call, int]
"""A message as a field of a request, and where its outcome goes."""


class KeyQueue:
    """What waits to be published with one key; that without a key needs no order, so it has many requests in flight."""

    __slots__ = ("in_flight", "key", "ready", "timer", "unanswered", "waiting")

    def __init__(self, key: str) -> None:
        self.key = key
        self.waiting: deque[Waiting] = deque()
        self.ready = False
        self.in_flight = 0
        self.unanswered = 0
        """Calls that had messages of this key fail and have not returned yet."""
        self.timer: asyncio.TimerHandle | None = None
