"""Sending one event, and watching events pass."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping

from bridge.event import Event, matches
from bridge.postgres.connection import connect, database_errors
from bridge.settings import PostgresSettings
from bridge.sources.log import LogReader, Position

_TAIL_POLL = 0.2
"""Seconds between two looks; a person watches."""


async def emit(
    settings: PostgresSettings, topic: str, payload: str, key: str | None, headers: Mapping[str, str]
) -> str:
    """Emits one event and returns its id; a payload that is JSON is sent as such, any other as text.

    Raises DatabaseUnavailableError, PrivilegeError, SchemaError, RefusedError.
    """
    kind = "json" if _is_json(payload) else "text"
    connection = await connect(settings, "pgbridge emit")
    async with connection:
        with database_errors():
            cursor = await connection.execute(
                f"select bridge.emit(%s::text, %s::{kind}, %s::text, %s::jsonb)::text",
                (topic, payload, key, json.dumps(dict(headers))),
            )
            row = await cursor.fetchone()
    assert row is not None  # noqa: S101 - a function call gives one row
    return str(row[0])


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


async def tail(settings: PostgresSettings, name: str, topics: tuple[str, ...]) -> AsyncIterator[Event]:
    """Events from now on, as they are committed, without consuming them. `topics`: patterns; none means all.

    Raises DatabaseUnavailableError, PrivilegeError, SchemaError.
    """
    connection = await connect(settings, "pgbridge tail", options="-c timezone=UTC")
    async with connection:
        reader = LogReader(connection, name, page_size=500, page_bytes=8_000_000)
        ((last,),) = await reader.fetch_all("select coalesce(max(id), 0) from bridge.outbox", ())
        reader.start(Position(last, ()), None)
        while True:
            events, _, _ = await reader.read()
            for event in events:
                if not topics or any(matches(pattern, event.topic) for pattern in topics):
                    yield event
            if not events:
                await reader.close_gaps()
                await asyncio.sleep(_TAIL_POLL)
