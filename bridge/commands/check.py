"""`pgbridge check`: looks at everything that must be right before the daemons can run, and prints a line for each."""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

import click

from bridge.brokers.registry import broker_of
from bridge.commands.topology import declarations, require_complete
from bridge.errors import PgbridgeError, PrivilegeError, SchemaError
from bridge.postgres.certificates import unproven
from bridge.postgres.connection import DSN_KEY, connect, database_errors, require_writes
from bridge.postgres.pooler import is_pooled
from bridge.postgres.schema import check_version, schema_version
from bridge.postgres.status import look
from bridge.process.tasks import one_error, run
from bridge.process.terminal import config_option, exit_codes, json_option, print_json
from bridge.settings import PostgresSettings, Settings, SinkSettings, load
from bridge.sources.listener import Listener
from bridge.sources.outbox import require_sequence

_PRIVILEGES: Final = """
select what from (values
    ('SELECT on bridge.outbox', has_table_privilege('bridge.outbox', 'select')),
    ('UPDATE on bridge.cursor', has_table_privilege('bridge.cursor', 'update')),
    ('UPDATE on bridge.bell', has_table_privilege('bridge.bell', 'update')),
    ('INSERT on bridge.dead_letter', has_table_privilege('bridge.dead_letter', 'insert')),
    ('EXECUTE on bridge.read_page',
     has_function_privilege(
         'bridge.read_page(bigint, int8multirange, boolean, xid8[], int, bigint, text[], boolean)', 'execute')),
    ('EXECUTE on bridge.store_cursor',
     has_function_privilege(
         'bridge.store_cursor(text, text, bigint, int8multirange, int8multirange, bigint[])', 'execute')),
    ('EXECUTE on bridge.take_lead', has_function_privilege('bridge.take_lead(text, text)', 'execute')),
    ('EXECUTE on bridge.paused_sinks', has_function_privilege('bridge.paused_sinks(text)', 'execute')),
    ('EXECUTE on bridge.intake', has_function_privilege('bridge.intake(uuid[], text[], text[])', 'execute'))
) needed (what, granted) where not granted
"""

_OPEN_CHANNEL: Final = (
    "any role that may connect to this database may NOTIFY it, and so make events of this topic; "
    "bridge.notify() in its place takes only members of bridge_emitter"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    subject: str
    """``postgres``, ``tls``, ``listen``, ``schema``, ``privileges``, ``positions``, ``channel <name>``,
    ``sink <name>``, ``topology``, ``worker <name>``."""
    ok: bool
    text: str
    """What was found; when it is wrong, with what to do about it."""
    exit_code: int = 0
    """What `check` ends with when this is the first one that is wrong."""
    warning: bool = False
    """Whether it works and is still not as it should be."""


async def findings(settings: Settings) -> AsyncIterator[Finding]:
    """Checks one thing after the other, and leaves out what a failure before has made meaningless."""
    connected = await _finding("postgres", partial(_postgres, settings))
    yield connected
    if connected.ok:
        for postgres in dict.fromkeys((settings.postgres, settings.for_workers.workers_postgres)):
            if (text := await _unproven(postgres)) is not None:
                yield Finding("tls", ok=True, text=text, warning=True)
        yield await _finding("listen", partial(_listen, settings))
    database_ok = connected.ok
    if connected.ok and settings.reads_outbox:
        schema = await _finding("schema", partial(_schema, settings))
        yield schema
        database_ok = schema.ok
        if schema.ok:
            privileges = await _finding("privileges", partial(_privileges, settings))
            yield privileges
            if privileges.ok:
                yield await _finding("positions", partial(_positions, settings))
    for channel in settings.channels.listen if settings.channels else ():
        yield Finding(f"channel {channel}", ok=True, text=_OPEN_CHANNEL, warning=True)
    for name, sink in settings.sinks.items():
        yield await _finding(f"sink {name}", partial(_sink, sink))
    topology = await _finding("topology", partial(_topology, settings))
    yield topology
    if topology.ok and (database_ok or settings.workers_login is not None):
        # The bridge never imports the workers, so what is to be looked at comes through an entry point.
        for point in entry_points(group="pgbridge.checks"):
            for subject, look in point.load()(settings.for_workers).items():
                yield await _finding(subject, look)


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
        pooler = ", through a pooler" if await is_pooled(connection, DSN_KEY) else ""
        return (
            f"PostgreSQL {version // 10_000}.{version % 10_000}, {at.host} port {at.port}, "
            f"database {at.dbname!r} as {at.user!r}{pooler}"
        )


async def _unproven(postgres: PostgresSettings) -> str | None:
    """Why it is not sure that this is the server that is meant; None also where it cannot be reached, which the check
    of what reaches it tells."""
    try:
        connection = await connect(postgres, "pgbridge check")
    except PgbridgeError:
        return None
    async with connection:
        doubt = unproven(connection.info, connection.pgconn)
    return None if doubt is None else f"{postgres.key('dsn')}: {doubt}"


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
            with one_error():
                await listening
    finally:
        await listener.close()
    return "hears its own NOTIFY"


async def _schema(settings: Settings) -> str:
    connection = await connect(settings.postgres, "pgbridge check")
    async with connection:
        version = await check_version(connection)
    if version > schema_version():
        return f"version {version:04}; this pgbridge knows {schema_version():04} and may run on it: upgrade it next"
    return f"version {version:04}, as this pgbridge knows it"


async def _privileges(settings: Settings) -> str:
    connection = await connect(settings.postgres, "pgbridge check")
    async with connection:
        with database_errors():
            cursor = await connection.execute(_PRIVILEGES)
            missing = [row[0] for row in await cursor.fetchall()]
        if missing:
            raise PrivilegeError(
                f"{DSN_KEY}: the role {connection.info.user!r} does not have {', '.join(missing)}. "
                f"Run: grant bridge_relay to {connection.info.user}"
            )
    return "as in roles.sql"


async def _positions(settings: Settings) -> str:
    connection = await connect(settings.postgres, "pgbridge check")
    async with connection:
        await require_sequence(connection)
        status = await look(connection, settings.outbox_or_default.retention)
    own = next((bridge for bridge in status.bridges if bridge.name == settings.name), None)
    if own is None:
        return "none yet: this bridge has not run on this database"
    led_to = {route.sink for route in settings.routes}
    for position in own.sinks:
        # Nothing reads for it any more, and it keeps all that follows it from being pruned.
        if position.sink not in ("", "*", *led_to):
            raise SchemaError(
                f"{DSN_KEY}: there is a position of the sink {position.sink!r}, to which no route of the settings "
                f"leads, with {position.backlog} events not published. Add the route again, or stop the bridge and "
                f"run: pgbridge cursor forget {position.sink}"
            )
    return f"{len(own.sinks)}, of {settings.name!r}"


async def _sink(settings: SinkSettings) -> str:
    sink = broker_of(settings).sink(settings)
    try:
        await sink.open()
    finally:
        await sink.close()
    return f"{settings.type}, answers"


async def _topology(settings: Settings) -> str:
    require_complete(await declarations(settings, apply=False))
    return "complete"


@click.command()
@config_option
@json_option
@exit_codes
def check(config: Path | None, as_json: bool) -> None:
    """Checks settings, database, privileges, brokers, topology and workers.

    Prints one line for each, with what to do about what is wrong, and ends with the code of the first that is wrong.
    """
    settings = load(config)
    first_wrong = 0

    async def look() -> None:
        nonlocal first_wrong
        if not as_json:
            _print(Finding("settings", ok=True, text=f"name {settings.name!r}"))
        async for finding in findings(settings):
            first_wrong = first_wrong or finding.exit_code
            if as_json:
                print_json({name: getattr(finding, name) for name in ("subject", "ok", "warning", "text")})
            else:
                _print(finding)

    run(look())
    sys.exit(first_wrong)


def _print(finding: Finding) -> None:
    mark = click.style("ok  ", fg="green") if finding.ok else click.style("FAIL", fg="red")
    if finding.warning:
        mark = click.style("warn", fg="yellow")
    click.echo(f"{mark}  {finding.subject:<18} {finding.text}")
