"""Where one event is, as the database knows it: in the log, before and behind the sinks, and with the workers."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeVar

from psycopg.rows import class_row

from bridge.postgres.connection import database_errors
from bridge.postgres.scheduled import Scheduled, find_scheduled
from bridge.postgres.wire import Connection

_CHUNK: Final = 100_000
"""Rows of the log that one statement looks through: some tens of milliseconds."""


R = TypeVar("R")

Progress = Callable[[int], None]
"""Hears the number down to which the log has been looked through."""


@dataclass(frozen=True, slots=True)
class Logged:
    """An event of the log, without its payload."""

    id: int
    """Its number."""
    event_id: str
    topic: str
    key: str | None
    content_type: str
    bytes: int
    """Of the payload."""
    recorded_at: datetime


@dataclass(frozen=True, slots=True)
class AtSink:
    """How a sink stands to the event; see `bridge.event_positions` for `state`."""

    bridge: str
    sink: str
    """Empty for the position that finds events without a route."""
    state: str
    mark: int
    """How far the sink is."""
    leads: bool
    problem: str | None
    paused_since: datetime | None
    paused_by: str | None
    paused_why: str | None

    @property
    def meaning(self) -> str | None:
        """What the state means, where its name does not say it."""
        return _MEANINGS.get(self.state)


_MEANINGS: Final = {
    "settled": "the broker has confirmed it, or a person has taken its dead letter or moved the position",
    "held": "the broker refused it for now, or what is before it in its key",
    "in a gap": "it was committed late, and is about to be read",
}


@dataclass(frozen=True, slots=True)
class DeadRow:
    """A dead letter of the outbox."""

    id: str
    bridge: str
    sink: str | None
    sequence: int
    topic: str
    key: str | None
    code: str
    reason: str
    attempts: int
    failed_at: datetime


@dataclass(frozen=True, slots=True)
class AtWorker:
    """What a worker's inbox knows of the event; see `bridge.event_inbox` for `state`."""

    worker: str
    state: str
    attempts: int
    started_at: datetime
    finished_at: datetime | None
    due_at: datetime | None
    ended_at: datetime | None
    claimed_by: str | None
    failure: dict[str, Any] | None
    result: dict[str, Any] | None
    effects: dict[str, dict[str, Any]]
    held_key: str | None


@dataclass(frozen=True, slots=True)
class Action:
    """What a person did with a dead letter of the event."""

    letter: str
    action: str
    code: str | None
    why: str
    person: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Everything that the database knows of one event."""

    event_id: str
    scheduled: Scheduled | None
    """While it waits for its time; the log does not have it then."""
    logged: Logged | None
    """None where it is not in the log: it never was, or is pruned."""
    sinks: list[AtSink]
    dead_letters: list[DeadRow]
    workers: list[AtWorker]
    actions: list[Action]

    @property
    def is_known(self) -> bool:
        """Whether there is any trace of it."""
        return bool(self.scheduled or self.logged or self.dead_letters or self.workers or self.actions)


async def whereabouts(
    connection: Connection, event_id: str, number: int | None, progress: Progress, most: int | None = None
) -> Whereabouts:
    """What is known of an event; `number` is its place in the log where that is known, and else it is looked for as by
    `find`.

    Raises DatabaseUnavailableError, PrivilegeError, SchemaError.
    """
    dead = await _all(
        connection, DeadRow,
        "select 'outbox:' || id as id, bridge, sink, sequence, topic, key, code, reason, attempts, "
        "bridge.calendar_time(failed_at) as failed_at from bridge.dead_letter "
        "where bridge = any(array(select distinct name from bridge.cursor)) and event_id = %s::uuid order by id",
        event_id,
    )  # fmt: skip
    scheduled = None
    if number is None and dead:
        number = dead[0].sequence
    if number is None:
        scheduled = await find_scheduled(connection, event_id)
    if number is None and scheduled is None:
        number = await find(connection, event_id, progress, most)
    logged = None if number is None else await in_log(connection, number)
    sinks: list[AtSink] = []
    if logged is not None:
        sinks = await _all(
            connection, AtSink,
            "select bridge, sink, state, mark, leads, problem, paused_since, paused_by, paused_why "
            "from bridge.event_positions(%s, %s)",
            logged.id, logged.topic,
        )  # fmt: skip
    workers = await _all(
        connection, AtWorker,
        "select worker, state, attempts, started_at, finished_at, due_at, ended_at, claimed_by, failure, result, "
        "effects, held_key from bridge.event_inbox(%s::uuid)",
        event_id,
    )  # fmt: skip
    actions = await _all(
        connection, Action,
        "select letter, action, code, why, person, at from bridge.dead_letter_audit where event_id = %s::uuid "
        "order by id",
        event_id,
    )  # fmt: skip
    return Whereabouts(event_id, scheduled, logged, sinks, dead, workers, actions)


async def in_log(connection: Connection, number: int) -> Logged | None:
    """The event with this number; None where there is none. Raises as `whereabouts`."""
    found = await _all(
        connection, Logged,
        "select id, event_id::text as event_id, topic, key, content_type, bytes, recorded_at "
        "from bridge.event_in_log(%s)",
        number,
    )  # fmt: skip
    return found[0] if found else None


async def find(connection: Connection, event_id: str, progress: Progress, most: int | None = None) -> int | None:
    """The number of an event in the log, which is looked through from its end: all of it, or with `most` as many events
    of it, in parts of 100,000. `progress` hears how far that is. Raises as `whereabouts`."""
    before: int | None = 2**63 - 1
    parts: Iterable[int] = itertools.count() if most is None else range(-(-most // _CHUNK))
    for _ in parts:
        if before is None:
            break
        with database_errors():
            cursor = await connection.execute(
                "select id, next_before from bridge.find_event(%s::uuid, %s, %s)", (event_id, before, _CHUNK)
            )
            [(number, before)] = await cursor.fetchall()
        if number is not None:
            return int(number)
        if before is not None:
            progress(before)
    return None


async def _all(connection: Connection, kind: type[R], query: str, *values: object) -> list[R]:
    with database_errors():
        async with connection.cursor(row_factory=class_row(kind)) as cursor:
            await cursor.execute(query, values)
            return await cursor.fetchall()
