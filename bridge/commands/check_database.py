"""What `pgbridge check` finds in PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Final, LiteralString

from psycopg.rows import TupleRow

from bridge.commands.finding import Finding, failure, tried, warning
from bridge.errors import PgbridgeError, PrivilegeError, SchemaError
from bridge.postgres.certificates import unproven
from bridge.postgres.connection import DSN_KEY, connect, database_errors, require_writes
from bridge.postgres.pooler import is_pooled
from bridge.postgres.schema import check_version, schema_version
from bridge.postgres.status import Guards, Status, look
from bridge.postgres.wire import Connection
from bridge.process.tasks import one_error
from bridge.process.terminal import age, moment
from bridge.settings import PostgresSettings, Settings
from bridge.sources.listener import Listener
from bridge.sources.outbox import require_sequence

NAME: Final = "pgbridge check"
"""How PostgreSQL lists our sessions."""

TABLES: Final = {
    "bridge.outbox": ("select",),
    "bridge.migration": ("select",),
    "bridge.sample": ("select",),
    "bridge.leader": ("select", "insert", "update"),
    "bridge.bell": ("select", "insert", "update"),
    "bridge.cursor": ("select", "insert", "update", "delete"),
    "bridge.dead_letter": ("insert",),
    "bridge.event_schema": ("select",),
    "bridge.pause_audit": ("select",),
}
FUNCTIONS: Final = (
    "bridge.intake(text[], text[])",
    "bridge.intake(uuid[], text[], text[])",
    "bridge.prune(timestamptz, int, bigint)",
    "bridge.status()",
    "bridge.status(int)",
    "bridge.guards()",
    "bridge.read_page(bigint, int8multirange, boolean, xid8[], int, bigint, text[], boolean)",
    "bridge.topic_regex(text[])",
    "bridge.topic_test(text[])",
    "bridge.takes(text, text[], text)",
    "bridge.split_page(bigint, int, text[], text, boolean)",
    "bridge.event_bytes(text, text, jsonb)",
    "bridge.calendar_time(timestamptz)",
    "bridge.header_texts(jsonb)",
    "bridge.any_header_texts(jsonb)",
    "bridge.floor_of(bigint, int8multirange, int8multirange)",
    "bridge.sequence_state()",
    "bridge.lead_key(text)",
    "bridge.take_lead(text, text)",
    "bridge.begin_reading(text, jsonb)",
    "bridge.leave_lead(text)",
    "bridge.store_cursor(text, text, bigint, int8multirange, int8multirange, bigint[])",
    "bridge.store_problem(text, text, text, double precision)",
    "bridge.take_horizon()",
    "bridge.set_asleep(text, boolean)",
    "bridge.paused_sinks(text)",
    "bridge.worker_status(text[])",
    "bridge.worker_status(text[], int)",
    "bridge.move_due(timestamptz, timestamptz, bigint, int, bigint)",
    "bridge.scheduled_status()",
    "bridge.watches(regclass)",
    "bridge.watch_of(regclass)",
    "bridge.json_object(text)",
    "bridge.store_samples(text, text[], double precision, jsonb[], jsonb[], double precision)",
)
"""What roles.sql grants to bridge_relay, by privilege; a test compares them."""

_MISSING: Final = """
select upper(privilege) || ' on ' || name
from unnest(%s::text[], %s::text[]) as needed (name, privilege)
where not case privilege
    when 'execute' then has_function_privilege(name, privilege)
    else has_table_privilege(name, privilege)
end
"""

_RIGHTS: Final = """
select r.rolsuper, coalesce(pg_has_role(n.nspowner, 'usage'), false)
from pg_catalog.pg_roles r left join pg_catalog.pg_namespace n on n.nspname = 'bridge'
where r.rolname = current_user
"""

_DURABILITY: Final = """
select name from pg_catalog.pg_settings
where name in ('fsync', 'full_page_writes', 'synchronous_commit') and setting = 'off' order by name
"""

_OWNER: Final = "select pg_get_userbyid(proowner) from pg_catalog.pg_proc where oid = 'bridge.guards'::regproc"
"""Whose rights decide what is seen of other sessions."""

_NOT_DURABLE: Final = {
    "fsync": "a crash of the machine may destroy the database, with events that were committed",
    "full_page_writes": "a crash of the machine may tear pages of the database, with events in them",
    "synchronous_commit": (
        "a crash of the server forgets the commits of its last moments. Positions come again; events of logins that "
        "have this too are lost, also where they were published"
    ),
}

MOST_SKEW: Final = 5.0
"""Seconds between two clocks that nobody need hear of."""

OLD_TRANSACTION: Final = 3600.0
"""Seconds from which on an open transaction is worth a warning."""

_YOUNG: Final = 3600.0
"""Seconds of log from which nobody can tell how it grows."""


async def of_database(settings: Settings) -> AsyncIterator[Finding]:
    """Whether the bridge can reach and hear the server, and what it needs there. The first of them says whether it can
    be reached; what a failure has made meaningless is left out."""
    postgres = settings.postgres
    try:
        connection = await connect(postgres, NAME)
    except PgbridgeError as error:
        yield failure("postgres", error)
        return
    async with connection:
        ask = partial(_answered, connection, postgres.key("dsn"))
        reached = await ask("postgres", _postgres)
        yield reached
        if not reached.ok:
            return
        yield await tried("listen", partial(_listen, settings))
        yield await ask("clock", _clock)
        if not settings.reads_outbox:
            return
        schema = await ask("schema", _schema)
        yield schema
        if not schema.ok:
            return
        privileges = await ask("privileges", _privileges)
        yield privileges
        yield await ask("durability", _durability)
        if not privileges.ok:
            return
        yield await ask("positions", partial(_positions, settings))
        try:
            status = await look(connection, settings.outbox_or_default.retention)
        except PgbridgeError as error:
            yield failure("log", error)
            return
        for finding in (_size(settings, status), *_held_back(settings, status)):
            yield finding
        yield await ask("transactions", partial(_transactions, status.guards))


async def of_logins(logins: Sequence[PostgresSettings]) -> AsyncIterator[Finding]:
    """Servers that are not proven, and logins that may do too much. What cannot be reached is told elsewhere."""
    for postgres in dict.fromkeys(logins):
        try:
            connection = await connect(postgres, NAME)
            async with connection:
                doubt = unproven(connection.info, connection.pgconn)
                excess = await _excess(connection)
        except PgbridgeError:
            continue
        for subject, problem in (("tls", doubt), ("privileges", excess)):
            if problem is not None:
                yield warning(subject, f"{postgres.key('dsn')}: {problem}")


async def asked(
    postgres: PostgresSettings, subject: str, ask: Callable[[Connection], Awaitable[Finding | str]]
) -> Finding:
    """What a question gives over a session of its own."""
    try:
        async with await connect(postgres, NAME) as connection:
            return await _answered(connection, postgres.key("dsn"), subject, ask)
    except PgbridgeError as error:
        return failure(subject, error)


async def _answered(
    connection: Connection, key: str, subject: str, ask: Callable[[Connection], Awaitable[Finding | str]]
) -> Finding:
    try:
        with database_errors(key):
            found = await ask(connection)
    except PgbridgeError as error:
        return failure(subject, error)
    return found if isinstance(found, Finding) else Finding(subject, ok=True, text=found)


async def rows(connection: Connection, query: LiteralString, *values: object) -> list[TupleRow]:
    return await (await connection.execute(query, values or None)).fetchall()


async def _postgres(connection: Connection) -> str:
    await require_writes(connection)
    at, version = connection.info, connection.info.server_version
    pooler = ", through a pooler" if await is_pooled(connection, DSN_KEY) else ""
    return (
        f"PostgreSQL {version // 10_000}.{version % 10_000}, {at.host} port {at.port}, "
        f"database {at.dbname!r} as {at.user!r}{pooler}"
    )


async def _listen(settings: Settings) -> str:
    listener = Listener(settings.postgres, [], lambda _: None, application_name=NAME)
    heard = asyncio.Event()
    try:
        await listener.open()
        listening = asyncio.create_task(listener.run(heard.set))
        waiting = asyncio.create_task(heard.wait())
        await asyncio.wait((listening, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not heard.is_set():
            with one_error():
                await listening
        listening.cancel()
        # Before its connection closes, whose socket's number the next one gets.
        await asyncio.wait((listening,))
    finally:
        await listener.close()
    return "hears its own NOTIFY"


async def _clock(connection: Connection) -> Finding | str:
    before = datetime.now(UTC)
    [(there,)] = await rows(connection, "select clock_timestamp()")
    after = datetime.now(UTC)
    # Where between the two it was answered, is not known.
    apart = max((before - there).total_seconds(), (there - after).total_seconds(), 0.0)
    if apart <= MOST_SKEW:
        return f"within {MOST_SKEW:g} s of the database's"
    return warning(
        "clock",
        f"this machine has {moment(after)}, and the database {moment(there)}: {age(apart)} apart. Ages, "
        "delays and the times of events are wrong by that. Let both follow NTP",
    )


async def _schema(connection: Connection) -> str:
    version = await check_version(connection)
    if version > schema_version():
        return f"version {version:04}; this pgbridge knows {schema_version():04} and may run on it: upgrade it next"
    return f"version {version:04}, as this pgbridge knows it"


async def _privileges(connection: Connection) -> str:
    needed = [(name, privilege) for name, privileges in TABLES.items() for privilege in privileges]
    needed += [(name, "execute") for name in FUNCTIONS]
    names, privileges = (list(each) for each in zip(*needed, strict=True))
    missing = [what for (what,) in await rows(connection, _MISSING, names, privileges)]
    if missing:
        raise PrivilegeError(
            f"{DSN_KEY}: the role {connection.info.user!r} does not have {', '.join(missing)}. "
            f"Run: grant bridge_relay to {connection.info.user}"
        )
    return "as in roles.sql"


async def _excess(connection: Connection) -> str | None:
    """What a login may do beyond its work, and what to do about it."""
    user = connection.info.user
    with database_errors():
        [(superuser, owner)] = await rows(connection, _RIGHTS)
    if superuser:
        return (
            f"{user!r} is a superuser, so whoever has its password has the whole server. Use a login that is in "
            "bridge_relay, or for workers in bridge_worker, and in nothing else"
        )
    if owner:
        return (
            f"{user!r} owns the schema bridge, so it may change and remove what it should only use. Use a login that "
            "is in bridge_relay, or for workers in bridge_worker, and in nothing else"
        )
    return None


async def _durability(connection: Connection) -> Finding | str:
    off = [name for (name,) in await rows(connection, _DURABILITY)]
    if not off:
        return "a commit survives a crash"
    said = "; ".join(f"{name} = off: {_NOT_DURABLE[name]}" for name in off)
    return warning("durability", f"{DSN_KEY}: {said}. Set {' and '.join(off)} to on")


async def _positions(settings: Settings, connection: Connection) -> Finding | str:
    await require_sequence(connection)
    [(last_value,)] = await rows(connection, "select last_value from bridge.sequence_state()")
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
    ahead = [position for position in own.sinks if position.mark > last_value]
    if ahead:
        return warning(
            "positions",
            f"{DSN_KEY}: the sink {ahead[0].sink!r} is at {ahead[0].mark}, and bridge.outbox_id_seq at {last_value}: "
            "the log was emptied, and its numbers begin again. A bridge that runs does not see the new ones: restart "
            "it, and it begins at the beginning",
        )
    return f"{len(own.sinks)}, of {settings.name!r}"


def _size(settings: Settings, status: Status) -> Finding:
    """How large the log is, and how large it becomes; what the disk has room for, SQL does not say."""
    retention, guards = settings.outbox_or_default.retention, status.guards
    size = _megabytes(guards.outbox_bytes)
    if guards.oldest_event_at is None:
        return Finding("log", ok=True, text=f"empty, {size}; events stay for {age(retention)}")
    spans = (status.at - guards.oldest_event_at).total_seconds()
    text = f"{size}, with events of {age(spans)}; they stay for {age(retention)}"
    if spans < _YOUNG:
        return Finding("log", ok=True, text=f"{text}. How fast it grows, shows after an hour")
    a_second = guards.outbox_bytes / spans
    return Finding(
        "log",
        ok=True,
        text=f"{text}: at {_megabytes(a_second * 86400)} a day about {_megabytes(a_second * retention)}. The disk of "
        "the database, at which SQL cannot look, needs room for that and for an outage of the brokers",
    )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _held_back(settings: Settings, status: Status) -> Iterator[Finding]:
    if by := status.guards.held_back_by:
        yield warning(
            "log",
            f"it grows: nothing is deleted behind what {' and '.join(map(repr, by))} has not settled for longer than "
            f"the retention of {age(settings.outbox_or_default.retention)}. `pgbridge status` says why; of a bridge "
            "that will not run again: `pgbridge cursor forget`",
        )


async def _transactions(guards: Guards, connection: Connection) -> Finding | str:
    seconds = guards.oldest_transaction_seconds or 0.0
    if seconds > OLD_TRANSACTION:
        return warning(
            "transactions",
            f"{guards.oldest_transaction} has one open for {age(seconds)}: vacuum removes nothing that ended since, so "
            "the log grows, and reading it gets slower. End it",
        )
    if not guards.sees_sessions:
        [(owner,)] = await rows(connection, _OWNER)
        return warning(
            "transactions",
            f"whether others have an old one open cannot be known, and it would make the log grow: {owner!r}, who owns "
            f"the schema bridge, does not see their sessions. Run: grant pg_read_all_stats to {owner}",
        )
    return f"none is older than {age(OLD_TRANSACTION)}"
