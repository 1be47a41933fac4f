"""The kinds of fault: how each is done, to what, and how often among a hundred."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psycopg

from tests.faults.world import World, send, wake

_TERMINATE = "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'pgbridge%'"


@dataclass(frozen=True)
class Kind:
    """One kind of fault. `do` returns when nothing is broken any more, save what has to recover by itself."""

    name: str
    target: str
    weight: int
    do: Callable[[World], Awaitable[None]]


async def _kill_bridge(world: World) -> None:
    send(await asyncio.to_thread(world.leader), signal.SIGKILL)


async def _stop_bridge(world: World) -> None:
    send(await asyncio.to_thread(world.leader), signal.SIGTERM)


async def _freeze_bridge(world: World, least: float = 0.3, most: float = 4.0) -> None:
    bridge = await asyncio.to_thread(world.leader)
    pid = send(bridge, signal.SIGSTOP)
    await asyncio.sleep(world.random.uniform(least, most))
    wake(bridge, pid)


async def _freeze_bridge_past_its_session(world: World) -> None:
    await _freeze_bridge(world, 16.5, 19.0)


async def _kill_worker(world: World) -> None:
    send(world.random.choice(world.workers), signal.SIGKILL)


async def _freeze_worker(world: World) -> None:
    worker = world.random.choice(world.workers)
    pid = send(worker, signal.SIGSTOP)
    await asyncio.sleep(world.random.uniform(0.3, 4.0))
    wake(worker, pid)


async def _kill_database(world: World) -> None:
    await asyncio.to_thread(world.postgres.kill)
    await asyncio.sleep(world.random.uniform(0, 1.0))
    await asyncio.to_thread(world.postgres.start)


async def _freeze_database(world: World) -> None:
    world.postgres.freeze()
    await asyncio.sleep(world.random.uniform(0.3, 4.0))
    world.postgres.thaw()


async def _end_sessions(world: World) -> None:
    try:
        async with await psycopg.AsyncConnection.connect(world.dsn, connect_timeout=3) as connection:
            await connection.execute(_TERMINATE)
    except psycopg.OperationalError:
        world.database_wire.cut()


async def _cut_database(world: World) -> None:
    world.database_wire.cut()


async def _swallow_database(world: World) -> None:
    world.database_wire.blackhole = True
    await asyncio.sleep(world.random.uniform(1.0, 6.0))
    world.database_wire.blackhole = False


async def _kill_broker(world: World) -> None:
    await asyncio.to_thread(world.rabbitmq.kill)
    await asyncio.to_thread(world.rabbitmq.start)


async def _freeze_broker(world: World) -> None:
    world.rabbitmq.freeze()
    await asyncio.sleep(world.random.uniform(0.3, 6.0))
    world.rabbitmq.thaw()


async def _cut_broker(world: World) -> None:
    world.broker_wire.cut()


async def _swallow_broker(world: World) -> None:
    world.broker_wire.blackhole = True
    await asyncio.sleep(world.random.uniform(1.0, 6.0))
    world.broker_wire.blackhole = False


KINDS = [
    Kind("bridge: kill -9", "bridge", 18, _kill_bridge),
    Kind("bridge: SIGTERM", "bridge", 6, _stop_bridge),
    Kind("bridge: frozen 0.3-4 s", "bridge", 8, _freeze_bridge),
    Kind("bridge: frozen past its session", "bridge", 2, _freeze_bridge_past_its_session),
    Kind("worker: kill -9", "worker", 12, _kill_worker),
    Kind("worker: frozen 0.3-4 s", "worker", 6, _freeze_worker),
    Kind("database: kill -9", "database", 9, _kill_database),
    Kind("database: frozen 0.3-4 s", "database", 5, _freeze_database),
    Kind("database: sessions ended", "database", 6, _end_sessions),
    Kind("database: wire cut", "database wire", 6, _cut_database),
    Kind("database: wire swallows 1-6 s", "database wire", 3, _swallow_database),
    Kind("broker: kill -9", "broker", 8, _kill_broker),
    Kind("broker: frozen 0.3-6 s", "broker", 4, _freeze_broker),
    Kind("broker: wire cut", "broker wire", 5, _cut_broker),
    Kind("broker: wire swallows 1-6 s", "broker wire", 2, _swallow_broker),
]
"""The weights add up to a hundred."""
