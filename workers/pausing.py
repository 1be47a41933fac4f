"""Whether a person has paused a worker, as its process knows it: `bridge.pause` has it for all processes."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from bridge.errors import PgbridgeError

log = structlog.get_logger()

PAUSE_INTERVAL: Final = 2.5
"""Seconds between two looks."""


class Pausing:
    """The pause of one worker. `ask` says why it is paused, in words, or None; it may raise PgbridgeError."""

    def __init__(self, worker: str, ask: Callable[[], Awaitable[str | None]]) -> None:
        self._worker = worker
        self._ask = ask
        self.now: str | None = None
        """Since when, by whom and why; None while it is not paused. Other threads may read it."""
        self._changed = asyncio.Event()

    async def look(self) -> None:
        """Asks once, and says what has changed. Raises what `ask` raises."""
        before, self.now = self.now, await self._ask()
        if before == self.now:
            return
        if before is None:
            log.warning("worker.paused", worker=self._worker, reason=self.now)
        elif self.now is None:
            log.info("worker.resumed", worker=self._worker)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def watch(self) -> None:
        """Asks again and again, until it is cancelled. While nobody answers, what was said last holds."""
        while True:
            await asyncio.sleep(PAUSE_INTERVAL)
            try:
                await self.look()
            except PgbridgeError as error:
                log.debug("worker.pause_unknown", worker=self._worker, reason=str(error))

    async def begun(self) -> None:
        """Returns once it is paused."""
        while self.now is None:
            await self._changed.wait()

    async def ended(self) -> None:
        """Returns once it is not paused."""
        while self.now is not None:
            await self._changed.wait()
