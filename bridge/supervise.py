"""Running tasks side by side, and telling what ended them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from bridge.errors import PgbridgeError


@asynccontextmanager
async def background(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs these beside the body, and cancels them when it ends. A failure of one ends the body.

    Raises the failures as an ExceptionGroup; `one_error` makes one of them.
    """
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
        yield
        for task in tasks:
            task.cancel()


@contextmanager
def one_error() -> Iterator[None]:
    """Turns a group of which every error is ours into the first of them; any other group is a bug and stays whole."""
    try:
        yield
    except BaseExceptionGroup as group:
        leaves = list(_leaves(group))
        if all(isinstance(leaf, PgbridgeError) for leaf in leaves):
            raise leaves[0] from group
        raise


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


async def unless_stopped(
    stop: asyncio.Event, work: Coroutine[Any, Any, None], *, obeys: Callable[[], bool] = lambda: False
) -> None:
    """Does the work, and cancels it when `stop` is set. Work that `obeys()` looks at `stop` itself and may finish."""
    stopping = asyncio.ensure_future(stop.wait())
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait((stopping, working), return_when=asyncio.FIRST_COMPLETED)
        if working.done() or obeys():
            await working
    finally:
        stopping.cancel()
        working.cancel()
        await asyncio.gather(stopping, working, return_exceptions=True)
