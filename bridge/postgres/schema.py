"""Installs and upgrades the schema `bridge`: numbered migrations, forward only, then the roles.

The SQL is the wheel's `bridge/sql`, or `sql/` of a checkout. Every migration runs in a transaction of its own that
first takes an advisory lock and then looks what is still to do; so several may run at once, through a
transaction pooler too, and a failure leaves a whole version behind.

A migration names the oldest program that may run on the schema it leaves, by the version that the program knows. So a
program runs on its own schema, and on every newer one whose migrations all admit it; upgrades need no gap.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg
from psycopg import AsyncConnection, Connection, sql
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
_OLDEST: Final = re.compile(r"-- oldest program: (\d{4})\n")
_FIRST_WITH_OLDEST: Final = 23
"""The version from which on `bridge.migration` says it."""


class Migration(NamedTuple):
    """One numbered file."""

    version: int
    name: str
    checksum: str
    """SHA-256 of the text, so that a file changed after it was applied is noticed."""
    sql: str

    @property
    def oldest_program(self) -> int:
        """Programs that know this version of the schema, or a newer one, may run on what it leaves."""
        named = _OLDEST.match(self.sql)
        return int(named[1]) if named else self.version


class Applied(NamedTuple):
    """A migration, as the database has it on record."""

    checksum: str
    oldest_program: int


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
        text = path.read_text(encoding="utf-8")
        found.append(Migration(int(match[1]), match[2], hashlib.sha256(text.encode()).hexdigest(), text))
    if not found:
        raise SettingsError(f"{sql_folder()}: holds no migrations; install pgbridge again")
    return tuple(found)


def schema_version() -> int:
    """The version of the schema that this version of pgbridge works with."""
    return migrations()[-1].version


def migrate(dsn: str) -> list[Migration]:
    """Applies what is missing, then the roles; returns what was applied. Running it again is harmless, and it leaves a
    newer schema that admits this pgbridge as it is.

    Raises SchemaError (PostgreSQL too old, a database without an encoding, a migration changed after it was applied,
    schema newer than what this pgbridge may run on), and what `bridge.postgres.connection.connect` raises.
    """
    applied: list[Migration] = []
    with database_errors(), _connect(dsn) as connection:
        while (migration := _apply_next(connection)) is not None:
            applied.append(migration)
        if _newest(_applied(connection)) <= schema_version():
            _run(connection, "roles.sql", _roles_sql())
    return applied


def pending(dsn: str) -> list[Migration]:
    """What `migrate` would apply. Raises as `migrate` does."""
    with database_errors(), _connect(dsn) as connection:
        return _pending(_applied(connection))


async def check_version(connection: AsyncConnection[Any]) -> int:
    """The version of the schema, which may be newer than what this pgbridge knows. Raises SchemaError where this
    pgbridge may not run on it.

    Raises what `translated` raises, too.
    """
    with database_errors():
        cursor = await connection.execute("select to_regclass('bridge.migration') is not null")
        row = await cursor.fetchone()
        if row is None or not row[0]:
            raise SchemaError(f"{DSN_KEY}: the schema bridge is not installed in this database; run: pgbridge migrate")
        cursor = await connection.execute(_RECORD)
        applied = _read(await cursor.fetchall())
    missing = _pending(applied)
    if missing:
        raise SchemaError(
            f"{DSN_KEY}: the schema bridge does not have migration {missing[0].version:04} ({missing[0].name}) "
            f"and with it {len(missing)} in all; run: pgbridge migrate"
        )
    return _newest(applied)


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


def group_roles_sql() -> str:
    """The beginning of roles.sql: a block that creates the group roles which are not there."""
    roles = _roles_sql()
    return roles[roles.index("do $$") : roles.index("$$;") + len("$$;")]


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
insert into bridge.migration ({", ".join(_row(m))}) values ({m.version}, '{m.name}', '{m.checksum}'{_psql_oldest(m)});
  \\echo {m.version:04} {m.name}: applied
\\endif
commit;
"""  # noqa: S608 - numbers and names of our own files


def _psql_oldest(m: Migration) -> str:
    return f", {m.oldest_program}" if m.version >= _FIRST_WITH_OLDEST else ""


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
        row = _row(missing[0])
        connection.execute(
            sql.SQL("insert into bridge.migration ({}) values ({})").format(
                sql.SQL(", ").join(map(sql.Identifier, row)), sql.SQL(", ").join(map(sql.Placeholder, row))
            ),
            row,
        )
        return missing[0]


def _row(m: Migration) -> dict[str, Any]:
    """What `bridge.migration` says of it."""
    row: dict[str, Any] = {"version": m.version, "name": m.name, "checksum": m.checksum}
    return row | ({"oldest_program": m.oldest_program} if m.version >= _FIRST_WITH_OLDEST else {})


_RECORD: Final = "select version, checksum, to_jsonb(m) ->> 'oldest_program' from bridge.migration m"
"""An older schema has no such column."""


def _read(rows: Sequence[TupleRow]) -> dict[int, Applied]:
    return {version: Applied(checksum, int(oldest or version)) for version, checksum, oldest in rows}


def _newest(applied: Mapping[int, Applied]) -> int:
    return max(applied, default=0)


def _applied(connection: Connection[tuple[Any, ...]]) -> dict[int, Applied]:
    with _owner_errors("the schema bridge"), connection.transaction():
        installed = connection.execute("select to_regclass('bridge.migration') is not null").fetchone()
        if installed is None or not installed[0]:
            return {}
        return _read(connection.execute(_RECORD).fetchall())


def _pending(applied: Mapping[int, Applied]) -> list[Migration]:
    """What the database lacks. Raises SchemaError for a newer schema that does not admit this pgbridge, and for a
    migration that was changed since."""
    known = {m.version: m for m in migrations()}
    oldest = max((one.oldest_program for version, one in applied.items() if version not in known), default=0)
    if oldest > schema_version():
        raise SchemaError(
            f"{DSN_KEY}: the schema bridge has version {_newest(applied):04}, on which programs run that know "
            f"{oldest:04} or newer; this pgbridge knows up to {schema_version():04}. Upgrade pgbridge"
        )
    for version, one in sorted(applied.items()):
        if version in known and known[version].checksum != one.checksum:
            raise SchemaError(
                f"{DSN_KEY}: migration {version:04} ({known[version].name}) is not the one applied to this database: "
                "its file was changed. Restore the file, and put the change into a new migration"
            )
    return [m for m in migrations() if m.version not in applied]


def _run(connection: Connection[tuple[Any, ...]], what: str, statements: str) -> None:
    """Runs one of our own files in a transaction, under the lock."""
    with _owner_errors(what), connection.transaction():
        connection.execute(_LOCK)
        connection.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'")
        connection.execute(statements)


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
