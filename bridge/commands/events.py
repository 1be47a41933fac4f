"""Sending one event, and watching events pass."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import click

from bridge.errors import UsageError
from bridge.event import Event, matches
from bridge.postgres.connection import connect, database_errors
from bridge.process.tasks import run as run_loop
from bridge.process.terminal import config_option, exit_codes, json_option
from bridge.settings import PostgresSettings, load
from bridge.sources.log import LogReader, Position

_TAIL_POLL = 0.2
"""Seconds between two looks; a person watches."""


async def emit_event(
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


async def tail_events(settings: PostgresSettings, name: str, topics: tuple[str, ...]) -> AsyncIterator[Event]:
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


@click.command()
@click.argument("topic")
@click.argument("payload")
@click.option("--key", help="Events with one key are published in order.")
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="A header of your own; may be repeated.")
@config_option
@exit_codes
def emit(topic: str, payload: str, key: str | None, headers: tuple[str, ...], config: Path | None) -> None:
    """Sends one event to TOPIC and prints its id. PAYLOAD is JSON or text; `-` reads it from standard input."""
    pairs = {}
    for header in headers:
        name, equals, value = header.partition("=")
        if not equals:
            raise UsageError(f"--header {header!r} is not of the form NAME=VALUE")
        pairs[name] = value
    text = sys.stdin.read() if payload == "-" else payload
    settings = load(config).postgres

    async def send() -> None:
        click.echo(await emit_event(settings, topic, text, key, pairs))

    run_loop(send())


@click.command()
@click.option("--topic", "topics", multiple=True, metavar="PATTERN", help="Only these; `*` one word, `#` any number.")
@config_option
@json_option
@exit_codes
def tail(topics: tuple[str, ...], config: Path | None, as_json: bool) -> None:
    """Shows events as they are committed, without consuming them, until Ctrl-C."""
    settings = load(config)

    async def watch() -> None:
        async for event in tail_events(settings.postgres, settings.name, topics):
            click.echo(_as_json(event) if as_json else _as_line(event))

    try:
        run_loop(watch())
    except KeyboardInterrupt:
        sys.exit(130)


def _as_json(event: Event) -> str:
    fields = event._asdict() | {"payload": event.payload.decode(), "time": event.time.isoformat()}
    return json.dumps(fields | {"headers": dict(event.headers)}, ensure_ascii=False)


def _as_line(event: Event) -> str:
    key = f" [{event.key}]" if event.key is not None else ""
    return f"{event.time:%H:%M:%S.%f} {click.style(event.topic, bold=True)}{key} {event.payload.decode()}"
