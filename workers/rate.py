"""When the handlers of a worker with a rate may begin; its SQL is in ``0013_rates.sql``.

PostgreSQL hands the starts out, evenly spaced, to all processes of the worker, and by its own clock. A process reserves
only what somebody waits for, and only what begins soon: it takes little with it when it dies.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, LiteralString, Protocol

from psycopg.rows import TupleRow

from bridge.process.batching import Batcher
from bridge.process.outage import Outage

HORIZON: Final = 0.5
"""Seconds ahead that starts are reserved: enough for a slow query, and all that a process which dies takes with it."""

LATE: Final = 0.1
"""Seconds after its time until which a start may be used; at less than one a second: part of the time between two.
Beyond that the process stood still, and what has piled up meanwhile would begin at once."""

_TOGETHER: Final = 1000
"""Most starts in one query."""


class Query(Protocol):
    """Runs a statement that commits by itself, and gives its rows. Raises PgbridgeError."""

    async def __call__(self, query: LiteralString, *parameters: object) -> Sequence[TupleRow]: ...


@dataclass(frozen=True, slots=True)
class _Turn:
    at: float
    """By the loop's clock."""
    reserved: bool
    """Whether the caller may begin then; else it may ask again."""


class Rate:
    """One process's side of a worker's rate; shared by its concurrent tasks."""

    def __init__(self, worker: str, per_second: float, query: Query, database: Outage) -> None:
        """`per_second`: starts a second over all processes. Another one holds from the first query that brings it."""
        self._worker = worker
        self._per_second = per_second
        self._late = LATE / min(per_second, 1.0)
        self._query = query
        self._database = database
        self._turns: Batcher[None, _Turn] = Batcher(self._take, _TOGETHER)

    async def wait(self) -> None:
        """Returns when the caller may begin, which it should do at once. Waits for the database where it is gone.

        Whoever is cancelled leaves at most one start unused, which lies within `HORIZON` seconds.
        """
        # Not for ever: a process that is always late would never begin.
        may_be_late = False
        while True:
            turn = await self._database.outlast(self._turns.ask, None)
            await asyncio.sleep(turn.at - _now())
            if not turn.reserved:
                continue
            if may_be_late or _now() <= turn.at + self._late:
                return
            may_be_late = True

    async def _take(self, wanted: Sequence[None]) -> Sequence[_Turn]:
        rows = await self._query(
            "select seconds, reserved from bridge.rate_take(%s, %s, %s, %s)",
            self._worker,
            len(wanted),
            self._per_second,
            HORIZON,
        )
        now = _now()
        return [_Turn(now + seconds, reserved) for seconds, reserved in rows]


def _now() -> float:
    return asyncio.get_running_loop().time()
