"""What `pgbridge check` finds in PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Final, LiteralString, NamedTuple

from psycopg.rows import TupleRow

from bridge.commands.finding import Finding, failure, tried, warning
from bridge.errors import PgbridgeError, PrivilegeError, SchemaError
from bridge.postgres.certificates import unproven
from bridge.postgres.connection import DSN_KEY, connect, database_errors, require_writes
from bridge.postgres.pooler import is_pooled
from bridge.postgres.schema import check_version, schema_version
from bridge.postgres.status import Status, look
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
    "bridge.leader": ("select", "insert", "update"),
    "bridge.bell": ("select", "insert", "update"),
    "bridge.cursor": ("select", "insert", "update", "delete"),
    "bridge.dead_letter": ("insert",),
}
FUNCTIONS: Final = (
    "bridge.intake(text[], text[])",
    "bridge.intake(uuid[], text[], text[])",
    "bridge.prune(timestamptz, int, bigint)",
    "bridge.status()",
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
    "bridge.move_due(timestamptz, timestamptz, bigint, int, bigint)",
    "bridge.scheduled_status()",
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

_ROOM: Final = """
with taken as (
    select count(*) filter (where datname = current_database()) as here,
           count(*) filter (where usename = current_user) as ours,
           count(*) as everywhere
    from pg_catalog.pg_stat_activity
    where datid is not null and usesysid is not null and application_name not like 'pgbridge%'
)
select
    current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', true), '0')::int - everywhere,
    case when datconnlimit >= 0 then datconnlimit - here end,
    case when rolconnlimit >= 0 then rolconnlimit - ours end
from taken, pg_catalog.pg_database, pg_catalog.pg_roles
where datname = current_database() and rolname = current_user
"""
"""How many sessions pgbridge may have, by the limits of the server, the database and the role; None for no limit.
pg_stat_activity hides what others do, but not that they are there."""

_DURABILITY: Final = """
select name from pg_catalog.pg_settings
where name in ('fsync', 'full_page_writes', 'synchronous_commit') and setting = 'off' order by name
"""

_NOT_DURABLE: Final = {
    "fsync": "a crash of the machine may destroy the database, with events that were committed",
    "full_page_writes": "a crash of the machine may tear pages of the database, with events in them",
    "synchronous_commit": (
        "a crash of the server forgets the commits of its last moments. Positions come again; events of logins that "
        "have this too are lost, also where they were published"
    ),
}

BRIDGE_SESSIONS: Final = 6
"""What a bridge takes at most."""
WORKER_SESSIONS: Final = 4
"""What a worker process takes at most, beside its concurrency."""

MOST_SKEW: Final = 5.0
"""Seconds between two clocks that nobody need hear of."""

OLD_TRANSACTION: Final = 3600.0
"""Seconds from which on an open transaction is worth a warning."""

_YOUNG: Final = 3600.0
"""Seconds of log from which nobody can tell how it grows."""


async def of_reach(settings: Settings) -> AsyncIterator[Finding]:
    """Whether the server can be reached and heard. The first of them says whether it can be reached."""
    connected = await tried("postgres", partial(_postgres, settings))
    yield connected
    if connected.ok:
        yield await tried("listen", partial(_listen, settings))
        yield await _asked(settings.postgres, "clock", _clock)


async def of_log(settings: Settings) -> AsyncIterator[Finding]:
    """What the bridge needs for the log. The first of them is the schema; what a failure has made meaningless is left
    out."""
    postgres = settings.postgres
    schema = await _asked(postgres, "schema", _schema)
    yield schema
    if not schema.ok:
        return
    privileges = await _asked(postgres, "privileges", _privileges)
    yield privileges
    yield await _asked(postgres, "durability", _durability)
    if not privileges.ok:
        return
    yield await _asked(postgres, "positions", partial(_positions, settings))
    try:
        async with await connect(postgres, NAME) as connection:
            status = await look(connection, settings.outbox_or_default.retention)
    except PgbridgeError as error:
        yield failure("log", error)
        return
    for finding in (_size(settings, status), *_held_back(settings, status), _transactions(status)):
        yield finding


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


async def of_room(settings: Settings, theirs: Settings, *, bridge: bool, workers: bool) -> AsyncIterator[Finding]:
    """Whether there is room for the sessions of the bridge and of one process of each of `theirs` workers. What cannot
    be reached is told elsewhere."""
    wanted: dict[PostgresSettings, int] = {}
    if bridge:
        wanted[settings.postgres] = BRIDGE_SESSIONS
    if workers:
        sessions = sum(worker.concurrency + WORKER_SESSIONS for worker in theirs.workers.values())
        wanted[theirs.workers_postgres] = wanted.get(theirs.workers_postgres, 0) + sessions
    for number, (postgres, own) in enumerate(wanted.items()):
        # What server and database have room for, is said once.
        needed = _Needed(own, sum(wanted.values()) if number == 0 else 0)
        found = await _asked(postgres, "connections", partial(_room, postgres.key("dsn"), needed))
        if found.ok and (number == 0 or found.warning):
            yield found


async def _asked(
    postgres: PostgresSettings, subject: str, ask: Callable[[Connection], Awaitable[Finding | str]]
) -> Finding:
    """What a question gives over a session of its own."""
    try:
        async with await connect(postgres, NAME) as connection:
            with database_errors(postgres.key("dsn")):
                found = await ask(connection)
    except PgbridgeError as error:
        return failure(subject, error)
    return found if isinstance(found, Finding) else Finding(subject, ok=True, text=found)


async def _rows(connection: Connection, query: LiteralString, *values: object) -> list[TupleRow]:
    return await (await connection.execute(query, values or None)).fetchall()


async def _postgres(settings: Settings) -> str:
    connection = await connect(settings.postgres, NAME, target_session_attrs="any")
    async with connection:
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
    [(there,)] = await _rows(connection, "select clock_timestamp()")
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
    missing = [what for (what,) in await _rows(connection, _MISSING, names, privileges)]
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
        [(superuser, owner)] = await _rows(connection, _RIGHTS)
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
    off = [name for (name,) in await _rows(connection, _DURABILITY)]
    if not off:
        return "a commit survives a crash"
    said = "; ".join(f"{name} = off: {_NOT_DURABLE[name]}" for name in off)
    return warning("durability", f"{DSN_KEY}: {said}. Set {' and '.join(off)} to on")


async def _positions(settings: Settings, connection: Connection) -> Finding | str:
    await require_sequence(connection)
    [(last_value,)] = await _rows(connection, "select last_value from bridge.sequence_state()")
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


def _transactions(status: Status) -> Finding:
    guards = status.guards
    if not guards.sees_sessions:
        text = "whether an old one is open cannot be known: grant pg_read_all_stats to the owner of the schema bridge"
        return Finding("transactions", ok=True, text=text)
    seconds = guards.oldest_transaction_seconds or 0.0
    if seconds <= OLD_TRANSACTION:
        return Finding("transactions", ok=True, text=f"none is older than {age(OLD_TRANSACTION)}")
    return warning(
        "transactions",
        f"{guards.oldest_transaction} has one open for {age(seconds)}: vacuum removes nothing that ended since, so the "
        "log grows, and reading it gets slower. End it",
    )


class _Needed(NamedTuple):
    """Sessions of one login, and of all logins together."""

    own: int
    all: int


async def _room(key: str, needed: _Needed, connection: Connection) -> Finding | str:
    if await is_pooled(connection, key):
        return f"{needed.all} are needed; the pooler's own limits count, see Poolers in docs/operations.md"
    [(server, database, role)] = await _rows(connection, _ROOM)
    user, name = connection.info.user, connection.info.dbname
    limits = (
        (server, needed.all, "the server, raise its max_connections"),
        (database, needed.all, f"the database, raise it with `alter database {name} connection limit N`"),
        (role, needed.own, f"the role, raise it with `alter role {user} connection limit N`"),
    )
    for room, wanted, mend in limits:
        if room is not None and room < wanted:
            return warning(
                "connections",
                f"{key}: bridge and one process of each worker take up to {wanted}, and there is room for "
                f"{max(room, 0)}: the limit is that of {mend}, or lower the workers' concurrency",
            )
    room = min(room for room, _, _ in limits if room is not None)
    return f"up to {needed.all} are needed, and there is room for {room}"
