"""Who replayed, discarded or released which dead letter, when and why: `bridge.dead_letter_audit`."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from psycopg.rows import class_row

from bridge.postgres.connection import answered
from bridge.postgres.wire import Connection

PAGE: Final = 50
"""Acts of one page."""


@dataclass(frozen=True, slots=True)
class Act:
    """What a person did to one dead letter."""

    id: int
    at: datetime
    letter: str
    """The letter's id: ``outbox:<number>``, or ``<worker>:<event id>``."""
    action: str
    event_id: str | None
    topic: str | None
    code: str | None
    failure: str | None
    """Why it was one."""
    why: str
    person: str
    role: str
    """The login in the database."""


async def acts(connection: Connection, before: int | None = None) -> list[Act]:
    """The newest acts, `PAGE` of them and one more where there are more; those `before` the one with that id.

    Raises what `answered` raises.
    """
    async with connection.cursor(row_factory=class_row(Act)) as cursor:
        with answered(connection):
            await cursor.execute(
                "select id, bridge.calendar_time(at) as at, letter, action, event_id::text, topic, code, failure, why, "
                "person, role from bridge.dead_letter_audit where id < %s order by id desc limit %s",
                (2**63 - 1 if before is None else before, PAGE + 1),
            )
            return await cursor.fetchall()
