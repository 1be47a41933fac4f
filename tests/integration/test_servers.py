"""The servers that every other test needs: they start, keep their data, and can be killed, frozen and cut off."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aio_pika
import nats
import psycopg
import pytest

from bridge.demo.servers.guard import tree
from bridge.errors import UnavailableError
from tests.support.proxy import Proxy
from tests.support.servers import NatsServer, PostgresServer, PubSubEmulator, RabbitMQServer, Server, free_port
from tests.support.until import until


@pytest.fixture
def own_postgres(server_folder: Path, unique: str) -> Iterator[PostgresServer]:
    with PostgresServer(server_folder / unique) as server:
        yield server


def test_postgres_keeps_committed_rows_and_its_port_through_a_kill_and_a_restart(own_postgres: PostgresServer) -> None:
    port = own_postgres.port
    dsn = own_postgres.create_database('odd "name"')
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    own_postgres.kill()
    assert not own_postgres.running
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn, connect_timeout=5)
    own_postgres.start()
    own_postgres.restart()
    assert own_postgres.port == port
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)
        shown = connection.execute("SELECT current_setting('fsync'), current_setting('server_encoding')").fetchone()
        assert shown == ("on", "UTF8")
    own_postgres.drop_database('odd "name"')
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(dsn)


async def test_a_frozen_postgres_answers_no_session_until_it_is_thawed(own_postgres: PostgresServer) -> None:
    async with await psycopg.AsyncConnection.connect(own_postgres.dsn(), autocommit=True) as connection:
        own_postgres.freeze()
        query = asyncio.create_task(connection.execute("SELECT 1"))
        done, _ = await asyncio.wait([query], timeout=0.3)
        own_postgres.thaw()
        assert not done
        assert await (await asyncio.wait_for(query, 10)).fetchone() == (1,)


async def test_a_postmaster_that_dies_by_itself_is_noticed_and_started_again(own_postgres: PostgresServer) -> None:
    os.kill(own_postgres.pid, signal.SIGKILL)
    await until(lambda: not own_postgres.running)
    own_postgres.start()
    psycopg.connect(own_postgres.dsn()).close()


def test_a_start_that_fails_tells_the_end_of_the_servers_log(server_folder: Path, unique: str) -> None:
    server = PostgresServer(server_folder / unique, settings={"shared_buffers": "plenty"})
    with pytest.raises(UnavailableError, match=r"postgres ended with code 1 at its start(.|\n)*shared_buffers"):
        server.start()
    assert not server.running


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as somebody else")
def test_postgres_as_root_names_a_folder_that_its_user_cannot_enter(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(UnavailableError, match=r"as nobody, who cannot enter .*/postgres"):
        PostgresServer(tmp_path).start()


async def test_a_server_ends_with_the_process_that_started_it(server_folder: Path, unique: str) -> None:
    script = """if True:
        import sys
        from pathlib import Path
        from tests.support.servers import PostgresServer
        with PostgresServer(Path(sys.argv[1])) as server:
            print(server.pid, flush=True)
            server.freeze()
            sys.stdin.read()
    """
    command = [sys.executable, "-c", script, str(server_folder / unique)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = int(parent.stdout.readline())
        members = tree(server)
        assert len(members) > 1
        parent.kill()
    await until(lambda: not any(tree(pid) for pid in members), "the server ends with its parent")


def test_debians_postgres_is_of_another_version(debian_postgres: PostgresServer, postgres: PostgresServer) -> None:
    versions = []
    for server in (debian_postgres, postgres):
        with psycopg.connect(server.dsn()) as connection:
            versions.append(connection.info.server_version // 10_000)
    assert versions == [debian_postgres.major, postgres.major]


def test_every_database_fixture_is_empty_and_its_own(database: str) -> None:
    with psycopg.connect(database) as connection:
        found = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
        assert found == (0,)


def test_every_bridge_database_has_the_schema_and_its_own_log(bridge_database: str) -> None:
    with psycopg.connect(bridge_database) as connection:
        assert connection.execute("SELECT count(*) FROM bridge.outbox").fetchone() == (0,)


async def test_nats_keeps_its_stream_through_a_kill(server_folder: Path, unique: str) -> None:
    with NatsServer(server_folder / unique) as server:
        client = await nats.connect(server.url)
        await client.jetstream().add_stream(name=unique, subjects=[unique])
        await client.jetstream().publish(unique, b"kept")
        await client.close()
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        client = await nats.connect(server.url)
        assert client.max_payload == 8 * 1024 * 1024
        assert (await client.jetstream().get_msg(unique, 1)).data == b"kept"
        await client.close()


@pytest.mark.rabbitmq
async def test_rabbitmq_keeps_a_durable_queue_through_a_kill_and_ends_its_port_mapper(
    server_folder: Path, unique: str
) -> None:
    server = RabbitMQServer(server_folder / unique)
    await asyncio.to_thread(server.start)
    try:
        connection = await aio_pika.connect(server.url)
        await (await connection.channel()).declare_queue(unique, durable=True)
        await connection.close()
        # RabbitMQ 3.10 confirms a declaration before its log holds the decision to commit it: one in 75 kills at once
        # after it left a queue that the next start presumed aborted.
        await asyncio.to_thread(server.ctl, "eval", "mnesia:dump_log().")
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        connection = await aio_pika.connect(server.url)
        await (await connection.channel()).declare_queue(unique, passive=True)
        await connection.close()
    finally:
        await asyncio.to_thread(server.stop)
    named = [
        process
        for process in Path("/proc").glob("[0-9]*")
        if str(server.folder).encode() in _read(process / "environ") and _state(process) != "Z"
    ]
    assert named == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def _state(process: Path) -> str:
    return _read(process / "stat").rpartition(b")")[2].split()[0].decode() if _read(process / "stat") else "Z"


@pytest.mark.rabbitmq
def test_rabbitmq_raises_and_clears_its_memory_alarm(rabbitmq: RabbitMQServer) -> None:
    def alarms() -> str:
        return rabbitmq.ctl("eval", "rabbit_alarm:get_alarms().")

    rabbitmq.alarm(True)
    assert "memory" in alarms()
    rabbitmq.alarm(False)
    assert "memory" not in alarms()
    with pytest.raises(UnavailableError, match="rabbitmqctl no_such_command ended with"):
        rabbitmq.ctl("no_such_command")


@pytest.mark.pubsub
def test_the_pubsub_emulator_creates_a_topic(pubsub_emulator: PubSubEmulator, unique: str) -> None:
    url = f"http://{pubsub_emulator.address}/v1/projects/test/topics/{unique}"
    request = urllib.request.Request(url, method="PUT", data=b"{}", headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310 - http, above
        assert response.status == 200


def test_a_server_that_is_not_started_says_so(server_folder: Path, unique: str) -> None:
    server: Server = NatsServer(server_folder / unique)
    with pytest.raises(RuntimeError, match="nats is not started"):
        server.kill()


def test_free_ports_are_never_given_twice() -> None:
    ports = [free_port() for _ in range(200)]
    assert len(set(ports)) == 200


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionResetError):
        while chunk := await reader.read(65_536):
            writer.write(chunk)
            await writer.drain()
    writer.close()


async def _with_echo(test: Callable[[Proxy], Awaitable[None]]) -> None:
    port = free_port()
    async with await asyncio.start_server(_echo, "127.0.0.1", port), Proxy("127.0.0.1", port) as proxy:
        await asyncio.wait_for(test(proxy), 20)


async def test_the_proxy_delays_both_ways_in_order_and_without_limiting_throughput() -> None:
    async def test(proxy: Proxy) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        proxy.delay_to_server = proxy.delay_to_client = 0.1
        sent = bytes(range(256)) * 20_000
        started = time.monotonic()
        writer.write(sent)
        writer.write_eof()
        first = await reader.read(1)
        assert time.monotonic() - started >= 0.2
        assert first + await reader.read() == sent
        # Forwarding its 80 chunks one round trip after the other would take 16 s.
        assert time.monotonic() - started < 4
        writer.close()

    await _with_echo(test)


async def test_the_proxy_cuts_connections_and_refuses_new_ones() -> None:
    async def test(proxy: Proxy) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        assert proxy.connections == proxy.accepted == 1
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        await until(lambda: proxy.connections == 0)
        proxy.refuse = True
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        proxy.refuse = False
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"b")
        assert await reader.readexactly(1) == b"b"
        writer.close()

    await _with_echo(test)


async def test_the_proxy_as_a_blackhole_accepts_and_passes_nothing_until_it_ends() -> None:
    async def test(proxy: Proxy) -> None:
        proxy.blackhole = True
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"held back")
        answer = asyncio.create_task(reader.readexactly(9))
        done, _ = await asyncio.wait([answer], timeout=0.3)
        assert not done
        proxy.blackhole = False
        assert await answer == b"held back"
        writer.close()

    await _with_echo(test)


PORTS_OF_ANOTHER_PROCESS = """
from tests.support.servers import free_port
print(*[free_port() for _ in range(300)], flush=True)
input()
"""


def test_no_two_processes_are_given_one_port_though_nobody_listens_yet() -> None:
    command = [sys.executable, "-c", PORTS_OF_ANOTHER_PROCESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = {int(port) for port in other.stdout.readline().split()}
        ours = {free_port() for _ in range(300)}
        other.communicate("\n")
    assert (len(theirs), len(ours)) == (300, 300)
    assert not theirs & ours
