"""Everything that connects to a broker, and the one answer that it must give to one mistake."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import pytest

from bridge.brokers.contract import Letter, Queue, Sink, Subscription, Verdict
from bridge.brokers.registry import broker_of
from bridge.errors import PgbridgeError
from bridge.settings import SinkSettings
from tests.support.until import LIMIT

SECRET: Final = "hunter2"
SINK: Final = "mine"
"""The name of the sink whose settings these tests make, as in ``[sinks.mine]``."""

Use = Callable[[], Awaitable[Any]]


async def keep(letter: Letter) -> Verdict:
    """Decides nothing: for a walk through dead letters that only looks."""
    return "keep"


def everything_that_connects(settings: SinkSettings, worker: str = "shop", *, apply: bool = False) -> dict[str, Use]:
    """By name. What is opened is closed again; `apply` is for the topology of sink and queue."""
    broker = broker_of(settings)
    sink = broker.sink(settings)
    queue = broker.queue(settings, Subscription(worker, ["#"], 10, [1.0], max_attempts=3, ack_wait=10.0))
    letters = broker.dead_letters(settings, worker)
    assert letters is not None

    async def open_and_close(user: Sink | Queue) -> None:
        try:
            await user.open()
        finally:
            await user.close()

    return {
        "sink": lambda: open_and_close(sink),
        "sink's topology": lambda: sink.topology(apply=apply),
        "queue": lambda: open_and_close(queue),
        "queue's topology": lambda: queue.topology(apply=apply),
        "dead letters": lambda: letters.walk(keep),
    }


async def all_are_refused(
    uses: dict[str, Use],
    kind: type[PgbridgeError],
    *words: str,
    key: str = "url",
    exactly: bool = True,
    limit: float = LIMIT,
) -> dict[str, str]:
    """Each of them raises this error, soon, for this key, in these words; `exactly`: and no subclass of it.

    Gives what each of them said.
    """
    said_by = {}
    for name, use in uses.items():
        with pytest.raises(PgbridgeError) as caught:
            await asyncio.wait_for(use(), limit)
        said = said_by[name] = str(caught.value)
        assert isinstance(caught.value, kind), f"{name}: {caught.value!r}"
        assert not exactly or type(caught.value) is kind, f"{name}: {caught.value!r}"
        assert said.startswith(f"sinks.{SINK}.{key}: "), f"{name}: {said}"
        assert SECRET not in said
        for word in words:
            assert word in said, f"{name}: {said}"
    return said_by
