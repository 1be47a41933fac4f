"""Places where a bridge cannot work: each is told by its own message, by `run` and by `check`, with exit code 69."""

import asyncio
import contextlib
import os
import pwd
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo, sql

from tests.support.daemons import Daemon, run_command
from tests.support.servers import NOT_DURABLE, PostgresServer, free_port
from tests.support.standby import StandbyServer
from tests.support.until import until

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
        said = done.stdout + done.stderr
        assert expected in said, f"{command}: {said}"
        assert "postgres.dsn: " in said
        assert "Traceback" not in said
        assert done.returncode == 69, f"{command}: {said}"


@pytest.fixture
async def pgbouncer(
    request: pytest.FixtureRequest, postgres: PostgresServer, bridge_database: str, server_folder: Path, unique: str
) -> AsyncIterator[str]:
    """The DSN of PgBouncer before the test's database; the parameter is its mode of pooling."""
    if not Path("/usr/sbin/pgbouncer").exists():
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have pgbouncer")
        pytest.skip("PgBouncer is not installed: apt-get install pgbouncer")
    folder = server_folder / unique
    folder.mkdir()
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    os.chown(folder, user.pw_uid, user.pw_gid)
    port = free_port()
    name = conninfo.conninfo_to_dict(bridge_database)["dbname"]
    (folder / "users").write_text('"postgres" ""\n')
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n{name} = host={postgres.host} port={postgres.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nauth_type = trust\nauth_file = {folder}/users\npool_mode = {request.param}\n"
        "ignore_startup_parameters = extra_float_digits\nunix_socket_dir =\n"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["/usr/sbin/pgbouncer", str(folder / "pgbouncer.ini")],
            stdout=log,
            stderr=log,
            user=user.pw_uid if os.geteuid() == 0 else None,
        )
    dsn = f"postgresql://postgres@127.0.0.1:{port}/{name}"
    try:
        await until(lambda: _takes_connections(dsn), f"PgBouncer answers, whose log is {folder / 'log'}")
        yield dsn
    finally:
        process.kill()
        process.wait()


def _takes_connections(dsn: str) -> bool:
    try:
        psycopg.connect(dsn, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.mark.parametrize("pgbouncer", ["transaction"], indirect=True)
async def test_pgbouncer_in_transaction_mode_is_found_out_and_no_lock_stays_with_its_pool(
    pgbouncer: str, bridge_database: str, tmp_path: Path
) -> None:
    await told(tmp_path, pgbouncer, "Is there a pooler in transaction mode (PgBouncer) between?")
    with psycopg.connect(bridge_database) as connection:
        locks = connection.execute(
            "select count(*) from pg_locks where locktype = 'advisory' "
            "and database = (select oid from pg_database where datname = current_database())"
        ).fetchone()
    assert locks == (0,)


@pytest.mark.parametrize("pgbouncer", ["session"], indirect=True)
async def test_pgbouncer_in_session_mode_is_a_place_where_a_bridge_can_work(pgbouncer: str, tmp_path: Path) -> None:
    """It takes none of the parameters at the start that would set what our sessions rely on."""
    with Daemon(tmp_path, SETTINGS.format(dsn=pgbouncer)) as bridge:
        await asyncio.to_thread(bridge.wait_for, "bridge.leading")
        done = await asyncio.to_thread(run_command, "emit", "a.topic", "payload", "--config", str(bridge.config))
        assert done.returncode == 0, done.stderr
        assert await asyncio.to_thread(bridge.stop) == 0


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
