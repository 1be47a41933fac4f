"""What the consumers beside our worker do for each message so that it is handled once, over a pool of their own.

A row is inserted before the handler, and marked as finished after it, by one statement and so one commit each; a reply
is called by the statement that marks. Everything is prepared, and the pool is as large as our worker's.
"""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, LiteralString

from psycopg import AsyncConnection
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool

PREFETCH: Final = 64
CONCURRENCY: Final = 32
"""Handlers that run at once; our worker's settings have the same."""
WORKER: Final = "bench"

_CLAIM: Final = "insert into bench.inbox (worker, event_id) values (%s, %s) on conflict do nothing"
_FINISH: Final = (
    "update bench.inbox set finished_at = clock_timestamp() where worker = %s and event_id = %s and finished_at is null"
)
_FINISH_AND_REPLY: Final = f"with ours as ({_FINISH} returning event_id) select bench.reply(event_id, %s) from ours"


class Inserts:
    """The rows of one consumer."""

    def __init__(self, pool: AsyncConnectionPool[AsyncConnection[TupleRow]]) -> None:
        self._pool = pool

    async def claim(self, event_id: str) -> bool:
        """False for an event that is claimed already."""
        return await self._execute(_CLAIM, WORKER, event_id) == 1

    async def finish(self, event_id: str, result: dict[str, Any] | None) -> None:
        """Marks the event as finished; hands a result to the reply, in the same transaction."""
        if result is None:
            await self._execute(_FINISH, WORKER, event_id)
        else:
            await self._execute(_FINISH_AND_REPLY, WORKER, event_id, json.dumps(result))

    async def _execute(self, query: LiteralString, *parameters: str) -> int:
        async with self._pool.connection() as connection:
            return (await connection.execute(query, parameters, prepare=True)).rowcount


@asynccontextmanager
async def inserts(dsn: str) -> AsyncIterator[Inserts]:
    """With every connection open, since that is not what is measured."""
    size = CONCURRENCY + 2
    async with AsyncConnectionPool(dsn, min_size=size, max_size=size, kwargs={"autocommit": True}) as pool:
        await pool.wait()
        yield Inserts(pool)


async def handle(reply: bool) -> dict[str, Any] | None:
    """The handler."""
    return {"ok": True} if reply else None


async def until_sigterm() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
