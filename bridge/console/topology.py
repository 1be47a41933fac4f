"""What the brokers have of what the sinks of the settings need, as the page Bridges and database shows it.

It takes a login at each broker, so it is asked while somebody looks, once a minute at most and once for all who look;
each sink by itself, so that a broker that is gone hides no other. What workers need is left to `pgbridge topology`: one
must import their handlers to know it, which are no code of the console's.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from bridge.brokers.contract import Declaration, Sink
from bridge.brokers.registry import broker_of
from bridge.console.parts import Parts
from bridge.errors import PgbridgeError

_KEPT: Final = 60.0
"""Seconds for which an answer is good."""
_PATIENCE: Final = 1.0
"""Seconds that a page waits for the answer; the next renewal has it."""
_LIMIT: Final = 15.0
"""Seconds that one broker has."""

_WORDS: Final = {"missing": "is missing: pgbridge topology --apply", "differs": "is different"}


@dataclass(frozen=True, slots=True)
class Need:
    """What a sink needs of its broker."""

    sink: str
    declared: Sequence[Declaration] = ()
    problem: str | None = None
    """Why nothing is known."""

    @property
    def wrong(self) -> Sequence[tuple[Declaration, str]]:
        """What is not as it should be, and what to do about it."""
        return [
            (one, _WORDS[one.state] + (f": {one.detail}" if one.detail else ""))
            for one in self.declared
            if one.state in _WORDS
        ]


@dataclass(frozen=True, slots=True)
class Topology:
    """All of it, at one time."""

    at: datetime
    needs: Sequence[Need]


async def topology(parts: Parts) -> Topology | None:
    """What is known; None while the brokers are being asked."""
    asking = parts.recent.get("topology", _KEPT, lambda: _ask(parts))
    try:
        async with asyncio.timeout(_PATIENCE):
            return await asking
    except TimeoutError:
        return None


async def _ask(parts: Parts) -> Topology:
    sinks = {name: broker_of(sink).sink(sink) for name, sink in parts.settings.sinks.items()}
    found = await asyncio.gather(*(_need(name, sink) for name, sink in sinks.items()))
    return Topology(datetime.now(UTC), found)


async def _need(name: str, sink: Sink) -> Need:
    try:
        async with asyncio.timeout(_LIMIT):
            return Need(name, await sink.topology(apply=False))
    except PgbridgeError as error:
        return Need(name, problem=str(error))
    except TimeoutError:
        return Need(name, problem=f"the broker has not answered for {_LIMIT:g} s")
