"""The page Bridges and database: who leads, where each sink is, what endangers the log; and pausing."""

from functools import partial
from typing import Any, Final

from starlette.requests import Request

from bridge.console.access import Person
from bridge.console.parts import Form, Page, Parts
from bridge.console.pausing import pause, resume
from bridge.console.reader import Subject
from bridge.console.topology import topology
from bridge.errors import UsageError
from bridge.postgres.pause import Pausable, PauseChange, pause_changes
from bridge.postgres.problems import (
    held_back_words,
    is_filling,
    is_long,
    is_overdue,
    leader_words,
    queue_words,
    scheduled_words,
    transaction_words,
)
from bridge.postgres.sizes import TableSize, table_sizes
from bridge.postgres.status import SinkPosition, Status, rates

_CHANGES: Final = 20
"""Pauses and resumptions that are shown."""

_SIZED: Final = 30.0
"""Seconds for which the sizes of tables are kept: asking for them takes longer than the rest of the page."""


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    seen = await parts.reader.look(Subject.BRIDGES)
    status = seen.status
    if status is None:
        return {"seen": seen, "bridges": [], "guards": [], "pausable": [], "changes": [], "sizes": []}
    bridges = [
        (
            bridge,
            leader_words(bridge, status),
            [
                (position, rates(seen.before, status, bridge.name, position.sink) if seen.before else None)
                for position in bridge.sinks
            ],
        )
        for bridge in status.bridges
    ]
    guards = [
        ("Oldest transaction", transaction_words(status.guards), is_long(status.guards)),
        ("NOTIFY queue", queue_words(status.guards), is_filling(status.guards)),
        *(("Held back", held_back_words(name), True) for name in status.guards.held_back_by),
    ]
    if status.scheduled.events:
        guards.append(("Scheduled", scheduled_words(status), is_overdue(status.scheduled, status)))
    retention = parts.settings.outbox_or_default.retention
    return {
        "seen": seen,
        "bridges": bridges,
        "guards": guards,
        "retention": retention,
        "pausable": _pausable(parts, status),
        "topology": await topology(parts),
        "changes": [] if seen.outage is not None else await _changes(parts),
        "sizes": [] if seen.outage is not None else await parts.recent.get("sizes", _SIZED, partial(_sizes, parts)),
    }


async def _changes(parts: Parts) -> list[PauseChange]:
    async with parts.database.connection() as connection:
        return await pause_changes(connection, _CHANGES)


async def _sizes(parts: Parts) -> list[TableSize]:
    async with parts.database.connection() as connection:
        return await table_sizes(connection)


def _pausable(parts: Parts, status: Status) -> list[SinkPosition]:
    """Sinks of this bridge that run, and what is paused although the settings do not name it any more."""
    ours = [position for bridge in status.bridges if bridge.name == parts.settings.name for position in bridge.sinks]
    return [at for at in ours if at.sink in parts.settings.sinks or at.paused is not None]


def _sink(parts: Parts, form: Form, *, known: bool) -> Pausable:
    name = form.get("sink", "")
    if known and name not in parts.settings.sinks:
        raise UsageError(f"there is no sink {name!r}; the settings have: {', '.join(parts.settings.sinks) or 'none'}")
    return Pausable("sink", parts.settings.name, name)


async def _pause(parts: Parts, person: Person, form: Form) -> str:
    return await pause(parts, person, _sink(parts, form, known=True), form)


async def _resume(parts: Parts, person: Person, form: Form) -> str:
    # What the settings do not name any more may still be paused.
    return await resume(parts, person, _sink(parts, form, known=False))


PAGE: Final = Page("bridges", "/bridges", "Bridges and database", _show, actions={"pause": _pause, "resume": _resume})
