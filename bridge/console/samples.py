"""What the workers' samples say of the last five minutes, asked once for all who look."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

from bridge.console.parts import Parts
from bridge.postgres.workers import Lately, lately

SAMPLED: Final = 10.0
"""Seconds for which what samples say is kept; there is one every 15 s."""


async def samples(parts: Parts, names: Sequence[str]) -> Mapping[str, Lately]:
    """Of these workers; without those that have stored none. Raises PgbridgeError."""
    names = tuple(names)
    return await parts.recent.get(("lately", names), SAMPLED, partial(_ask, parts, names))


async def _ask(parts: Parts, names: Sequence[str]) -> dict[str, Lately]:
    async with parts.database.connection() as connection:
        return await lately(connection, names)
