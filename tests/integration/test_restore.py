"""A dump restored into a new cluster: ids go on, transaction ids do not, and the bridge goes on where it stood."""

import asyncio
from pathlib import Path

import psycopg

from tests.support import dumps
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings
from tests.support.servers import NOT_DURABLE, PostgresServer

EMIT = "select bridge.emit('load', n::text, 'key-' || n %% 5) from generate_series(%s::int, %s::int) n order by n"


def restore(dsn: str, into: PostgresServer, name: str) -> str:
    """Dumps a database and restores it in another cluster; the DSN there."""
    copy = into.create_database(name)
    with psycopg.connect(copy, autocommit=True) as connection:
        for role in ("bridge_emitter", "bridge_relay", "bridge_worker", "bridge_operator", "bridge_viewer"):
            connection.execute(psycopg.sql.SQL("create role {}").format(psycopg.sql.Identifier(role)))
    dumps.copy(into, dsn, copy)
    return copy


async def test_a_restored_database_goes_on_where_the_cursor_stood(
    bridge_database: str, messages: Messages, server_folder: Path, unique: str, tmp_path: Path
) -> None:
    with Daemon(tmp_path / "old", settings(bridge_database, messages)) as bridge:
        await execute(bridge_database, EMIT, 1, 100)
        # Ids that were handed out and rolled back: gaps that the cursor takes along.
        await execute(bridge_database, "select nextval('bridge.outbox_id_seq') from generate_series(1, 3)")
        await execute(bridge_database, EMIT, 101, 120)
        sent = await messages.take(120)
        assert await asyncio.to_thread(bridge.stop) == 0
    await execute(bridge_database, EMIT, 121, 150)

    folder = server_folder / unique
    folder.mkdir()
    with PostgresServer(folder, settings=NOT_DURABLE) as cluster:
        copy = await asyncio.to_thread(restore, bridge_database, cluster, "copy")
        with Daemon(tmp_path / "new", settings(copy, messages)) as bridge:
            await asyncio.to_thread(bridge.wait_for, "bridge.leading")
            await execute(copy, EMIT, 151, 160)
            sent += await messages.take(40)
            assert await asyncio.to_thread(bridge.stop) == 0
        stored = await execute(copy, "select mark = (select max(id) from bridge.outbox) from bridge.cursor")
    assert [int(message.body) for message in sent] == list(range(1, 161))
    assert stored == [(True,)]
