"""Waiting for what a test expects to happen: a condition in this process, or the rows of a query."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

from tests.support.messages import execute

LIMIT: Final = 30.0
"""Seconds after which what was waited for counts as never coming."""

_LOOK_INTERVAL: Final = 0.01
"""Seconds between two looks."""


async def until(condition: Callable[[], bool], what: str = "", limit: float = LIMIT) -> None:
    """Waits until the condition holds. Fails the test after `limit` seconds, saying what was waited for."""
    deadline = asyncio.get_running_loop().time() + limit
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"did not happen within {limit:g} s: {what or condition}"
        await asyncio.sleep(_LOOK_INTERVAL)


async def rows_become(dsn: str, query: str, wanted: list[tuple[Any, ...]], limit: float = LIMIT) -> None:
    """Waits until a query gives these rows. Fails the test after `limit` seconds, saying what it gives."""
    deadline = asyncio.get_running_loop().time() + limit
    while (rows := await execute(dsn, query)) != wanted:
        assert asyncio.get_running_loop().time() < deadline, f"{query}\ngives {rows}, not {wanted}"
        await asyncio.sleep(_LOOK_INTERVAL)
