"""The kinds of fault: how each is done, to what, and how often among a hundred or so."""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psycopg

from tests.faults.brokers import RabbitMQ
from tests.faults.fates import FATES
from tests.faults.load import burst, many, poison
from tests.faults.world import World, send, wake
from tests.support.proxy import Proxy
from workers.session import HEARTBEAT

_TERMINATE = "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'pgbridge%'"

ALL = ("rabbitmq", "nats", "pubsub")
KEEPING = ("rabbitmq", "nats")
"""The brokers that keep what they hold when they are killed, and of which a part can be full."""

_BURST, _BURST_KEYS = 1500, 20
"""Events at once behind which a broker is slow, and their keys: more than are in flight before a confirm has come."""


@dataclass(frozen=True)
class Kind:
    """One kind of fault. `do` returns when nothing is broken any more, save what has to recover by itself."""

    name: str
    target: str
    weight: int
    do: Callable[[World], Awaitable[None]]
    is_slowness: bool = False
    """Nothing breaks, all is only late: the bridge has no reason to publish anything twice."""
    is_aside: bool = False
    """The probe's way is not concerned: its event must arrive while this goes on."""
    shows: bool = False
    """It lasts so long that the health of some worker must show it, not each time but once in a run."""
    brokers: tuple[str, ...] = ALL


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


async def _stop_worker(world: World) -> None:
    send(world.random.choice(world.workers), signal.SIGTERM)


async def _freeze_worker(world: World, least: float = 0.3, most: float = 4.0) -> None:
    worker = world.random.choice(world.workers)
    pid = send(worker, signal.SIGSTOP)
    await asyncio.sleep(world.random.uniform(least, most))
    wake(worker, pid)


async def _freeze_worker_past_its_session(world: World) -> None:
    await _freeze_worker(world, 3 * HEARTBEAT + 3, 3 * HEARTBEAT + 6)


async def _many_fail(world: World) -> None:
    """More than the workers have places for."""
    fates = [FATES[name] for name in ("fails once", "asks once", "breaks once", "fails")] * 20
    await many(world.dsn, world.ledger, world.next_name("many"), fates)


async def _many_fail_under_alarm(world: World) -> None:
    assert isinstance(world.broker, RabbitMQ)
    await _many_fail(world)
    async with world.broker.alarm():
        await asyncio.sleep(world.random.uniform(4.0, 12.0))


async def _refuse_letters(world: World) -> None:
    async with world.broker.letters_refused():
        await many(world.dsn, world.ledger, world.next_name("refused"), [FATES["rejected"]] * 5)
        await asyncio.sleep(world.random.uniform(3.0, 6.0))


async def _cut_workers(world: World) -> None:
    world.worker_wire.cut()


async def _swallow_workers(world: World) -> None:
    await _swallow(world, world.worker_wire)


async def _refuse_workers(world: World) -> None:
    world.worker_wire.refuse = True
    try:
        world.worker_wire.cut()
        await asyncio.sleep(world.random.uniform(2.0, 5.0))
    finally:
        world.worker_wire.refuse = False


async def _kill_database(world: World) -> None:
    await asyncio.to_thread(world.postgres.kill)
    await asyncio.sleep(world.random.uniform(0, 1.0))
    await asyncio.to_thread(world.postgres.start)


async def _kill_database_and_bridges(world: World) -> None:
    """The bridges start while the database recovers: as after a power cut, or at a failover."""
    await asyncio.to_thread(world.postgres.kill)
    for bridge in world.bridges:
        send(bridge, signal.SIGKILL)
    await asyncio.to_thread(world.postgres.start)


async def _freeze_database(world: World, least: float = 0.3, most: float = 4.0) -> None:
    world.postgres.freeze()
    try:
        await asyncio.sleep(world.random.uniform(least, most))
    finally:
        world.postgres.thaw()


async def _freeze_database_long(world: World) -> None:
    await _freeze_database(world, 6.0, 14.0)


async def _end_sessions(world: World) -> None:
    try:
        async with await psycopg.AsyncConnection.connect(world.dsn, connect_timeout=3) as connection:
            await connection.execute(_TERMINATE)
    except psycopg.OperationalError:
        world.database_wire.cut()


async def _take_all_slots(world: World) -> None:
    """Whoever connects meanwhile is refused; who is connected stays."""
    ends = asyncio.get_running_loop().time() + world.random.uniform(2.0, 5.0)
    async with contextlib.AsyncExitStack() as taken:
        while (left := ends - asyncio.get_running_loop().time()) > 0:
            try:
                connecting = psycopg.AsyncConnection.connect(world.dsn, autocommit=True, connect_timeout=2)
                await taken.enter_async_context(await connecting)
            except psycopg.OperationalError:
                # A session that ends frees a slot, which is taken at once.
                await asyncio.sleep(min(0.02, left))


async def _cut_database(world: World) -> None:
    world.database_wire.cut()


async def _swallow(world: World, wire: Proxy) -> None:
    wire.blackhole = True
    await asyncio.sleep(world.random.uniform(1.0, 6.0))
    wire.blackhole = False


async def _swallow_database(world: World) -> None:
    await _swallow(world, world.database_wire)


async def _kill_broker(world: World) -> None:
    await asyncio.to_thread(world.broker.server.kill)
    await asyncio.to_thread(world.broker.server.start)


async def _freeze_broker(world: World, least: float = 0.3, most: float = 6.0) -> None:
    world.broker.server.freeze()
    try:
        await asyncio.sleep(world.random.uniform(least, most))
    finally:
        world.broker.server.thaw()


async def _freeze_broker_long(world: World) -> None:
    await _freeze_broker(world, 6.0, 14.0)


async def _cut_broker(world: World) -> None:
    world.broker_wire.cut()


async def _swallow_broker(world: World) -> None:
    await _swallow(world, world.broker_wire)


async def _poison(world: World) -> None:
    await poison(world.dsn, world.ledger, world.next_name("poison"))


async def _burst(world: World) -> None:
    await burst(world.dsn, world.ledger, world.next_name("burst"), _BURST, _BURST_KEYS)


async def _slow_to_broker(world: World) -> None:
    """Some 50 to 200 events a second reach the broker."""
    world.broker_wire.rate_to_server = world.random.randint(30_000, 120_000)
    try:
        await _burst(world)
        await asyncio.sleep(world.random.uniform(6.0, 9.0))
    finally:
        world.broker_wire.rate_to_server = None


async def _slow_confirms(world: World) -> None:
    """Confirms come one by one, at a few a second."""
    world.broker_wire.rate_to_client = world.random.randint(300, 1200)
    try:
        await _burst(world)
        await asyncio.sleep(world.random.uniform(6.0, 9.0))
    finally:
        world.broker_wire.rate_to_client = None


async def _mostly_frozen_broker(world: World) -> None:
    await _burst(world)
    ends = asyncio.get_running_loop().time() + world.random.uniform(6.0, 9.0)
    while asyncio.get_running_loop().time() < ends:
        world.broker.server.freeze()
        try:
            await asyncio.sleep(0.95)
        finally:
            world.broker.server.thaw()
        await asyncio.sleep(0.05)


async def _alarm(world: World) -> None:
    assert isinstance(world.broker, RabbitMQ)
    async with world.broker.alarm():
        await _burst(world)
        await asyncio.sleep(world.random.uniform(4.0, 8.0))


async def _full(world: World) -> None:
    async with world.broker.full(world.audits):
        await asyncio.sleep(world.random.uniform(4.0, 8.0))


async def _second_sink_dead(world: World) -> None:
    world.second_wire.refuse = True
    try:
        world.second_wire.cut()
        await asyncio.sleep(world.random.uniform(4.0, 8.0))
    finally:
        world.second_wire.refuse = False


async def _bridge_killed_while_second_sink_dead(world: World) -> None:
    world.second_wire.refuse = True
    try:
        world.second_wire.cut()
        await _kill_bridge(world)
        await asyncio.sleep(world.random.uniform(5.0, 8.0))
    finally:
        world.second_wire.refuse = False


async def _several(world: World) -> None:
    """Three at once, each of another target."""
    free = [kind for kind in SHORT if world.broker.name in kind.brokers and kind.target not in world.busy]
    world.random.shuffle(free)
    chosen = list({kind.target: kind for kind in free}.values())[:3]
    targets = {kind.target for kind in chosen}
    world.busy |= targets
    try:
        await asyncio.gather(*(kind.do(world) for kind in chosen))
    finally:
        world.busy -= targets


KINDS = [
    Kind("bridge: kill -9", "bridge", 14, _kill_bridge),
    Kind("bridge: SIGTERM", "bridge", 5, _stop_bridge),
    Kind("bridge: frozen 0.3-4 s", "bridge", 6, _freeze_bridge),
    Kind("bridge: frozen past its session", "bridge", 2, _freeze_bridge_past_its_session),
    Kind("worker: kill -9", "worker", 9, _kill_worker),
    Kind("worker: SIGTERM", "worker", 5, _stop_worker),
    Kind("worker: frozen 0.3-4 s", "worker", 4, _freeze_worker),
    Kind("worker: frozen past its session", "worker", 1, _freeze_worker_past_its_session),
    Kind("worker: many events fail", "worker", 3, _many_fail),
    Kind("worker: dead letters refused 3-6 s", "letters", 3, _refuse_letters, brokers=KEEPING),
    Kind("workers' wire: cut", "worker wire", 4, _cut_workers),
    Kind("workers' wire: swallows 1-6 s", "worker wire", 3, _swallow_workers),
    Kind("workers' wire: refuses 2-5 s", "worker wire", 3, _refuse_workers),
    Kind("database: kill -9", "database", 7, _kill_database),
    Kind("database: kill -9 with both bridges", "database", 4, _kill_database_and_bridges),
    Kind("database: frozen 0.3-4 s", "database", 4, _freeze_database),
    Kind("database: frozen 6-14 s", "database", 2, _freeze_database_long, shows=True),
    Kind("database: sessions ended", "database", 5, _end_sessions),
    Kind("database: no slots left 2-5 s", "database", 4, _take_all_slots),
    Kind("database: wire cut", "database wire", 4, _cut_database),
    Kind("database: wire swallows 1-6 s", "database wire", 3, _swallow_database),
    Kind("broker: kill -9", "broker", 7, _kill_broker, brokers=KEEPING),
    Kind("broker: frozen 0.3-6 s", "broker", 4, _freeze_broker),
    Kind("broker: frozen 6-14 s", "broker", 3, _freeze_broker_long, shows=True),
    Kind("broker: wire cut", "broker wire", 4, _cut_broker),
    Kind("broker: wire swallows 1-6 s", "broker wire", 2, _swallow_broker),
    Kind("log: poison", "log", 4, _poison),
    Kind("broker: slow to take, 6-9 s", "broker wire", 4, _slow_to_broker, is_slowness=True),
    Kind("broker: slow to confirm, 6-9 s", "broker wire", 4, _slow_confirms, is_slowness=True),
    Kind("broker: frozen 0.95 of 6-9 s", "broker", 4, _mostly_frozen_broker, is_slowness=True),
    Kind("broker: memory alarm 4-8 s", "broker", 3, _alarm, is_slowness=True, brokers=("rabbitmq",)),
    Kind("broker: memory alarm as many fail", "broker", 2, _many_fail_under_alarm, brokers=("rabbitmq",)),
    Kind("second sink: full 4-8 s", "second", 5, _full, is_aside=True, brokers=KEEPING),
    Kind("second sink: dead 4-8 s", "second", 4, _second_sink_dead, is_aside=True),
    Kind("second sink: dead at a start", "second", 3, _bridge_killed_while_second_sink_dead),
    Kind("three at once", "several", 5, _several),
]
SHORT = [
    kind
    for kind in KINDS
    if not (kind.is_slowness or kind.is_aside or kind.shows)
    and kind.target not in ("log", "several", "second")
    and "past its session" not in kind.name
]
"""Those that may be done several at once."""
