"""Everything that must be right before the daemons can run: one finding a line, each with its mend."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from psycopg import AsyncConnection

from bridge.brokers.registry import broker_of
from bridge.commands.topology import declarations
from bridge.errors import PgbridgeError, PrivilegeError, TopologyError
from bridge.postgres.connection import connect, database_errors, require_writes
from bridge.postgres.schema import check_version
from bridge.process.tasks import run as run_loop
from bridge.process.terminal import config_option, exit_codes, json_option
from bridge.settings import Settings, load
from bridge.sources.listener import Listener

Connection = AsyncConnection[tuple[Any, ...]]

_PRIVILEGES = """
select what from (values
    ('SELECT on bridge.outbox', has_table_privilege('bridge.outbox', 'select')),
    ('UPDATE on bridge.cursor', has_table_privilege('bridge.cursor', 'update')),
    ('UPDATE on bridge.bell', has_table_privilege('bridge.bell', 'update')),
    ('INSERT on bridge.dead_letter', has_table_privilege('bridge.dead_letter', 'insert')),
    ('EXECUTE on bridge.read_page',
     has_function_privilege('bridge.read_page(bigint, int8multirange, int, bigint)', 'execute')),
    ('EXECUTE on bridge.store_cursor',
     has_function_privilege('bridge.store_cursor(text, bigint, int8multirange)', 'execute')),
    ('EXECUTE on bridge.take_lead', has_function_privilege('bridge.take_lead(text, text)', 'execute')),
    ('EXECUTE on bridge.intake', has_function_privilege('bridge.intake(text[], text[])', 'execute'))
) needed (what, granted) where not granted
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    subject: str
    """``postgres``, ``listen``, ``schema``, ``privileges``, ``sink <name>``, ``worker <name>``."""
    ok: bool
    text: str
    """What was found; when it is wrong, with the mend."""
    exit_code: int = 0


async def findings(settings: Settings) -> AsyncIterator[Finding]:
    """Checks one thing after the other. A finding that makes later ones meaningless ends its group only."""
    connected = await _finding("postgres", lambda: _postgres(settings))
    yield connected
    if connected.ok:
        yield await _finding("listen", lambda: _listen(settings))
        if settings.reads_outbox:
            yield await _finding("schema", lambda: _schema(settings))
            yield await _finding("privileges", lambda: _privileges(settings))
    for name, sink in settings.sinks.items():
        yield await _finding(f"sink {name}", lambda sink=sink: _sink(sink))  # type: ignore[misc]
    yield await _finding("topology", lambda: _topology(settings))


async def _finding(subject: str, look: Callable[[], Awaitable[str]]) -> Finding:
    try:
        return Finding(subject, ok=True, text=await look())
    except PgbridgeError as error:
        return Finding(subject, ok=False, text=str(error), exit_code=error.exit_code)


async def _postgres(settings: Settings) -> str:
    connection = await connect(settings.postgres, "pgbridge check", target_session_attrs="any")
    async with connection:
        await require_writes(connection)
        at, version = connection.info, connection.info.server_version
        return (
            f"PostgreSQL {version // 10_000}.{version % 10_000}, {at.host} port {at.port}, "
            f"database {at.dbname!r} as {at.user!r}"
        )


async def _listen(settings: Settings) -> str:
    listener = Listener(settings.postgres, [], lambda _: None, application_name="pgbridge check")
    heard = asyncio.Event()
    try:
        await listener.open()
        listening = asyncio.create_task(listener.run(heard.set))
        waiting = asyncio.create_task(heard.wait())
        await asyncio.wait((listening, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        listening.cancel()
        if not heard.is_set():
            await _raise_the_first(listening)
    finally:
        await listener.close()
    return "hears its own NOTIFY"


async def _raise_the_first(listening: asyncio.Task[None]) -> None:
    try:
        await listening
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group


async def _schema(settings: Settings) -> str:
    connection = await connect(settings.postgres, "pgbridge check")
    async with connection:
        await check_version(connection)
    return "is the one that this pgbridge works with"


async def _privileges(settings: Settings) -> str:
    connection = await connect(settings.postgres, "pgbridge check")
    async with connection:
        with database_errors():
            cursor = await connection.execute(_PRIVILEGES)
            missing = [row[0] for row in await cursor.fetchall()]
        if missing:
            raise PrivilegeError(
                f"the role {connection.info.user!r} lacks {', '.join(missing)}. "
                f"grant bridge_relay to {connection.info.user}"
            )
    return "as in roles.sql"


async def _sink(settings: Any) -> str:
    sink = broker_of(settings).sink(settings)
    await sink.open()
    await sink.close()
    return f"{settings.type}, answers"


async def _topology(settings: Settings) -> str:
    wrong = [
        f"{item.kind} {item.name} ({owner}) {item.state}{': ' + item.detail if item.state == 'differs' else ''}"
        for owner, declared in await declarations(settings, apply=False)
        for item in declared
        if item.state in ("missing", "differs")
    ]
    if wrong:
        raise TopologyError(f"{'; '.join(wrong)}. Declare what is missing: pgbridge topology --apply")
    return "complete"


@click.command()
@config_option
@json_option
@exit_codes
def check(config: Path | None, as_json: bool) -> None:
    """Checks settings, database, privileges, brokers and topology: one line each, with the mend."""
    settings = load(config)
    worst = 0

    async def look() -> None:
        nonlocal worst
        if not as_json:
            _say(True, "settings", f"name {settings.name!r}")
        async for finding in findings(settings):
            worst = worst or finding.exit_code
            if as_json:
                click.echo(json.dumps({"subject": finding.subject, "ok": finding.ok, "text": finding.text}))
            else:
                _say(finding.ok, finding.subject, finding.text)

    run_loop(look())
    sys.exit(worst)


def _say(ok: bool, subject: str, text: str) -> None:
    mark = click.style("ok  ", fg="green") if ok else click.style("FAIL", fg="red")
    click.echo(f"{mark}  {subject:<18} {text}")
