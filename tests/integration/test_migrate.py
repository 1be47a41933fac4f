"""Installing and upgrading the schema."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from psycopg import AsyncConnection, sql
from pydantic import SecretStr

from bridge.errors import DatabaseUnavailableError, PrivilegeError, RefusedError, SchemaError, SettingsError
from bridge.postgres import schema as module
from bridge.postgres.connection import connect
from bridge.postgres.schema import Migration, check_version, migrate, migrate_sql, migrations, pending, schema_version
from bridge.settings import PostgresSettings
from tests.support.daemons import run_command
from tests.support.debian_postgres import debian_programs
from tests.support.servers import MissingProgramError, PostgresServer


def versions(dsn: str) -> list[int]:
    with psycopg.connect(dsn) as connection:
        return [row[0] for row in connection.execute("select version from bridge.migration order by version")]


@dataclass(frozen=True)
class Role:
    """A login role of one test."""

    dsn: str
    name: sql.Identifier


def run_script(dsn: str) -> subprocess.CompletedProcess[str]:
    """Lets Debian's psql, where it is installed, run what `migrate --sql` prints."""
    try:
        psql = debian_programs() / "psql"
    except MissingProgramError as error:
        pytest.skip(str(error))
    command = [str(psql), "-X", "-d", dsn, "-f", "-"]
    return subprocess.run(command, input=migrate_sql(), text=True, check=False, capture_output=True)


@pytest.fixture
def plain_owner(postgres: PostgresServer, database: str, unique: str) -> Role:
    """A role that owns the database, and has no other power."""
    role = sql.Identifier(unique)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(sql.SQL("create role {} login").format(role))
        connection.execute(sql.SQL("alter database {} owner to {}").format(sql.Identifier(unique), role))
    return Role(postgres.dsn(unique, user=unique), role)


def test_migrations_are_numbered_without_holes() -> None:
    assert [m.version for m in migrations()] == list(range(1, schema_version() + 1))


def test_migrate_applies_everything_once(database: str) -> None:
    assert pending(database) == list(migrations())
    assert migrate(database) == list(migrations())
    assert pending(database) == []
    assert migrate(database) == []
    assert versions(database) == [m.version for m in migrations()]


def test_migrate_works_on_debians_postgres(debian_database: str) -> None:
    assert migrate(debian_database) == list(migrations())


def test_simultaneous_migrations_apply_each_one_once(database: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        applied = [m.version for done in pool.map(migrate, [database] * 4) for m in done]
    assert sorted(applied) == [m.version for m in migrations()]


def test_migrate_upgrades_from_an_older_version_and_keeps_the_events(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = migrations()
    extra = Migration(schema_version() + 1, "extra", "c", "alter table bridge.outbox add column extra text")
    migrate(database)
    with psycopg.connect(database) as connection:
        connection.execute("select bridge.emit('t', 'x')")
    monkeypatch.setattr(module, "migrations", lambda: (*everything, extra))
    assert pending(database) == [extra]
    assert migrate(database) == [extra]
    with psycopg.connect(database) as connection:
        assert connection.execute("select topic, extra from bridge.outbox").fetchall() == [("t", None)]


def test_a_migration_that_fails_leaves_nothing_of_itself(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = migrations()
    broken = Migration(schema_version() + 1, "broken", "c", "create table bridge.half (); select 1 / 0")
    monkeypatch.setattr(module, "migrations", lambda: (*everything, broken))
    with pytest.raises(RefusedError, match="division by zero"):
        migrate(database)
    assert max(versions(database)) == broken.version - 1
    with psycopg.connect(database) as connection:
        assert connection.execute("select to_regclass('bridge.half')").fetchone() == (None,)


def test_a_migration_changed_after_it_was_applied_is_told(database: str) -> None:
    migrate(database)
    with psycopg.connect(database) as connection:
        connection.execute("update bridge.migration set checksum = 'other' where version = 2")
    with pytest.raises(SchemaError, match=r"migration 0002 \(emit\) is not the one applied"):
        migrate(database)


def test_a_schema_newer_than_this_pgbridge_is_told(database: str) -> None:
    migrate(database)
    with psycopg.connect(database) as connection:
        connection.execute("insert into bridge.migration values (9999, 'future', 'c')")
    with pytest.raises(SchemaError, match=r"version 9999.*Upgrade pgbridge"):
        migrate(database)


def test_a_role_without_createrole_gets_a_hint(plain_owner: Role) -> None:
    """The roles belong to the cluster, where other tests may have made them; so roles.sql must miss one."""
    statement = "do $$ begin execute 'create role pgbridge_test_missing'; end $$"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_roles_sql", lambda: statement)
        with pytest.raises(PrivilegeError, match=r"roles\.sql: permission denied to create role.*migrate --sql"):
            migrate(plain_owner.dsn)


def test_a_role_that_may_not_create_a_schema_gets_a_hint(postgres: PostgresServer, database: str, unique: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(sql.SQL("create role {} login").format(sql.Identifier(unique)))
    with pytest.raises(PrivilegeError, match=r"migration 0001 \(tables\): permission denied.*migrate --sql"):
        migrate(postgres.dsn(unique, user=unique))


@pytest.mark.usefixtures("_migrated")
def test_the_owner_of_a_database_can_migrate_when_the_roles_exist(plain_owner: Role) -> None:
    assert migrate(plain_owner.dsn) == list(migrations())
    with psycopg.connect(plain_owner.dsn) as connection:
        connection.execute("create table watched (id int primary key); select bridge.watch('watched')")
        connection.execute("insert into watched values (1)")
        assert connection.execute("select topic from bridge.emitted()").fetchall() == [("public.watched.inserted",)]


def test_a_migration_gives_up_on_a_table_that_is_in_use(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = migrations()
    migrate(database)
    extra = Migration(schema_version() + 1, "extra", "c", "alter table bridge.outbox add column extra text")
    monkeypatch.setattr(module, "migrations", lambda: (*everything, extra))
    monkeypatch.setattr(module, "LOCK_TIMEOUT", "100ms")
    with psycopg.connect(database) as reader:
        reader.execute("select from bridge.outbox")
        with pytest.raises(DatabaseUnavailableError, match="in use"):
            migrate(database)
    assert migrate(database) == [extra]


@pytest.fixture
def database_without_encoding(postgres: PostgresServer, unique: str) -> Iterator[str]:
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        name = sql.Identifier(unique)
        connection.execute(
            sql.SQL("create database {} encoding 'SQL_ASCII' locale 'C' template template0").format(name)
        )
    yield postgres.dsn(unique)
    postgres.drop_database(unique)


async def test_a_database_without_an_encoding_is_refused(database_without_encoding: str) -> None:
    """Its texts may be bytes that are not UTF-8, and every one that the bridge reads would end it."""
    with pytest.raises(SchemaError, match=r"^postgres\.dsn: .*SQL_ASCII.*ENCODING 'UTF8'"):
        migrate(database_without_encoding)
    with pytest.raises(SchemaError, match=r"SQL_ASCII"):
        await connect(PostgresSettings(dsn=SecretStr(database_without_encoding)), "test")
    done = run_script(database_without_encoding)
    assert done.returncode == 3
    assert "SQL_ASCII" in done.stderr
    with psycopg.connect(database_without_encoding) as connection:
        assert connection.execute("select to_regnamespace('bridge')").fetchone() == (None,)


def test_a_wrong_dsn_is_named_without_its_secret() -> None:
    with pytest.raises(SettingsError, match=r"^postgres\.dsn: ") as caught:
        migrate("postgresql://user:hunter2@[broken/db")
    assert "hunter2" not in str(caught.value)


def test_a_server_that_is_away_is_named() -> None:
    with pytest.raises(
        DatabaseUnavailableError, match=r"^postgres\.dsn: PostgreSQL at 127\.0\.0\.1:1 does not answer: "
    ):
        migrate("host=127.0.0.1 port=1 dbname=x")


async def test_check_version_tells_what_is_missing(database: str) -> None:
    async with await AsyncConnection.connect(database, autocommit=True) as connection:
        with pytest.raises(SchemaError, match=r"not installed.*pgbridge migrate"):
            await check_version(connection)
        migrate(database)
        await check_version(connection)
        await connection.execute("delete from bridge.migration where version = %s", (schema_version(),))
        with pytest.raises(SchemaError, match=f"does not have migration {schema_version():04}.*pgbridge migrate"):
            await check_version(connection)


@pytest.mark.parametrize("fixture", ["database", "debian_database"])
def test_the_script_for_a_dba_does_what_migrate_does_and_may_run_again(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    dsn: str = request.getfixturevalue(fixture)

    def run() -> str:
        done = run_script(dsn)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert run() == "".join(f"{m.version:04} {m.name}: applied\n" for m in migrations())
    assert pending(dsn) == []
    assert run() == "".join(f"{m.version:04} {m.name}: already applied\n" for m in migrations())
    assert migrate(dsn) == []


def test_the_command_migrates_as_the_owner_without_settings(database: str, tmp_path: Path) -> None:
    done = run_command("migrate", "--dsn", database, "--config", str(tmp_path / "none.toml"))
    assert done.returncode == 0, done.stderr
    assert f"{schema_version():04} {migrations()[-1].name}: applied" in done.stdout
    assert versions(database) == [m.version for m in migrations()]


def test_the_command_takes_no_password_from_its_arguments(database: str) -> None:
    for dsn in (f"{database}?password=hunter2", "postgresql://owner:hunter2@127.0.0.1/shop"):
        done = run_command("migrate", "--dsn", dsn)
        assert done.returncode == 2
        assert "--dsn: others on this machine can read a command's arguments" in " ".join(done.stderr.split())
        assert "hunter2" not in done.stderr
