"""How long a broker has said nothing of what was published to it; for sinks that end a connection for its silence."""

import asyncio
from typing import Final

LOOK_INTERVAL: Final = 0.1
"""Seconds between two looks."""

STALLED: Final = 1.0
"""Seconds of silence after which a sink says that it is stalled."""

_TURNS: Final = 5
_TURN: Final = 0.01
"""Seconds of each turn of the loop in which what has arrived is read before a silence is believed."""


class Silence:
    """Counts looks, not the time between them: while this process is stopped, or its loop is blocked, answers may
    arrive that it cannot read, so that time says nothing of the broker.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        """Since the last answer, or since something was first sent that waits for one."""

    def end(self) -> None:
        """The broker answered, or nothing had been waiting for it until now."""
        self.seconds = 0.0

    async def look(self) -> None:
        """Waits until the next look, and counts it. Whoever judges the silence calls this in a loop."""
        await asyncio.sleep(LOOK_INTERVAL)
        self.seconds += LOOK_INTERVAL

    async def reaches(self, limit: float) -> bool:
        """Whether it has lasted for `limit` seconds, and still lasts once all that has arrived was read."""
        if self.seconds < limit:
            return False
        await read_what_arrived()
        return self.seconds >= limit


async def read_what_arrived() -> None:
    """Lets the loop read: after this process stood still, a look may come before the bytes that wait in its sockets."""
    for _ in range(_TURNS):
        await asyncio.sleep(_TURN)
