"""`pgbridge emit`: sends one event. `pgbridge tail`: shows events as they are committed."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final

import click
import psycopg

from bridge.errors import UsageError
from bridge.event import Event
from bridge.postgres.connection import connect, database_errors
from bridge.postgres.pooler import require_own_session
from bridge.process.tasks import run
from bridge.process.terminal import (
    Due,
    config_option,
    exit_codes,
    heading,
    json_option,
    moment,
    named_values,
    print_json,
    topic_option,
)
from bridge.process.visible import one_line
from bridge.settings import PostgresSettings, load
from bridge.sources.log import LogReader, Position, Reader, fetch_all

_TAIL_POLL: Final = 0.2
"""Seconds between two looks, short enough for a person who watches."""


async def emit_event(
    settings: PostgresSettings,
    topic: str,
    payload: str,
    key: str | None,
    headers: Mapping[str, str],
    at: datetime | None = None,
) -> str:
    """Emits one event, not to be sent before `at`, and returns its id; a payload that is JSON is sent as such, any
    other as text.

    Raises UsageError for what `bridge.emit()` does not take, and what `connect` and `translated` raise.
    """
    kind = "json" if _is_json(payload) else "text"
    connection = await connect(settings, "pgbridge emit")
    async with connection:
        with database_errors(), _refused_words():
            cursor = await connection.execute(
                f"select bridge.emit(%s::text, %s::{kind}, %s::timestamptz, %s::jsonb, %s::text)::text",
                (topic, payload, at, json.dumps(dict(headers)), key),
            )
            [(event_id,)] = await cursor.fetchall()
    return str(event_id)


@contextmanager
def _refused_words() -> Iterator[None]:
    """What the function says of its arguments is about the command line, and not about the server."""
    try:
        yield
    except (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ReservedName) as error:
        sentences = [error.diag.message_primary or str(error), error.diag.message_hint]
        raise UsageError(". ".join(sentence for sentence in sentences if sentence)) from error
    except UnicodeError as error:
        raise UsageError("topic, payload, key and headers must be UTF-8") from error


def _is_json(text: str) -> bool:
    def no_json(constant: str) -> None:
        raise ValueError(constant)

    try:
        # Python's reader takes NaN and Infinity, which are not JSON.
        json.loads(text, parse_constant=no_json)
    except (ValueError, RecursionError):
        return False
    return True


async def tail_events(settings: PostgresSettings, name: str, topics: tuple[str, ...]) -> AsyncIterator[Event]:
    """Events from now on, as they are committed, without consuming them. `topics`: patterns; none means all.

    Raises what `connect` and `translated` raise.
    """
    connection = await connect(settings, "pgbridge tail")
    async with connection:
        await require_own_session(connection, settings, "pgbridge tail")
        reader = LogReader(connection, name, Reader("tail", topics or ("#",)), page_size=500, page_bytes=8_000_000)
        ((last,),) = await fetch_all(connection, "select coalesce(max(id), 0) from bridge.outbox", ())
        reader.start(Position(last, ()), None)
        while True:
            look = await reader.read()
            for event in look.events:
                yield event
            if not look.rows:
                await reader.close_gaps()
                await asyncio.sleep(_TAIL_POLL)


@click.command()
@click.argument("topic")
@click.argument("payload")
@click.option("--key", help="Events with one key are published in order.")
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="A header of your own; may be repeated.")
@click.option("--at", type=Due(), help='Not before then: "2026-02-03 14:05", or in "2h".')
@config_option
@exit_codes
def emit(
    topic: str, payload: str, key: str | None, headers: tuple[str, ...], at: datetime | None, config: Path | None
) -> None:
    """Sends one event to TOPIC and prints its id. PAYLOAD is JSON or text; `-` reads it from standard input.

    With --at it waits in the database until then; `pgbridge scheduled cancel` takes it back.
    """
    pairs = named_values("--header", headers)
    with _refused_words():
        text = sys.stdin.read() if payload == "-" else payload
    click.echo(run(emit_event(load(config).postgres, topic, text, key, pairs, at)))


@click.command()
@topic_option
@config_option
@json_option
@exit_codes
def tail(topics: tuple[str, ...], config: Path | None, as_json: bool) -> None:
    """Shows events as they are committed, without consuming them. Ends with Ctrl-C."""
    settings = load(config)

    async def watch() -> None:
        async for event in tail_events(settings.postgres, settings.name, topics):
            if as_json:
                print_json(event._asdict() | {"payload": event.payload.decode(), "headers": dict(event.headers)})
            else:
                click.echo(_as_line(event))

    try:
        run(watch())
    except KeyboardInterrupt:
        sys.exit(130)


def _as_line(event: Event) -> str:
    key = f" [{one_line(event.key)}]" if event.key is not None else ""
    return f"{moment(event.time, exact=True)} {heading(event.topic)}{key} {one_line(event.payload.decode())}"
