"""What pages have asked of the database lately. However many browsers show the same, it is asked once; and what is
expensive is asked seldom."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Any, Final, TypeVar

T = TypeVar("T")

_REST: Final = 20.0
"""So many times as long as an answer took is it kept at least: what a page costs is a twentieth of a connection."""
_MOST: Final = 200
"""Answers that are kept."""


class Recent:
    """Answers by what was asked."""

    def __init__(self) -> None:
        self._answers: OrderedDict[Hashable, tuple[float, Any]] = OrderedDict()
        """Until when each is good, the one that was asked for last at the end."""
        self._asking: dict[Hashable, asyncio.Task[Any]] = {}
        """Whose answers will be kept."""
        self._tasks: set[asyncio.Task[Any]] = set()
        """All, also those whose answers are forgotten: an event loop alone does not hold a task."""

    async def get(self, key: Hashable, seconds: float, ask: Callable[[], Awaitable[T]]) -> T:
        """An answer to `ask` that is no older than `seconds`, or than twenty times what it took. Who asks for what is
        being asked waits for that. Raises what `ask` raises."""
        if key in self._answers:
            until, answer = self._answers[key]
            if time.monotonic() < until:
                self._answers.move_to_end(key)
                return answer  # type: ignore[no-any-return]
        asking = self._asking.get(key)
        if asking is None:
            asking = self._asking[key] = asyncio.create_task(self._ask(key, seconds, ask))
            self._tasks.add(asking)
            asking.add_done_callback(partial(self._end, key))
        # Whoever waits may leave; the others want the answer.
        return await asyncio.shield(asking)

    def forget(self) -> None:
        """Somebody has changed what was asked for: whoever asks next is answered anew."""
        self._answers.clear()
        self._asking.clear()

    async def _ask(self, key: Hashable, seconds: float, ask: Callable[[], Awaitable[T]]) -> T:
        began = time.monotonic()
        answer = await ask()
        now = time.monotonic()
        if self._asking.get(key) is asyncio.current_task():  # not forgotten meanwhile
            self._answers[key] = (now + max(seconds, _REST * (now - began)), answer)
            self._answers.move_to_end(key)
            while len(self._answers) > _MOST:
                self._answers.popitem(last=False)
        return answer

    def _end(self, key: Hashable, asking: asyncio.Task[Any]) -> None:
        self._tasks.discard(asking)
        if self._asking.get(key) is asking:
            del self._asking[key]
