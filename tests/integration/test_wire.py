"""Prepared statements on a connection of ours, on a real PostgreSQL; what workers need of them: test_worker_line.py."""

import asyncio
from collections.abc import AsyncIterator

import psycopg
import pytest
import pytest_asyncio
from psycopg import AsyncConnection
from psycopg.pq import TransactionStatus
from pydantic import SecretStr

from bridge.postgres.connection import connect
from bridge.postgres.wire import Connection
from bridge.settings import PostgresSettings
from tests.support.proxy import Proxy
from tests.support.servers import PostgresServer
from tests.support.until import until


@pytest_asyncio.fixture
async def wire(postgres: PostgresServer) -> AsyncIterator[Proxy]:
    async with Proxy(postgres.host, postgres.port) as wire:
        yield wire


@pytest_asyncio.fixture
async def connection(wire: Proxy, postgres: PostgresServer) -> AsyncIterator[Connection]:
    dsn = postgres.dsn().replace(str(postgres.port), str(wire.port))
    async with await connect(PostgresSettings(dsn=SecretStr(dsn)), "test") as connection:
        yield connection


async def is_active(connection: Connection) -> None:
    await until(lambda: connection.pgconn.transaction_status == TransactionStatus.ACTIVE, "it is on its way")


@pytest.mark.parametrize("prepared", [False, True])
async def test_a_statement_that_was_cancelled_on_its_way_can_be_run_again(
    connection: Connection, wire: Proxy, prepared: bool
) -> None:
    if prepared:
        assert await connection.rows("select $1::int", 1) == [(1,)]
    wire.delay_to_client = 0.2
    for _ in range(3):
        running = asyncio.create_task(connection.rows("select $1::int", 2))
        await is_active(connection)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not connection.closed
    assert await connection.rows("select $1::int", 3) == [(3,)]


async def test_a_statement_that_was_cancelled_and_is_refused_leaves_the_connection(
    connection: Connection, wire: Proxy
) -> None:
    wire.delay_to_client = 0.1
    for run in (connection.execute("select 1 / 0"), connection.rows("select 1 / 0")):
        running = asyncio.ensure_future(run)
        await is_active(connection)
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()
        assert await connection.rows("select 1") == [(1,)]


async def test_what_runs_long_is_called_off_on_the_server_too(connection: Connection, postgres: PostgresServer) -> None:
    running = asyncio.create_task(connection.rows("select pg_sleep($1)", 120))
    with psycopg.connect(postgres.dsn(), autocommit=True) as other:
        query = "select count(*) from pg_stat_activity where pid = %s and state = 'active' and wait_event = 'PgSleep'"
        await until(lambda: other.execute(query, [connection.info.backend_pid]).fetchone() == (1,), "it sleeps")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert other.execute(query, [connection.info.backend_pid]).fetchone() == (0,)
    assert await connection.rows("select 1") == [(1,)]


async def test_psycopgs_own_statements_take_turns_with_ours(connection: Connection) -> None:
    async def theirs(number: int) -> int:
        row = await (await connection.execute("select %s::int", [number])).fetchone()
        assert row is not None
        return int(row[0])

    async def ours(number: int) -> int:
        ((value,),) = await connection.rows("select $1::int", number)
        return int(value)

    found = await asyncio.gather(*[(theirs if number % 2 else ours)(number) for number in range(100)])
    assert found == list(range(100))
    with pytest.raises(psycopg.errors.DivisionByZero):
        await connection.rows("select 1 / $1::int", 0)
    assert await connection.rows("select 1") == [(1,)]


async def test_notifications_are_heard_between_prepared_statements(
    connection: Connection, postgres: PostgresServer
) -> None:
    await connection.execute("listen test_wire")
    for number in range(3):
        assert await connection.rows("select 1") == [(1,)]
        with psycopg.connect(postgres.dsn(), autocommit=True) as other:
            other.execute("select pg_notify('test_wire', %s)", [str(number)])
        heard = [one.payload async for one in connection.notifies(timeout=10, stop_after=1)]
        assert heard == [str(number)]


class Hearing(Connection):
    """Tells when it has read something that no statement waited for."""

    has_heard: asyncio.Event

    def _hear(self) -> None:
        super()._hear()
        self.has_heard.set()


async def test_a_notification_that_comes_while_nobody_waits_is_not_forgotten(database: str) -> None:
    async with (
        await Hearing.connect(database, autocommit=True) as listening,
        await AsyncConnection.connect(database, autocommit=True) as sender,
    ):
        listening.has_heard = asyncio.Event()
        await listening.execute("listen news")
        await sender.execute("notify news, 'one'")
        await listening.has_heard.wait()
        heard = [each.payload async for each in listening.notifies(timeout=0.1, stop_after=1)]
    assert heard == ["one"]
