"""Old and new programs side by side on one schema, and an upgrade from the first version's schema with data in it."""

import asyncio
import itertools
import shutil
import sys
from pathlib import Path

import psycopg
import pytest

from bridge.errors import SchemaError
from bridge.postgres import schema as module
from bridge.postgres.connection import connect
from bridge.postgres.schema import Migration, check_version, migrate, migrations, schema_version
from bridge.settings import PostgresSettings
from tests.support.daemons import Daemon, run_command
from tests.support.messages import Messages, execute, settings
from tests.support.until import rows_become

FIRST_RELEASE = 6
"""The schema of version 0.1.0."""


def migration(oldest: int | None) -> Migration:
    """The next one, which does little; `oldest` as its first line says it."""
    line = "" if oldest is None else f"-- oldest program: {oldest:04}\n"
    statement = "comment on schema bridge is 'newer'"
    return Migration(schema_version() + 1, "newer", "c", line + statement)


@pytest.fixture
def newer(database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database whose newest migration this program does not know, and which admits it."""
    known, extra = migrations(), migration(schema_version())
    with monkeypatch.context() as patch:
        patch.setattr(module, "migrations", lambda: (*known, extra))
        migrate(database)
    return database


async def test_a_program_may_run_on_a_newer_schema_that_admits_it(newer: str) -> None:
    async with await connect(PostgresSettings.model_validate({"dsn": newer}), "test") as connection:
        assert await check_version(connection) == schema_version() + 1
    assert migrate(newer) == [], "there is nothing that an older program has to do"


async def test_a_program_may_not_run_on_a_schema_that_asks_for_a_newer_one(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, closed = migrations(), migration(None)
    later = migration(schema_version())._replace(version=schema_version() + 2, name="later")
    with monkeypatch.context() as patch:
        patch.setattr(module, "migrations", lambda: (*known, closed, later))
        migrate(database)
    version = schema_version()
    async with await connect(PostgresSettings.model_validate({"dsn": database}), "test") as connection:
        with pytest.raises(
            SchemaError,
            match=f"has version {version + 2:04}, on which programs run that know {version + 1:04} or newer; "
            f"this pgbridge knows up to {version:04}. Upgrade pgbridge",
        ):
            await check_version(connection)


def test_every_migration_that_names_an_oldest_program_names_one_that_there_was() -> None:
    for one in migrations():
        assert 1 <= one.oldest_program <= one.version


@pytest.fixture
def newer_python(tmp_path: Path) -> Path:
    """An interpreter for a copy of the programs that brings one more migration, which admits this one."""
    checkout, copy = Path(module.__file__).resolve().parents[2], tmp_path / "newer"
    for folder in ("bridge", "workers", "sql"):
        shutil.copytree(checkout / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(checkout / "pgbridge.py", copy)
    extra = migration(schema_version())
    (copy / "sql" / "migrations" / f"{extra.version:04}_{extra.name}.sql").write_text(extra.sql)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{copy}:{checkout}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


WORKER = """
[workers.echo]
handler = "tests.support.worker_handlers:echo"
subscribe = ["load"]
reply = "shop.rendered"
"""


async def test_old_and_new_bridges_and_workers_side_by_side_lose_nothing(
    bridge_database: str, shop: PostgresSettings, messages: Messages, newer_python: Path, tmp_path: Path
) -> None:
    text = settings(bridge_database, messages, WORKER)
    numbers = itertools.count()
    emitting = asyncio.Event()
    emitting.set()

    async def emit() -> int:
        count = 0
        while emitting.is_set():
            for number in itertools.islice(numbers, 20):
                await execute(
                    bridge_database, "select bridge.emit('load', %s::jsonb, %s)", str(number), f"key-{number % 7}"
                )
                count += 1
            await asyncio.sleep(0.02)
        return count

    async def more_replies() -> None:
        ((before,),) = await execute(bridge_database, "select count(*) from shop.invoice")
        wanted = int(str(before)) + 50
        query = f"select count(*) >= {wanted} from shop.invoice"
        await rows_become(bridge_database, query, [(True,)])

    old = Daemon(tmp_path / "old", text)
    done = await asyncio.to_thread(run_command, "topology", "--apply", "--config", str(old.config))
    assert done.returncode == 0, done.stderr
    old_worker = Daemon(tmp_path / "old", text, "run", "echo", module="workers.cli")
    new = Daemon(tmp_path / "new", text, python=newer_python)
    new_worker = Daemon(tmp_path / "new", text, "run", "echo", module="workers.cli", python=newer_python)
    upgrade = Daemon(tmp_path / "new", text, "migrate", python=newer_python)
    with old, old_worker:
        old.wait_for("bridge.leading")
        load = asyncio.create_task(emit())
        await more_replies()
        upgrade.start()
        assert await asyncio.to_thread(upgrade.wait) == 0, upgrade.log.read_text()
        await more_replies()
        # Both may start again.
        for daemon in (old, old_worker):
            assert await asyncio.to_thread(daemon.stop) == 0
            daemon.start()
        await more_replies()
        with new, new_worker:
            new_worker.wait_for("worker.started")
            await more_replies()
            assert await asyncio.to_thread(old.stop) == 0
            new.wait_for("bridge.leading")
            await more_replies()
            assert await asyncio.to_thread(old_worker.stop) == 0
            await more_replies()
            emitting.clear()
            count = await load
            replied = "select (result ->> 'of')::int from shop.invoice order by 1"
            await rows_become(bridge_database, replied, [(number,) for number in range(count)])
            taken = await messages.take(2 * count)  # each reply is an event, too
            by_key: dict[int, list[int]] = {}
            for number in [int(message.body) for message in taken if message.routing_key == "load"]:
                by_key.setdefault(number % 7, []).append(number)
            assert by_key == {key: list(range(key, count, 7)) for key in range(7)}
            assert await asyncio.to_thread(new.stop) == 0
            assert await asyncio.to_thread(new_worker.stop) == 0


async def test_the_first_versions_schema_is_upgraded_with_its_data(
    database: str, messages: Messages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = migrations()
    with monkeypatch.context() as patch:
        patch.setattr(module, "migrations", lambda: known[:FIRST_RELEASE])
        patch.setattr(module, "_roles_sql", lambda: "select")
        migrate(database)
    with psycopg.connect(database) as connection:
        connection.execute("select bridge.emit('shop.old', n::text, 'k') from generate_series(1, 10) n order by n")
        # A bridge has published up to 6, but for 3 and 5, which it has not seen; 4 became a dead letter.
        connection.execute(
            "insert into bridge.cursor (name, mark, gaps, horizon, system_identifier) "
            "select 'test', 6, '{[3,4),[5,6)}', pg_current_xact_id(), system_identifier from pg_control_system()"
        )
        connection.execute(
            "insert into bridge.dead_letter (bridge, event_id, sequence, topic, key, payload, content_type, headers, "
            "created_at, sink, code, reason, attempts) select 'test', event_id, id, topic, key, payload, content_type, "
            "headers, created_at, 'events', 'unroutable', 'no queue', 1 from bridge.outbox where id = 4"
        )
    migrate(database)
    with Daemon(tmp_path, settings(database, messages)) as bridge:
        bridge.wait_for("bridge.leading")
        taken = await messages.take(6)
        assert [message.body for message in taken] == [b"3", b"5", b"7", b"8", b"9", b"10"]
        dead = await execute(database, "select sequence, code from bridge.dead_letter")
        assert dead == [(4, "unroutable")]
        assert bridge.stop() == 0
    assert messages.seen == 6
