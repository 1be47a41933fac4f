"""Installs and upgrades the schema `bridge`: numbered migrations, forward only, then the roles.

The SQL is the wheel's `bridge/sql`, or `sql/` of a checkout. Every migration runs in a transaction of its own that
first takes an advisory lock and then looks what is still to do; so several may run at once, through a
transaction pooler too, and a failure leaves a whole version behind.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import AsyncConnection, Connection
from psycopg.rows import TupleRow
from pydantic import SecretStr

from bridge.errors import DatabaseUnavailableError, PrivilegeError, SchemaError, SettingsError
from bridge.postgres.connection import (
    DSN_KEY,
    OLDEST_POSTGRES,
    connect_blocking,
    database_errors,
)
from bridge.settings import PostgresSettings

LOCK_TIMEOUT: Final = "10s"
"""A migration that waits for a table lock makes everyone behind it wait as well, so it gives up."""

_LOCK: Final = "select pg_advisory_xact_lock(hashtext('pgbridge.migrate'))"
_FILE: Final = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")


class Migration(NamedTuple):
    """One numbered file."""

    version: int
    name: str
    checksum: str
    """SHA-256 of the text, so that a file changed after it was applied is noticed."""
    sql: str


def sql_folder() -> Path:
    """Where the SQL files are: inside an installed wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "sql"
    return installed if installed.is_dir() else package.parent / "sql"


@cache
def migrations() -> Sequence[Migration]:
    """Every migration that this version of pgbridge brings, in order. Raises SettingsError when it brings none."""
    found = []
    for path in sorted((sql_folder() / "migrations").glob("*.sql")):
        match = _FILE.fullmatch(path.name)
        if match is None:
            raise SettingsError(f"{path}: is not a migration; name it NNNN_words.sql")
        sql = path.read_text(encoding="utf-8")
        found.append(Migration(int(match[1]), match[2], hashlib.sha256(sql.encode()).hexdigest(), sql))
    if not found:
        raise SettingsError(f"{sql_folder()}: holds no migrations; install pgbridge again")
    return tuple(found)


def schema_version() -> int:
    """The version of the schema that this version of pgbridge works with."""
    return migrations()[-1].version


def migrate(dsn: str) -> list[Migration]:
    """Applies what is missing, then the roles; returns what was applied. Running it again is harmless.

    Raises SchemaError (PostgreSQL too old, a database without an encoding, a migration changed after it was applied,
    schema newer than this pgbridge), and what `bridge.postgres.connection.connect` raises.
    """
    applied: list[Migration] = []
    with database_errors(), _connect(dsn) as connection:
        while (migration := _apply_next(connection)) is not None:
            applied.append(migration)
        _run(connection, "roles.sql", _roles_sql())
    return applied


def pending(dsn: str) -> list[Migration]:
    """What `migrate` would apply. Raises as `migrate` does."""
    with database_errors(), _connect(dsn) as connection:
        return _pending(_applied(connection))


async def check_version(connection: AsyncConnection[Any]) -> None:
    """Raises SchemaError unless the database has exactly the schema that this pgbridge works with.

    Raises what `translated` raises, too.
    """
    with database_errors():
        cursor = await connection.execute("select to_regclass('bridge.migration') is not null")
        row = await cursor.fetchone()
        if row is None or not row[0]:
            raise SchemaError(f"{DSN_KEY}: the schema bridge is not installed in this database; run: pgbridge migrate")
        cursor = await connection.execute("select version, checksum from bridge.migration")
        applied = dict(await cursor.fetchall())
    missing = _pending(applied)
    if missing:
        raise SchemaError(
            f"{DSN_KEY}: the schema bridge does not have migration {missing[0].version:04} ({missing[0].name}) "
            f"and with it {len(missing)} in all; run: pgbridge migrate"
        )


def schema_sql() -> str:
    """All of the schema for reading (sql/schema.sql): the migrations in order, then the roles."""
    parts = [
        "-- The whole schema of pgbridge, for reading. Generated from sql/migrations/ and sql/roles.sql by\n"
        "-- python -m bridge.postgres.schema > sql/schema.sql; change those, never this file.\n"
    ]
    parts += [f"-- migrations/{m.version:04}_{m.name}.sql {'-' * 60}\n\n{m.sql}" for m in migrations()]
    parts.append(f"-- roles.sql {'-' * 60}\n\n{_roles_sql()}")
    return "\n".join(parts)


def migrate_sql() -> str:
    """What `migrate` does as a script for psql, for databases that only a DBA may change. May be run again."""
    parts = [
        f"""\
-- pgbridge: schema version {schema_version()}. Run it with psql, as the role that is to own the schema:
--   psql -X -d DATABASE -f THIS_FILE
-- Each migration is applied once, in a transaction of its own; the roles need CREATEROLE or must exist.
\\set ON_ERROR_STOP on
\\set QUIET on
set client_min_messages = warning;
select current_setting('server_version_num')::int < {OLDEST_POSTGRES}0000 as too_old \\gset
\\if :too_old
  do $$ begin raise exception 'pgbridge needs PostgreSQL {OLDEST_POSTGRES} or newer'; end $$;
\\endif
select current_setting('server_encoding') = 'SQL_ASCII' as without_encoding \\gset
\\if :without_encoding
  do $$ begin raise exception 'this database has the encoding SQL_ASCII; pgbridge needs UTF8 or another'; end $$;
\\endif
"""
    ]
    parts += [_psql_step(m) for m in migrations()]
    parts.append(f"begin;\n{_LOCK} as lock \\gset\n{_roles_sql()}\ncommit;\n")
    return "\n".join(parts)


def _roles_sql() -> str:
    return (sql_folder() / "roles.sql").read_text(encoding="utf-8")


def _psql_step(m: Migration) -> str:
    return f"""\
begin;
{_LOCK} as lock \\gset
set local lock_timeout = '{LOCK_TIMEOUT}';
\\set known none
select to_regclass('bridge.migration') is not null as installed \\gset
\\if :installed
  select coalesce(max(checksum), 'none') as known from bridge.migration where version = {m.version} \\gset
\\endif
select :'known' <> 'none' as done, :'known' not in ('none', '{m.checksum}') as changed \\gset
\\if :changed
  do $$ begin raise exception 'migration {m.version:04} ({m.name}) was changed after it was applied here'; end $$;
\\endif
\\if :done
  \\echo {m.version:04} {m.name}: already applied
\\else
{m.sql}
insert into bridge.migration (version, name, checksum) values ({m.version}, '{m.name}', '{m.checksum}');
  \\echo {m.version:04} {m.name}: applied
\\endif
commit;
"""  # noqa: S608 - numbers and names of our own files


def _connect(dsn: str) -> Connection[TupleRow]:
    return connect_blocking(PostgresSettings(dsn=SecretStr(dsn)), "pgbridge migrate")


def _apply_next(connection: Connection[tuple[Any, ...]]) -> Migration | None:
    """One migration in one transaction; None when nothing is left to do."""
    with connection.transaction():
        connection.execute(_LOCK)
        missing = _pending(_applied(connection))
        if not missing:
            return None
        _run(connection, f"migration {missing[0].version:04} ({missing[0].name})", missing[0].sql)
        connection.execute("insert into bridge.migration (version, name, checksum) values (%s, %s, %s)", missing[0][:3])
        return missing[0]


def _applied(connection: Connection[tuple[Any, ...]]) -> dict[int, str]:
    with _owner_errors("the schema bridge"), connection.transaction():
        installed = connection.execute("select to_regclass('bridge.migration') is not null").fetchone()
        if installed is None or not installed[0]:
            return {}
        return dict(connection.execute("select version, checksum from bridge.migration").fetchall())


def _pending(applied: Mapping[int, str]) -> list[Migration]:
    """What the database lacks. Raises SchemaError for a newer schema, and for a migration that was changed since."""
    known = {m.version: m for m in migrations()}
    newer = [version for version in applied if version not in known]
    if newer:
        raise SchemaError(
            f"{DSN_KEY}: the schema bridge has version {max(newer)}; this pgbridge knows up to {schema_version()}. "
            "Upgrade pgbridge"
        )
    for version, checksum in sorted(applied.items()):
        if known[version].checksum != checksum:
            raise SchemaError(
                f"{DSN_KEY}: migration {version:04} ({known[version].name}) is not the one applied to this database: "
                "its file was changed. Restore the file, and put the change into a new migration"
            )
    return [m for m in migrations() if m.version not in applied]


def _run(connection: Connection[tuple[Any, ...]], what: str, sql: str) -> None:
    """Runs one of our own files in a transaction, under the lock."""
    with _owner_errors(what), connection.transaction():
        connection.execute(_LOCK)
        connection.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'")
        connection.execute(sql)


@contextmanager
def _owner_errors(what: str) -> Iterator[None]:
    """Says what a role needs that migrates, and when a table is in use; `what` begins the message."""
    try:
        yield
    except psycopg.errors.InsufficientPrivilege as error:
        raise PrivilegeError(
            f"{DSN_KEY}: {what}: {error.diag.message_primary}. Run it as a role that owns the database and has "
            "CREATEROLE, or give a DBA the script that this prints: pgbridge migrate --sql"
        ) from error
    except psycopg.errors.LockNotAvailable as error:
        raise DatabaseUnavailableError(
            f"{DSN_KEY}: {what}: a table of pgbridge is in use and was not free within {LOCK_TIMEOUT}; nothing was "
            "changed. Run it again when no long transaction uses it"
        ) from error


if __name__ == "__main__":
    print(schema_sql(), end="")
