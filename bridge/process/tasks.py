"""The event loop of a process: uvloop, and for daemons a garbage collector that leaves them time to work."""

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import uvloop

T = TypeVar("T")

_YOUNG: Final = 50_000
"""New objects between two collections of the youngest. The default, 700, has every page of events walked again and
again, although counting references frees them: a tenth of the bridge's time and more."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs it to its end."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def run_daemon(work: Coroutine[Any, Any, T]) -> T:
    """As `run`, in a process that lives long: what was loaded until now is never looked at again as garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, *gc.get_threshold()[1:])
    return run(work)
