"""What a role, a database or a server sets for every session does not break ours."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr

from bridge.postgres.connection import connect
from bridge.settings import PostgresSettings
from tests.support.commands import command, json_of
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings
from tests.support.until import rows_become

HOSTILE = {
    "idle_session_timeout": "1500ms",
    "idle_in_transaction_session_timeout": "100ms",
    "statement_timeout": "100ms",
    "lock_timeout": "100ms",
    "transaction_timeout": "200ms",
    "default_transaction_isolation": "serializable",
    "client_encoding": "LATIN1",
    "DateStyle": "German",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Kathmandu",
}


@pytest.fixture
def hostile_database(bridge_database: str) -> Iterator[str]:
    """A database whose owner has set, for every session in it, what sessions may be set to."""
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        name = sql.Identifier(admin.info.dbname)
        # PostgreSQL has transaction_timeout from 17 on.
        known = {row[0] for row in admin.execute("select name from pg_settings")}
        for setting in HOSTILE.keys() & known:
            value = HOSTILE[setting]
            admin.execute(sql.SQL("alter database {} set {} = {}").format(name, sql.Identifier(setting), value))
        yield bridge_database


async def test_every_session_of_ours_is_set_to_what_it_relies_on(hostile_database: str) -> None:
    session = await connect(PostgresSettings(dsn=SecretStr(hostile_database)), "test")
    async with session:
        rows = await (
            await session.execute("select name, setting from pg_settings where name = any(%s)", ([*HOSTILE],))
        ).fetchall()
        assert {"transaction_timeout": "0"} | dict(rows) == {
            "idle_session_timeout": "0",
            "idle_in_transaction_session_timeout": "0",
            "statement_timeout": "0",
            "lock_timeout": "0",
            "transaction_timeout": "0",
            "default_transaction_isolation": "read committed",
            "client_encoding": "UTF8",
            "DateStyle": "ISO, DMY",
            "IntervalStyle": "postgres",
            "TimeZone": "UTC",
        }
        cursor = await session.execute(
            "select '\u20ac \u65e5', '2026-01-02 03:04:05+00'::timestamptz, %s::interval", (timedelta(1),)
        )
        assert [str(value) for value in await cursor.fetchone() or ()] == [
            "\u20ac \u65e5",
            "2026-01-02 03:04:05+00:00",
            "1 day, 0:00:00",
        ]


async def test_a_bridge_and_the_commands_work_in_a_database_with_hostile_settings(
    hostile_database: str, messages: Messages, tmp_path: Path
) -> None:
    more = "[channels]\nlisten = ['Orders']"
    with Daemon(tmp_path, settings(hostile_database, messages, more)) as bridge:
        config = ("--config", str(bridge.config))
        bridge.wait_for("channels.listening")
        await command("emit", "shop.\u20ac", "\u65e5\u672c", *config)
        (message,) = await messages.take(1)
        assert message.body == "\u65e5\u672c".encode()
        (one,) = (await json_of("status", *config))["bridges"]
        assert one["leader_since"].endswith("+00:00")
        assert (await json_of("replay", "--from", "1h", "--dry-run", *config))["by_topic"] == {"shop.\u20ac": 1}
        assert bridge.stop() == 0


async def test_a_migration_waits_for_longer_than_the_role_allows_a_statement(database: str, tmp_path: Path) -> None:
    path = tmp_path / "bridge.toml"
    path.write_text(f'name = "test"\npostgres = {{dsn = "{database}"}}\n')
    with psycopg.connect(database, autocommit=True) as other:
        other.execute("select pg_advisory_lock(hashtext('pgbridge.migrate'))")
        other.execute(
            sql.SQL("alter database {} set statement_timeout = '300ms'").format(sql.Identifier(other.info.dbname))
        )
        migrating = asyncio.create_task(command("migrate", "--config", str(path)))
        await rows_become(database, "select count(*) from pg_locks where locktype = 'advisory' and not granted", [(1,)])
        await asyncio.sleep(1.0)
        other.execute("select pg_advisory_unlock_all()")
        await migrating


async def test_an_older_server_without_the_newest_settings_is_fine(debian_database: str) -> None:
    session = await connect(PostgresSettings(dsn=SecretStr(debian_database)), "test")
    async with session:
        assert await (await session.execute("show statement_timeout")).fetchone() == ("0",)


async def test_the_servers_time_limit_for_idle_sessions_ends_none_of_ours(
    hostile_database: str, messages: Messages, tmp_path: Path
) -> None:
    more = "[channels]\nlisten = ['Orders']"
    with Daemon(tmp_path, settings(hostile_database, messages, more)) as bridge:
        bridge.wait_for("channels.listening")
        for number in range(5):
            # Silences below and beyond the server's limit of 1.5 s.
            await asyncio.sleep(0.5 * number)
            await execute(hostile_database, "select pg_notify('Orders', %s)", str(number))
        assert [int(message.body) for message in await messages.take(5)] == list(range(5))
        assert [line for line in bridge.lines() if line["action"] in ("postgres.lost", "channels.deaf")] == []
        assert bridge.stop() == 0
