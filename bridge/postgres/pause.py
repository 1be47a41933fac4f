"""That a person has paused a sink or a worker, as `bridge.pause` has it; and pausing and resuming."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from bridge.postgres.connection import DSN_KEY, answered
from bridge.postgres.wire import Connection

REACTION: Final = "within some 3 seconds"
"""When whoever is paused, or goes on, knows it."""

Kind = Literal["sink", "worker"]


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing new is taken until a person says so."""

    since: datetime
    who: str
    why: str
    """Empty where no reason was given."""

    @property
    def words(self) -> str:
        """For logs and `/health`."""
        return f"since {self.since:%Y-%m-%d %H:%M:%S} UTC, by {self.who}{f': {self.why}' if self.why else ''}"


@dataclass(frozen=True, slots=True)
class Pausable:
    """What can be paused."""

    kind: Kind
    bridge: str
    """Empty for a worker."""
    name: str


async def set_pause(connection: Connection, what: Pausable, who: str, why: str, key: str = DSN_KEY) -> bool:
    """Pauses it; False where it is paused, and its reason stays. `why` may be empty.

    Raises DatabaseUnavailableError, PrivilegeError, SchemaError; `key` is the setting that leads there.
    """
    return await _ask(connection, "select bridge.set_pause(%s, %s, %s, %s, %s)", key, what, who, why)


async def end_pause(connection: Connection, what: Pausable, who: str, key: str = DSN_KEY) -> bool:
    """Lets it go on; False where it is not paused. Raises as `set_pause`."""
    return await _ask(connection, "select bridge.end_pause(%s, %s, %s, %s)", key, what, who)


@dataclass(frozen=True, slots=True)
class PauseChange:
    """What a person did, at some time."""

    at: datetime
    what: Pausable
    action: Literal["paused", "resumed"]
    who: str
    why: str


async def pause_changes(connection: Connection, most: int, key: str = DSN_KEY) -> list[PauseChange]:
    """Who paused what and let it go on, the latest first. Raises as `set_pause`."""
    with answered(connection, key):
        cursor = await connection.execute(
            "select at, kind, bridge, name, action, person, why from bridge.pause_audit order by id desc limit %s",
            [most],
        )
        return [
            PauseChange(at, Pausable(kind, bridge, name), action, who, why)
            for at, kind, bridge, name, action, who, why in await cursor.fetchall()
        ]


async def may_pause(connection: Connection, key: str = DSN_KEY) -> bool:
    """Whether this login may: a bridge_operator may, whoever is to look only may not. Raises as `set_pause`."""
    with answered(connection, key):
        cursor = await connection.execute(
            "select has_function_privilege('bridge.set_pause(text, text, text, text, text)', 'execute')"
        )
        [(answer,)] = await cursor.fetchall()
    return bool(answer)


async def _ask(connection: Connection, query: str, key: str, what: Pausable, *more: str) -> bool:
    with answered(connection, key):
        cursor = await connection.execute(query, (what.kind, what.bridge, what.name, *more))
        [(answer,)] = await cursor.fetchall()
    return bool(answer)
