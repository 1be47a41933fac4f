"""Which sinks a person has paused. A paused sink's source gives no page, so its relay drains and its position stays."""

import asyncio
from collections.abc import Mapping

import structlog

from bridge.postgres.pause import Pause

log = structlog.get_logger()


class Pauses:
    """The pauses of one bridge, as the database had them last. It outlives sessions: what was paused stays so while
    nobody can ask."""

    def __init__(self) -> None:
        self.now: Mapping[str, Pause] = {}
        """By sink; replaced whole, so that other threads may read it."""
        self._changed = asyncio.Event()

    def found(self, pauses: Mapping[str, Pause]) -> None:
        """Takes what the database says."""
        before, self.now = self.now, pauses
        for sink in pauses.keys() - before.keys():
            log.warning("sink.paused", sink=sink, reason=pauses[sink].words)
        for sink in before.keys() - pauses.keys():
            log.info("sink.resumed", sink=sink)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def resumed(self, sink: str) -> None:
        """Returns once the sink is not paused."""
        while sink in self.now:
            await self._changed.wait()
