"""Backfills, as `bridge.backfill` has them, and the steps of one: the SQL is in `0026_backfill.sql`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, LiteralString

import psycopg
from psycopg.rows import class_row, dict_row

from bridge.errors import DatabaseUnavailableError, UsageError
from bridge.postgres.connection import silence_limited, translated
from bridge.postgres.wire import Connection

LOCK_LIMIT: Final = "1s"
"""How long a backfill waits for a lock, of the table or of the one row that it waits for, before it looks around."""

_SILENCE_LIMIT: Final = 300.0
"""Seconds that a step may take; a hundred rows of megabytes are one."""

_OURS: Final = (
    psycopg.errors.FeatureNotSupported,
    psycopg.errors.InvalidParameterValue,
    psycopg.errors.InvalidTableDefinition,
    psycopg.errors.ObjectInUse,
    psycopg.errors.ObjectNotInPrerequisiteState,
    psycopg.errors.UndefinedColumn,
)
"""What our SQL raises, with a hint that says what to do."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A backfill that this session may go on with."""

    run: int
    topic: str
    sent: int
    """Rows that it has sent before."""
    about: int
    """Rows of the table when it began, by the planner's estimate."""
    unseen: tuple[str, ...]
    """Operations that the table's watch does not tell of."""
    unkeyed: bool
    """Whether a change of the primary key changes no watched column, and so passes unseen."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one transaction has done."""

    taken: int
    skipped: int
    """Rows that are passed and still to be sent, since somebody had them locked."""
    walked: bool
    """Whether the last row is passed, so that nothing but the skipped is left."""
    finished: bool


@dataclass(frozen=True, slots=True)
class Backlog:
    """How far a sink is behind the end of the log, in ids."""

    bridge: str
    sink: str
    takes: bool
    """Whether it takes the topic that was asked for."""
    behind: int


@dataclass(frozen=True, slots=True)
class Backfill:
    """A backfill, as a person looks at it."""

    run: int
    table: str
    topic: str
    sent: int
    about: int
    skipped: int
    running: bool
    """Whether a process is at it."""
    outcome: str | None
    """``finished``, ``cancelled``, ``restarted``; None while it has not ended."""
    who: str
    role: str
    started_at: datetime
    stored_at: datetime
    ended_at: datetime | None


class BusyError(DatabaseUnavailableError):
    """Somebody holds a lock, or has changed what a step was about to lock. Nothing was done; try again."""


async def begin(connection: Connection, key: str, table: str, topic: str | None, person: str, *, anew: bool) -> Begun:
    """Begins the backfill of a table, or finds the one that has not ended, and locks out others for this session.

    Raises UsageError where there is no such table or it cannot be, PrivilegeError, BusyError while the table is locked,
    and what `translated` gives.
    """
    with _errors(connection, key):
        await connection.execute("select set_config('lock_timeout', %s, false)", (LOCK_LIMIT,))
    relation = await _relation(connection, key, table)
    query = "select run, topic, sent, about, unseen, unkeyed from bridge.begin_backfill(%s, %s, %s, %s)"
    row = await _one(connection, key, query, relation, topic, person, anew)
    return Begun(**{**row, "unseen": tuple(row["unseen"])})


async def chunk(connection: Connection, key: str, run: int, most: int, most_skipped: int) -> Step:
    """Records the next rows, in the order of the primary key. Raises BusyError, UsageError, and as `begin`."""
    query = "select taken, skipped, walked, finished from bridge.backfill_chunk(%s, %s, %s)"
    return Step(**await _one(connection, key, query, run, most, most_skipped))


async def skipped(connection: Connection, key: str, run: int, wait_for: int | None = None) -> Step:
    """Tries the skipped rows again; with `wait_for`, waits for the lock of that one of them. Raises as `chunk`."""
    query = "select taken, skipped, walked, finished from bridge.backfill_skipped(%s, %s)"
    return Step(**await _one(connection, key, query, run, wait_for))


async def sinks_behind(connection: Connection, key: str, topic: str) -> list[Backlog]:
    """How far every sink is, and whether it takes the topic. Raises what `translated` gives."""
    async with connection.cursor(row_factory=class_row(Backlog)) as cursor:
        with _errors(connection, key):
            await cursor.execute("select bridge, sink, takes, behind from bridge.sinks_behind(%s)", (topic,))
            return await cursor.fetchall()


async def backfills(connection: Connection, key: str, most: int) -> list[Backfill]:
    """Those that have not ended, and the last others, `most` in all. Raises what `translated` gives."""
    async with connection.cursor(row_factory=class_row(Backfill)) as cursor:
        with _errors(connection, key):
            await cursor.execute(
                "select b.id as run, format('%%I.%%I', b.schema_name, b.table_name) as table, b.topic, b.sent, "
                "b.about, jsonb_array_length(b.skipped) as skipped, b.ended_at is null and exists ("
                "  select from pg_locks l where l.locktype = 'advisory' and l.granted and l.objsubid = 1"
                "    and l.database = (select d.oid from pg_database d where d.datname = current_database())"
                "    and (l.classid::bigint << 32) + l.objid::bigint = bridge.backfill_lock(b.relation)) as running, "
                "b.outcome, b.who, b.role, b.started_at, b.stored_at, b.ended_at from bridge.backfill b "
                "order by b.ended_at is not null, b.id desc limit %s",
                (most,),
            )
            return await cursor.fetchall()


async def cancel(connection: Connection, key: str, table: str) -> bool:
    """Ends the backfill of a table, also one that a process is at; False where there is none.

    The name is looked for among backfills as well: the table may be gone. Raises what `translated` gives.
    """
    query = (
        "select coalesce(bool_or(bridge.end_backfill(b.schema_name, b.table_name, 'cancelled')), false) as ended "
        "from bridge.backfill b where b.ended_at is null and (b.relation = to_regclass(%s)::oid "
        "or format('%%I.%%I', b.schema_name, b.table_name) = %s)"
    )
    return bool((await _one(connection, key, query, table, table))["ended"])


async def _relation(connection: Connection, key: str, table: str) -> int:
    try:
        row = await _one(connection, key, "select to_regclass(%s)::oid as relation", table)
    except UsageError:
        row = {"relation": None}
    if row["relation"] is None:
        raise UsageError(f"there is no table {table!r}; write schema.table, quoted as in SQL")
    return int(row["relation"])


async def _one(connection: Connection, key: str, query: LiteralString, *values: object) -> dict[str, Any]:
    """The one row of a query."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        with _errors(connection, key):
            await cursor.execute(query, values)
            [row] = await cursor.fetchall()
            return row


@contextmanager
def _errors(connection: Connection, key: str) -> Iterator[None]:
    try:
        with silence_limited(connection, key, _SILENCE_LIMIT):
            yield
    except (
        psycopg.errors.LockNotAvailable,
        psycopg.errors.DeadlockDetected,
        psycopg.errors.SerializationFailure,
    ) as error:
        raise BusyError(f"{key}: PostgreSQL cannot do this now: {error.diag.message_primary}") from error
    except psycopg.errors.InvalidName as error:
        raise UsageError(str(error.diag.message_primary)) from error
    except psycopg.Error as error:
        if isinstance(error, _OURS) and error.diag.message_hint:
            raise UsageError(f"{error.diag.message_primary}. {error.diag.message_hint}") from error
        raise translated(error, key) from error
