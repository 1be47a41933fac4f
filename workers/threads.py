"""Handlers that are no coroutines, in threads of the worker.

A thread cannot be ended from outside, so an attempt is not over while its thread runs: `in_thread` returns only then,
also when it was cancelled. The threads are daemons: a stop whose limit has passed leaves them behind, and the process
ends with them.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from contextvars import ContextVar, copy_context
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")

worker_loop: ContextVar[asyncio.AbstractEventLoop] = ContextVar("pgbridge_loop")
"""In a handler, and in threads that it starts with its context as `asyncio.to_thread` does, the loop of the worker."""


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Calls the function in a thread of its own, with the context variables of the caller.

    One that is cancelled raises CancelledError once the function has ended, whatever it returned or raised.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    context = copy_context()

    def tell(set_outcome: Callable[[Any], None], outcome: object) -> None:
        # The loop is closed where the worker has stopped without us.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(set_outcome, outcome)

    def call() -> None:
        try:
            result = context.run(function, *args)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it goes to whoever awaits
            # A future cannot raise StopIteration, and sys.exit() in a thread is not the process' end.
            fits = isinstance(error, Exception) and not isinstance(error, StopIteration)
            tell(done.set_exception, error if fits else RuntimeError(f"the handler raised {error!r}"))
        else:
            tell(done.set_result, result)

    Thread(target=call, name=getattr(function, "__qualname__", "handler"), daemon=True).start()
    cancelled = False
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        done.exception()
        raise asyncio.CancelledError
    return done.result()


def await_in_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """In a thread of a handler: awaits something in the worker's loop. Raises RuntimeError elsewhere."""
    loop = worker_loop.get(None)
    if loop is None or loop is _running_loop():
        coroutine.close()
        raise RuntimeError("only a thread of a handler may do this; in a coroutine write `async with`")
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
