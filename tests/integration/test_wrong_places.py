"""Places where a bridge cannot work: each is told by its own message, by `run` and by `check`, with exit code 69."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo, sql

from tests.support.daemons import run_command
from tests.support.servers import NOT_DURABLE, PostgresServer
from tests.support.standby import StandbyServer
from tests.support.unwrapped import unwrapped

SETTINGS = """
name = "test"
[postgres]
dsn = "{dsn}"
[sinks.events]
type = "memory"
[[routes]]
topic = "#"
sink = "events"
"""


async def told(tmp_path: Path, dsn: str, expected: str) -> None:
    """`run` and `check` both say this, and both end with 69."""
    config = tmp_path / "bridge.toml"
    config.write_text(SETTINGS.format(dsn=dsn))
    for command in ("run", "check"):
        done = await asyncio.to_thread(run_command, command, "--config", str(config))
        said = unwrapped(done.stdout) + done.stderr
        assert expected in said, f"{command}: {said}"
        assert "postgres.dsn: " in said
        assert "Traceback" not in said
        assert done.returncode == 69, f"{command}: {said}"


@pytest.fixture(scope="module")
def primary_and_standby(server_folder: Path) -> Iterator[tuple[PostgresServer, StandbyServer]]:
    folder = server_folder / "wrong-places"
    with PostgresServer(folder, settings=NOT_DURABLE) as primary, StandbyServer(folder, primary) as standby:
        yield primary, standby


async def test_a_hot_standby_is_told(primary_and_standby: tuple[PostgresServer, StandbyServer], tmp_path: Path) -> None:
    _, standby = primary_and_standby
    await told(tmp_path, standby.dsn(), "is a hot standby, which can neither LISTEN nor store the cursor")


async def test_a_standby_is_told_although_the_dsn_says_that_any_server_will_do(
    primary_and_standby: tuple[PostgresServer, StandbyServer], tmp_path: Path
) -> None:
    _, standby = primary_and_standby
    await told(tmp_path, standby.dsn() + "?target_session_attrs=any", "standby")


async def test_a_standby_that_is_named_before_the_primary_is_passed_over(
    primary_and_standby: tuple[PostgresServer, StandbyServer], tmp_path: Path
) -> None:
    primary, standby = primary_and_standby
    config = tmp_path / "bridge.toml"
    hosts = f"127.0.0.1:{standby.port},127.0.0.1:{primary.port}"
    config.write_text(SETTINGS.format(dsn=f"postgresql://postgres@{hosts}/postgres"))
    done = await asyncio.to_thread(run_command, "check", "--config", str(config))
    assert f", 127.0.0.1 port {primary.port}, database 'postgres'" in unwrapped(done.stdout), done.stdout


async def test_a_read_only_user_is_told(bridge_database: str, unique: str, tmp_path: Path) -> None:
    role = sql.Identifier(unique)
    with psycopg.connect(bridge_database, autocommit=True) as connection:
        connection.execute(sql.SQL("create role {} login in role bridge_relay").format(role))
        connection.execute(sql.SQL("alter role {} set default_transaction_read_only = on").format(role))
    try:
        dsn = conninfo.make_conninfo(bridge_database, user=unique)
        await told(tmp_path, dsn, f"sessions of the role '{unique}' in the database")
        await told(tmp_path, f"{dsn} target_session_attrs=any", "read-only")
    finally:
        with psycopg.connect(bridge_database, autocommit=True) as connection:
            connection.execute(sql.SQL("drop role {}").format(role))


@contextlib.asynccontextmanager
async def pretending_to_be_13(server: PostgresServer) -> AsyncIterator[int]:
    """A port where the server reports version 13: its version is all that is looked at."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(server.host, server.port)

        async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter, *, lie: bool) -> None:
            with contextlib.suppress(ConnectionError):
                while chunk := await source.read(65_536):
                    target.write(chunk.replace(b"server_version\x0018", b"server_version\x0013") if lie else chunk)
                    await target.drain()
            target.close()

        await asyncio.gather(forward(reader, to_server, lie=False), forward(from_server, writer, lie=True))

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        yield listener.sockets[0].getsockname()[1]


async def test_postgresql_13_is_told(bridge_database: str, postgres: PostgresServer, tmp_path: Path) -> None:
    async with pretending_to_be_13(postgres) as port:
        dsn = bridge_database.replace(str(postgres.port), str(port))
        await told(tmp_path, dsn, "this is PostgreSQL 13; pgbridge needs 14 or newer")
