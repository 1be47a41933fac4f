"""A server without a free connection slot: a bridge that has its sessions goes on, and says what it could not do."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from bridge.postgres.schema import migrate
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings
from tests.support.metrics import get
from tests.support.servers import NOT_DURABLE, PostgresServer, free_port
from tests.support.until import until

MORE = """
[outbox]
heartbeat = "300ms"
prune_interval = "300ms"
[channels]
listen = ["Orders"]
heartbeat = "300ms"
{buffer}
[observe]
listen = "127.0.0.1:{port}"
"""


@pytest.fixture(scope="module")
def small(server_folder: Path) -> Iterator[PostgresServer]:
    """A server with few slots, three of which are the superuser's."""
    with PostgresServer(server_folder / "slots", settings={**NOT_DURABLE, "max_connections": "15"}) as server:
        migrate(server.dsn())
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute("create role relay login in role bridge_relay")
            admin.execute("create role crowd login")
        yield server


@contextlib.contextmanager
def no_free_slot(dsn: str) -> Iterator[None]:
    """Takes every slot that is free."""

    def take_all(crowd: contextlib.ExitStack) -> None:
        while True:
            crowd.enter_context(psycopg.connect(conninfo.make_conninfo(dsn, user="crowd")))

    with contextlib.ExitStack() as crowd:
        with pytest.raises(psycopg.OperationalError, match="slots are reserved"):
            take_all(crowd)
        yield


async def problems(port: int) -> list[str]:
    _, body = await get(port, "/health")
    told = json.loads(body)["problems"]
    assert isinstance(told, list)
    return told


async def test_a_leading_bridge_goes_on_while_every_slot_is_taken(
    small: PostgresServer, messages: Messages, tmp_path: Path
) -> None:
    port = free_port()
    text = settings(
        conninfo.make_conninfo(small.dsn(), user="relay"), messages, MORE.format(port=port, buffer='buffer = "outbox"')
    )
    with Daemon(tmp_path, text) as bridge:
        await asyncio.to_thread(bridge.wait_for, "channels.listening")
        with no_free_slot(small.dsn()):
            for number in range(10):
                await execute(small.dsn(), "select bridge.emit('a', %s), pg_notify('Orders', %s)", *[str(number)] * 2)
                # In all ten heartbeats and ten rounds of pruning.
                await asyncio.sleep(0.3)
            taken = await messages.take(20)
            assert sorted(int(message.body) for message in taken) == sorted([*range(10), *range(10)])
            (problem,) = await problems(port)
            assert problem.startswith("prune: lost for ")
            assert "has no free connection slot" in problem
        await until(lambda: _is_calm(port))
        said = [line["action"] for line in bridge.lines() if line["level"] in ("warning", "error")]
        assert said == ["prune.lost"]
        bridge.wait_for("prune.restored")
        assert bridge.stop() == 0


async def _is_calm(port: int) -> bool:
    return not await problems(port)


async def test_a_bridge_without_the_outbox_goes_on_while_every_slot_is_taken(
    small: PostgresServer, messages: Messages, tmp_path: Path
) -> None:
    port = free_port()
    more = MORE.format(port=port, buffer='buffer = "memory"').replace("[outbox]", "").replace("prune_interval", "#")
    more = more.replace('\nheartbeat = "300ms"\n', "\n", 1)
    text = settings(conninfo.make_conninfo(small.dsn(), user="relay"), messages, more)
    with Daemon(tmp_path, text) as bridge:
        await asyncio.to_thread(bridge.wait_for, "channels.listening")
        with no_free_slot(small.dsn()):
            for number in range(10):
                await execute(small.dsn(), "select pg_notify('Orders', %s)", str(number))
                await asyncio.sleep(0.3)
            assert [int(message.body) for message in await messages.take(10)] == list(range(10))
            assert await problems(port) == []
        assert [line for line in bridge.lines() if line["level"] in ("warning", "error")] == []
        assert bridge.stop() == 0


async def test_a_lost_session_of_the_channels_is_opened_anew_while_the_log_is_carried_on(
    small: PostgresServer, messages: Messages, tmp_path: Path
) -> None:
    port = free_port()
    text = settings(
        conninfo.make_conninfo(small.dsn(), user="relay"), messages, MORE.format(port=port, buffer='buffer = "outbox"')
    )
    with Daemon(tmp_path, text) as bridge:
        await asyncio.to_thread(bridge.wait_for, "channels.listening")
        with psycopg.connect(small.dsn(), autocommit=True) as admin:
            admin.execute("alter role relay connection limit 1")
            admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pgbridge test intake'"
            )
            await asyncio.to_thread(bridge.wait_for, "channels.lost")
            await execute(small.dsn(), "select bridge.emit('a', '1')")
            assert [message.body for message in await messages.take(1)] == [b"1"]
            told = "\n".join(await problems(port))
            assert "channels: lost for " in told
            assert "has no free connection slot" in told
            admin.execute("alter role relay connection limit -1")
        await asyncio.to_thread(bridge.wait_for, "channels.restored")
        await execute(small.dsn(), "select pg_notify('Orders', '2')")
        assert [message.body for message in await messages.take(1)] == [b"2"]
        assert [line for line in bridge.lines() if line["action"] == "postgres.lost"] == []
        assert len([line for line in bridge.lines() if line["action"] == "bridge.leading"]) == 1
        assert bridge.stop() == 0
