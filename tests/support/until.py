"""Waiting for what a test expects to happen: a condition, in this process or outside it, or the rows of a query."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from tests.support.messages import execute

LIMIT: Final = 30.0
"""Seconds after which what was waited for counts as never coming."""

_LOOK_INTERVAL: Final = 0.01
"""Seconds between two looks."""


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str = "", limit: float = LIMIT) -> None:
    """Waits until the condition holds. Fails the test after `limit` seconds, saying what was waited for."""
    async with _at_most(limit, lambda: f"did not happen within {limit:g} s: {what or condition}"):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(_LOOK_INTERVAL)


async def rows_become(dsn: str, query: str, wanted: list[tuple[Any, ...]], limit: float = LIMIT) -> None:
    """Waits until a query gives these rows. Fails the test after `limit` seconds, saying what it gives."""
    rows: list[tuple[object, ...]] = []
    async with _at_most(limit, lambda: f"{query}\ngives {rows}, not {wanted}"):
        while (rows := await execute(dsn, query)) != wanted:
            await asyncio.sleep(_LOOK_INTERVAL)


@asynccontextmanager
async def _at_most(limit: float, complaint: Callable[[], str]) -> AsyncIterator[None]:
    """Fails the test with this complaint when the block takes longer, be it in a look that never returns."""
    try:
        async with asyncio.timeout(limit) as timer:
            yield
    except TimeoutError:
        assert not timer.expired(), complaint()
        raise
