"""The dead letters of the outbox, rows of `bridge.dead_letter`: reading, discarding and publishing them again.

A replay goes straight to the sink that had refused the letter, and not through the log: other sinks and other bridges
have the event already.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from bridge.brokers.contract import Letter
from bridge.commands.republish import Pace, open_sinks, republish
from bridge.errors import UsageError
from bridge.event import Event, read_headers
from bridge.postgres.connection import database_errors
from bridge.postgres.wire import Connection
from bridge.routes import Routes
from bridge.settings import Settings
from bridge.sources import DeadLetter

OUTBOX: Final = "outbox"
"""The box of these letters, and what their ids begin with; every other box is a worker's."""

Report = Callable[[Letter, str | None], None]
"""Gets each letter that was acted on, and why a replay was refused; None when nothing was."""

_COLUMNS: Final = (
    "select id, event_id::text, topic, key, sink, code, reason, attempts, bridge.calendar_time(failed_at), "
    "content_type, bridge.calendar_time(created_at), bridge.header_texts(headers), {payload} "
    "from bridge.dead_letter where {which} order by id"
)
_LIST: Final = _COLUMNS.format(payload="null::bytea", which="bridge = %s")
_NEWEST: Final = f"{_LIST} desc limit %s"
_READ: Final = _COLUMNS.format(payload="convert_to(payload, 'UTF8')", which="bridge = %s and id = any(%s)")


async def list_letters(connection: Connection, name: str, newest: int | None = None) -> list[Letter]:
    """Every dead letter of the bridge `name`, or as many of the `newest`, oldest first, without payloads."""
    if newest is None:
        return await _fetch(connection, _LIST, name)
    return (await _fetch(connection, _NEWEST, name, newest))[::-1]


async def read_letters(connection: Connection, name: str, ids: Sequence[str]) -> list[Letter]:
    """The letters with these ids, with payloads; those that are gone are left out.

    Raises UsageError for what is not such an id.
    """
    return await _fetch(connection, _READ, name, [row_id(id_) for id_ in ids])


def row_id(id_: str) -> int:
    """The row's id in ``outbox:<number>``. Raises UsageError."""
    box, _, digits = id_.partition(":")
    if box != OUTBOX or not digits.isdecimal():
        raise UsageError(f"{id_!r} is not the id of a dead letter of the outbox, which looks like {OUTBOX}:12")
    return int(digits)


async def _fetch(connection: Connection, query: str, *values: object) -> list[Letter]:
    with database_errors():
        cursor = await connection.execute(query, values)
        rows = await cursor.fetchall()
    return [
        Letter(
            id=f"{OUTBOX}:{row[0]}",
            box=OUTBOX,
            event_id=row[1],
            topic=row[2],
            key=row[3],
            sink=row[4],
            code=row[5],
            reason=row[6],
            attempts=row[7],
            failed_at=row[8],
            content_type=row[9],
            created_at=row[10],
            headers=dict(read_headers(row[11])),
            payload=row[12],
        )
        for row in rows
    ]


async def discard_letters(connection: Connection, letters: Sequence[Letter], person: str, why: str) -> None:
    """Deletes them, with an audit. Raises what `translated` raises."""
    await _end(connection, letters, "discarded", person, why)


async def replay_letters(
    settings: Settings,
    connection: Connection,
    letters: Sequence[Letter],
    pace: Pace,
    person: str,
    *,
    report: Report,
    stop: asyncio.Event,
) -> None:
    """Publishes them again: the table loses those that are confirmed, with an audit, and the others get the new reason.

    A letter that no route had taken goes where today's routes say. Raises UsageError for a letter whose sink is no
    longer in the settings, and what sinks and database raise.
    """
    sinks = {letter.sink for letter in letters}
    if unknown := sorted(sink for sink in sinks if sink is not None and sink not in settings.sinks):
        raise UsageError(
            f"letters were refused by the sinks {', '.join(unknown)}, which are not in the settings. "
            "Name the sink there again, choose others with --sink, or discard them"
        )
    for sink in sorted(sinks, key=lambda name: name or ""):
        if stop.is_set():
            return
        of_sink = {letter.id: letter for letter in letters if letter.sink == sink}
        routes = Routes([("#", sink)]) if sink else Routes([(route.topic, route.sink) for route in settings.routes])

        async def settled(
            events: Sequence[Event], refused: Sequence[DeadLetter], of_sink: dict[str, Letter] = of_sink
        ) -> None:
            await _settle(connection, of_sink, events, refused, person, report)

        async with open_sinks(settings, [sink] if sink else settings.sinks) as opened:
            pages = _pages(settings.name, connection, list(of_sink), pace.chunk)
            await republish(settings, opened, routes, pages, pace, settled, stop)


async def _settle(
    connection: Connection,
    letters: dict[str, Letter],
    events: Sequence[Event],
    refused: Sequence[DeadLetter],
    person: str,
    report: Report,
) -> None:
    again = {f"{OUTBOX}:{letter.event.sequence}": letter for letter in refused}
    for id_, letter in again.items():
        with database_errors():
            await connection.execute(
                "select bridge.refuse_dead_letter(%s, %s, %s, %s)",
                (row_id(id_), letter.failure.code, letter.failure.reason, max(1, letter.attempts)),
            )
    gone = [letters[f"{OUTBOX}:{event.sequence}"] for event in events if f"{OUTBOX}:{event.sequence}" not in again]
    await _end(connection, gone, "replayed", person, "")
    for event in events:
        id_ = f"{OUTBOX}:{event.sequence}"
        report(letters[id_], again[id_].failure.reason if id_ in again else None)


async def _end(connection: Connection, letters: Sequence[Letter], action: str, person: str, why: str) -> None:
    with database_errors():
        await connection.execute(
            "select bridge.end_dead_letters(%s, %s, %s, %s)",
            ([row_id(letter.id) for letter in letters], action, person, why),
        )


async def _pages(name: str, connection: Connection, ids: Sequence[str], chunk: int) -> AsyncIterator[Sequence[Event]]:
    source = f"/{connection.info.dbname}/{name}"
    for start in range(0, len(ids), chunk):
        letters = await read_letters(connection, name, ids[start : start + chunk])
        yield [
            Event(
                id=letter.event_id or "",
                topic=letter.topic or "",
                payload=letter.payload or b"",
                key=letter.key,
                source=source,
                time=letter.created_at,  # type: ignore[arg-type]  # the table's columns are not null
                content_type=letter.content_type or "",
                headers=letter.headers,
                # Tells the letters apart on their way: one event may have several, of different sinks.
                sequence=row_id(letter.id),
            )
            for letter in letters
        ]
