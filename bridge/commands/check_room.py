"""What `pgbridge check` finds of room in PostgreSQL: whether its limits let bridge and workers have their sessions."""

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from bridge.commands.check_database import NAME, asked, rows
from bridge.commands.finding import Finding, warning
from bridge.postgres.pooler import is_pooled
from bridge.postgres.wire import Connection
from bridge.settings import PostgresSettings, Settings

BRIDGE_SESSIONS: Final = 6
"""What a bridge takes at most."""
WORKER_SESSIONS: Final = 4
"""What a worker process takes at most, beside its concurrency."""

_LIMITS: Final = """
select
    current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', true), '0')::int,
    case when datconnlimit >= 0 then datconnlimit end,
    case when rolconnlimit >= 0 then rolconnlimit end
from pg_catalog.pg_database, pg_catalog.pg_roles
where datname = current_database() and rolname = current_user
"""
"""Of the server, the database and the role; None for no limit."""

_SESSIONS: Final = """
select application_name, datname = current_database(), usename = current_user, count(*)
from pg_catalog.pg_stat_activity
where datid is not null and usesysid is not null and coalesce(backend_type, 'client backend') = 'client backend'
    and application_name <> %s
group by 1, 2, 3
"""
"""Without those of this command. pg_stat_activity hides what others do, and shows their names all the same."""


class _Process(NamedTuple):
    """One that is to run."""

    login: PostgresSettings
    name: str
    """That its sessions have, or begin with, in PostgreSQL."""
    sessions: int
    """What it takes at most."""


class _Sessions(NamedTuple):
    """Some that are open now."""

    name: str
    here: bool
    """In this database."""
    own: bool
    """Of this login."""
    number: int


async def of_room(settings: Settings, theirs: Settings, *, bridge: bool, workers: bool) -> AsyncIterator[Finding]:
    """Whether there is room for the sessions of the bridge and of one process of each of `theirs` workers. What cannot
    be reached is told elsewhere."""
    processes = []
    if bridge:
        processes.append(_Process(settings.postgres, f"pgbridge {settings.name}", BRIDGE_SESSIONS))
    for name, worker in theirs.workers.items() if workers else ():
        sessions = worker.concurrency + WORKER_SESSIONS
        processes.append(_Process(theirs.workers_postgres, f"pgbridge-worker {name}", sessions))
    # What server and database have room for, is said once.
    everyones: Sequence[_Process] = processes
    for login in dict.fromkeys(each.login for each in processes):
        own = [each for each in processes if each.login == login]
        found = await asked(login, "connections", partial(_room, login.key("dsn"), own, everyones))
        if found.ok and (everyones or found.warning):
            yield found
        everyones = ()


async def _room(
    key: str, own: Sequence[_Process], everyones: Sequence[_Process], connection: Connection
) -> Finding | str:
    needed = _needed(everyones)
    if await is_pooled(connection, key):
        return f"{needed} are needed; the pooler's own limits count, see Poolers in docs/operations.md"
    [(server, database, role)] = await rows(connection, _LIMITS)
    open_now = [_Sessions(*row) for row in await rows(connection, _SESSIONS, NAME)]
    user, name = connection.info.user, connection.info.dbname
    limits = (
        (server, open_now, everyones, "the server, raise its max_connections"),
        (
            database,
            [each for each in open_now if each.here],
            everyones,
            f"the database, raise it with `alter database {name} connection limit N`",
        ),
        (
            role,
            [each for each in open_now if each.own],
            own,
            f"the role, raise it with `alter role {user} connection limit N`",
        ),
    )
    rooms = []
    for limit, counted, processes, mend in limits:
        if limit is None or not processes:
            continue
        room = limit - _taken_by_others(counted, processes)
        if room < _needed(processes):
            return warning(
                "connections",
                f"{key}: bridge and one process of each worker take up to {_needed(processes)}, and there is room for "
                f"{max(room, 0)}: the limit is that of {mend}, or lower the workers' concurrency",
            )
        rooms.append(room)
    return f"up to {needed} are needed, and there is room for {min(rooms, default=0)}"


def _needed(processes: Sequence[_Process]) -> int:
    return sum(each.sessions for each in processes)


def _taken_by_others(counted: Sequence[_Sessions], processes: Sequence[_Process]) -> int:
    """All sessions but those of the processes themselves, which may run already; where two of one run, the second is
    another."""
    taken = sum(each.number for each in counted)
    for process in processes:
        # No name of a bridge or a worker has a blank in it; what a session is for may follow.
        running = sum(each.number for each in counted if each.here and f"{each.name} ".startswith(f"{process.name} "))
        taken -= min(running, process.sessions)
    return taken
