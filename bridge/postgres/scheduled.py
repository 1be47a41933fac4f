"""Events that wait for their time, as a person looks at them. Moving them is `bridge/sources/scheduled.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from psycopg.rows import class_row

from bridge.postgres.connection import database_errors
from bridge.postgres.wire import Connection


@dataclass(frozen=True, slots=True)
class Scheduled:
    """An event that waits for its time, without its payload."""

    event_id: str
    at: datetime
    """Not before then."""
    topic: str
    key: str | None
    content_type: str
    bytes: int
    """Of the payload."""
    scheduled_at: datetime


_COLUMNS: Final = """
select event_id::text as event_id, bridge.calendar_time(at) as at, topic, key, content_type,
    octet_length(payload)::bigint as bytes, bridge.calendar_time(created_at) as scheduled_at
from bridge.scheduled
"""


async def next_scheduled(connection: Connection, topics: Sequence[str], most: int) -> list[Scheduled]:
    """Those that are due next, `most` of them at most; `topics` are patterns, none means all.

    Raises DatabaseUnavailableError, PrivilegeError, SchemaError.
    """
    async with connection.cursor(row_factory=class_row(Scheduled)) as cursor:
        with database_errors():
            await cursor.execute(
                f"{_COLUMNS} where %s::text[] = '{{}}' or ('.' || topic) ~ bridge.topic_regex(%s) "
                "order by scheduled.at, id limit %s",
                (list(topics), list(topics), most),
            )
            return await cursor.fetchall()


async def find_scheduled(connection: Connection, event_id: str) -> Scheduled | None:
    """The event with this id; None where it does not wait. Raises as `next_scheduled`."""
    async with connection.cursor(row_factory=class_row(Scheduled)) as cursor:
        with database_errors():
            await cursor.execute(f"{_COLUMNS} where event_id = %s", (event_id,))
            return await cursor.fetchone()


async def cancel_scheduled(connection: Connection, event_id: str) -> bool:
    """Takes an event back; False where it does not wait. Raises as `next_scheduled`."""
    with database_errors():
        cursor = await connection.execute("select bridge.cancel(%s)", (event_id,))
        [(cancelled,)] = await cursor.fetchall()
    return bool(cancelled)
