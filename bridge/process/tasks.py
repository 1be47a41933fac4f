"""The event loop of a process, tasks beside each other, and the signals that stop them."""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, TypeVar

import structlog
import uvloop

from bridge.errors import PgbridgeError
from bridge.process.systemd import is_reloading, reloading, stopping

log = structlog.get_logger()

T = TypeVar("T")

_YOUNG: Final = 50_000
"""New objects between two collections of the youngest. The default, 700, has every page of events walked again and
again, although counting references frees them: a tenth of the bridge's time and more."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs it to its end, on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def run_daemon(work: Coroutine[Any, Any, None]) -> None:
    """As `run`, in a process that lives long: what was loaded until now is never looked at again as garbage.

    After a stop by SIGHUP (`stop_on_signals`) the process begins anew: the same command, under the same number.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, *gc.get_threshold()[1:])
    run(work)
    if is_reloading():
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - our own command


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


def is_cancelled() -> bool:
    """Whether this task was asked to end. Not to be asked in a task in which a TaskGroup has failed: before Python 3.13
    such a group may leave its own request standing."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def raise_if_cancelled() -> None:
    """For loops that come back from errors. Raises CancelledError where this task was asked to end, and that was lost:
    before Python 3.12 `asyncio.wait_for`, which clients of brokers use, forgets a request that comes with its result.
    """
    if is_cancelled():
        raise asyncio.CancelledError


async def in_own_task(work: Coroutine[Any, Any, T]) -> T:
    """Does the work, for a loop that comes back from its errors, and whose end is not lost when it comes with one.

    Before Python 3.13 a TaskGroup with failures forgets that the task around it was asked to end.
    """
    try:
        return await asyncio.ensure_future(work)
    except Exception:
        raise_if_cancelled()
        raise


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


async def unless_stopped(
    stop: asyncio.Event, work: Coroutine[Any, Any, None], *, obeys: asyncio.Event | None = None
) -> None:
    """Does the work, and cancels it when `stop` is set. Once `obeys` is set, the work ends by itself after a stop."""
    stopping = asyncio.ensure_future(stop.wait())
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait((stopping, working), return_when=asyncio.FIRST_COMPLETED)
        if working.done() or (obeys is not None and obeys.is_set()):
            await working
    finally:
        stopping.cancel()
        working.cancel()
        await asyncio.gather(stopping, working, return_exceptions=True)


def stop_on_signals(process: str, load: Callable[[], object]) -> asyncio.Event:
    """An event that SIGTERM and SIGINT set; a second signal ends the process at once. SIGHUP sets it too, where `load`
    finds nothing wrong with the settings, and then the process begins anew with them.

    `process` is the first word of the log's actions, as in ``bridge.stopping``.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _asked_to_stop, number, process, stop)
    loop.add_signal_handler(signal.SIGHUP, _asked_to_begin_anew, process, stop, load)
    return stop


def _asked_to_begin_anew(process: str, stop: asyncio.Event, load: Callable[[], object]) -> None:
    if stop.is_set():
        return
    try:
        load()
    except PgbridgeError as error:
        log.warning(f"{process}.settings_refused", reason=str(error), hint="it goes on with those that it has")
        return
    log.info(f"{process}.reloading")
    reloading()
    stop.set()


def _asked_to_stop(number: signal.Signals, process: str, stop: asyncio.Event) -> None:
    if stop.is_set():
        log.warning(f"{process}.stopped_at_once", signal=number.name)
        # This loses nothing: what is not settled comes again, from the log at the next start or from the broker.
        os._exit(128 + number)
    log.info(f"{process}.stopping", signal=number.name)
    stopping()
    stop.set()
