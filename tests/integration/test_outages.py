"""Every outage of database and broker: nothing lost, one log line when it began, one how long it lasted."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo, sql
from pydantic import SecretStr
from structlog.testing import capture_logs

import bridge.daemon
import bridge.postgres.connection
from bridge.daemon import Daemon as InProcessDaemon
from bridge.errors import DatabaseUnavailableError, NoAnswerError
from bridge.postgres.schema import migrate
from bridge.settings import PostgresSettings, load
from bridge.sources.log import PageBytes
from bridge.sources.outbox import Outbox
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings, stored_mark
from tests.support.metrics import MEMORY, metric
from tests.support.outbox import lead, open_outbox
from tests.support.proxy import Proxy
from tests.support.servers import PostgresServer, RabbitMQServer, free_port
from tests.support.standby import StandbyServer
from tests.support.until import rows_become, until

BRISK = "[relay]\nretry_max = 0.5"
READ = "pgbridge_events_read_total"
ORDER = "select bridge.emit('load', n::text, 'key-' || n %% 5) from generate_series({}, {}) n order by n"


def of(daemon: Daemon, *actions: str) -> list[str]:
    """Its log lines with these actions."""
    return [line["action"] for line in daemon.lines() if line["action"] in actions]


async def emit(dsn: str, first: int, last: int) -> None:
    await execute(dsn, ORDER.format(first, last))


async def take(messages: Messages, count: int) -> list[int]:
    """The distinct bodies, in the order of their first appearance; every key's order is checked."""
    taken = await messages.take_distinct(count)
    numbers = list(dict.fromkeys(int(message.body) for message in taken))
    for key in range(5):
        own = [number for number in numbers if number % 5 == key]
        assert own == sorted(own)
    return sorted(numbers)


@pytest.fixture(scope="module")
def durable(server_folder: Path) -> Iterator[PostgresServer]:
    with PostgresServer(server_folder / "outages") as server:
        migrate(server.create_database("durable"))
        yield server


@pytest.fixture
def durable_database(durable: PostgresServer, unique: str) -> Iterator[str]:
    yield durable.copy_database(unique, "durable")
    durable.drop_database(unique)


@pytest.mark.parametrize("how", ["restart", "crash", "sessions ended", "wire cut"])
async def test_an_outage_of_the_database_loses_nothing_and_is_told_in_two_lines(
    durable: PostgresServer, durable_database: str, messages: Messages, tmp_path: Path, how: str
) -> None:
    async with Proxy(durable.host, durable.port) as wire:
        dsn = durable_database.replace(str(durable.port), str(wire.port))
        with Daemon(tmp_path, settings(dsn, messages)) as bridge:
            await asyncio.to_thread(bridge.wait_for, "bridge.leading")
            await emit(durable_database, 1, 1000)
            taking = asyncio.create_task(take(messages, 2000))
            match how:
                case "restart":
                    await asyncio.to_thread(durable.restart)
                case "crash":
                    await asyncio.to_thread(durable.kill)
                    await asyncio.to_thread(durable.start)
                case "sessions ended":
                    # One after the other, since any of them alone must be enough.
                    for name in ("pgbridge test", "pgbridge test bell"):
                        leads = len(of(bridge, "bridge.leading"))
                        await execute(
                            durable_database,
                            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = %s",
                            name,
                        )
                        await asyncio.to_thread(bridge.wait_for, "bridge.leading", 20.0, count=leads + 1)
                case "wire cut":
                    wire.cut()
            await emit(durable_database, 1001, 2000)
            assert await taking == list(range(1, 2001))
            outages = 2 if how == "sessions ended" else 1
            await asyncio.to_thread(bridge.wait_for, "postgres.restored", 20.0, count=outages)
            assert of(bridge, "postgres.lost", "postgres.restored") == ["postgres.lost", "postgres.restored"] * outages
            assert 0 < bridge.wait_for("postgres.restored")["seconds"] < 20
            assert await asyncio.to_thread(bridge.stop) == 0


async def test_a_cut_of_all_connections_in_one_moment_is_come_back_from_each_time(
    bridge_database: str, postgres: PostgresServer, messages: Messages, tmp_path: Path
) -> None:
    """The loss of the listening for pg_notify, which is come back from beside the relay, falls into the same moment as
    the loss that ends the lead, and that one must end it."""
    async with Proxy(postgres.host, postgres.port) as wire:
        dsn = bridge_database.replace(str(postgres.port), str(wire.port))
        with Daemon(tmp_path, settings(dsn, messages, "[channels]\nlisten = ['Orders']")) as bridge:
            for count in range(1, 11):
                await asyncio.to_thread(bridge.wait_for, "channels.listening", 20.0, count=count)
                wire.cut()
                await asyncio.to_thread(bridge.wait_for, "bridge.leading", 20.0, count=count + 1)
            await asyncio.to_thread(bridge.wait_for, "channels.listening", 20.0, count=11)
            assert await asyncio.to_thread(bridge.stop) == 0


async def test_a_wire_that_swallows_everything_is_noticed_by_the_missing_answer(
    bridge_database: str,
    postgres: PostgresServer,
    messages: Messages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.postgres.connection, "ANSWER_LIMIT", 1.0)
    async with Proxy(postgres.host, postgres.port) as wire:
        config = tmp_path / "bridge.toml"
        config.write_text(settings(bridge_database.replace(str(postgres.port), str(wire.port)), messages))
        daemon, stop = InProcessDaemon(load(config)), asyncio.Event()
        running = asyncio.create_task(daemon.run(stop))
        try:
            await emit(bridge_database, 1, 10)
            assert await take(messages, 10) == list(range(1, 11))
            await until(lambda: stored_mark(bridge_database) >= 10)
            wire.blackhole = True
            noticed = time.monotonic()
            await until(lambda: any(problem.startswith("postgres: lost") for problem in daemon.health().problems))
            # The pulse comes every 2 s, and its answer may take 1 s here.
            assert time.monotonic() - noticed < 6
            assert str(daemon.health().unready).startswith("postgres: lost")
            await emit(bridge_database, 11, 20)
            wire.blackhole = False
            assert await take(messages, 10) == list(range(11, 21))
        finally:
            stop.set()
            await asyncio.wait_for(running, 20)


async def test_a_standby_tells_an_outage_of_the_broker_once_and_its_end(
    rabbitmq: RabbitMQServer,
    bridge_database: str,
    messages: Messages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge.daemon, "_SINKS_LOOK", 0.05)
    leader = await open_outbox(bridge_database)
    await lead(leader)
    async with Proxy(rabbitmq.host, rabbitmq.port) as wire:
        config = tmp_path / "bridge.toml"
        config.write_text(settings(bridge_database, messages).replace(str(rabbitmq.port), str(wire.port)))
        daemon, stop = InProcessDaemon(load(config)), asyncio.Event()
        with capture_logs() as lines:
            running = asyncio.create_task(daemon.run(stop))
            try:
                await until(lambda: daemon.health().role == "standby")
                assert daemon.health().unready is None
                wire.refuse = True
                wire.cut()
                await until(lambda: wire.refused >= 3)
                assert daemon.health().unready == "no sink is connected"
                wire.refuse = False
                await until(lambda: not daemon.health().problems)
                assert daemon.health().unready is None
                await until(lambda: any(line["event"] == "sink.restored" for line in lines))
            finally:
                stop.set()
                await asyncio.wait_for(running, 20)
                await leader.session.close()
        told = [line["event"] for line in lines if line["event"].startswith("sink.")]
        assert told == ["sink.lost", "sink.restored"]


async def test_a_cancelled_statement_does_not_wait_for_a_server_that_swallows_everything(
    bridge_database: str, postgres: PostgresServer
) -> None:
    async with Proxy(postgres.host, postgres.port) as wire:
        dsn = bridge_database.replace(str(postgres.port), str(wire.port))
        session = await bridge.postgres.connection.connect(PostgresSettings(dsn=SecretStr(dsn)), "test")
        waiting = asyncio.create_task(session.execute("select pg_sleep(120)"))
        with psycopg.connect(bridge_database, autocommit=True) as other:
            running = "select count(*) from pg_stat_activity where query like 'select pg_sleep%' and state = 'active'"
            await until(lambda: other.execute(running).fetchone() == (1,))
            wire.blackhole = True
            waiting.cancel()
            # psycopg by itself waits ten seconds.
            done, _ = await asyncio.wait([waiting], timeout=5)
            assert done
            assert waiting.cancelled()
            assert session.closed
            wire.cut()
            other.execute("select pg_terminate_backend(pid) from pg_stat_activity where query like 'select pg_sleep%'")


async def test_a_cancelled_statement_leaves_a_connection_that_can_be_used(bridge_database: str) -> None:
    session = await bridge.postgres.connection.connect(PostgresSettings(dsn=SecretStr(bridge_database)), "test")
    async with session:
        waiting = asyncio.create_task(session.execute("select pg_sleep(120)"))
        with psycopg.connect(bridge_database, autocommit=True) as other:
            running = "select count(*) from pg_stat_activity where query like 'select pg_sleep%' and state = 'active'"
            await until(lambda: other.execute(running).fetchone() == (1,))
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        assert await (await session.execute("select 1")).fetchone() == (1,)


async def test_a_statement_without_an_answer_is_given_up(
    bridge_database: str, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge.postgres.connection, "ANSWER_LIMIT", 0.2)
    async with Proxy(postgres.host, postgres.port) as wire:
        dsn = bridge_database.replace(str(postgres.port), str(wire.port))
        session = await Outbox.connect("test", PostgresSettings(dsn=SecretStr(dsn)))
        wire.blackhole = True
        began = time.monotonic()
        with (
            pytest.raises(DatabaseUnavailableError, match="did not answer within"),
            bridge.postgres.connection.answered(session),
        ):
            await session.execute("select 1")
        assert time.monotonic() - began < 2
        wire.blackhole = False
        await session.close()


async def test_a_page_that_takes_longer_than_the_limit_arrives_while_its_bytes_do(
    bridge_database: str, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge.postgres.connection, "ANSWER_LIMIT", 1.0)
    await execute(bridge_database, "select bridge.emit('a', repeat(n::text, 200000)) from generate_series(1, 9) n")
    async with Proxy(postgres.host, postgres.port) as wire:
        dsn = bridge_database.replace(str(postgres.port), str(wire.port))
        outbox = await open_outbox(dsn)
        source = await lead(outbox)
        wire.rate_to_client = 500_000
        began = time.monotonic()
        page = await source.read(100)
        assert time.monotonic() - began > 3
        assert [len(event.payload) for event in page.events] == [200_000] * 9
        await outbox.session.close()


async def test_a_page_that_does_not_come_is_asked_for_in_halves(
    bridge_database: str, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a way carries so much and then stops: the same page would be asked for without end."""
    monkeypatch.setattr(bridge.postgres.connection, "ANSWER_LIMIT", 0.3)
    await execute(bridge_database, "select bridge.emit('a', repeat(n::text, 200000)) from generate_series(1, 9) n")
    page_bytes = PageBytes(8_000_000)
    async with Proxy(postgres.host, postgres.port) as wire:
        dsn = bridge_database.replace(str(postgres.port), str(wire.port))
        for expected in (4_000_000, 2_000_000, 1_000_000):
            outbox = await open_outbox(dsn, page_bytes=page_bytes)
            source = await lead(outbox)
            wire.blackhole = True
            with pytest.raises(NoAnswerError):
                await source.read(100)
            assert page_bytes.now == expected
            wire.blackhole = False
            await outbox.session.close()
            wire.cut()
        outbox = await open_outbox(dsn, page_bytes=page_bytes)
        source = await lead(outbox)
        assert [len((await source.read(100)).events) for _ in range(2)] == [5, 4]
        assert page_bytes.now == 2_000_000, "it grows back"
        await outbox.session.close()


async def test_an_answer_that_stops_in_its_middle_is_given_up(
    bridge_database: str, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge.postgres.connection, "ANSWER_LIMIT", 1.0)
    async with Proxy(postgres.host, postgres.port) as wire:
        dsn = bridge_database.replace(str(postgres.port), str(wire.port))
        session = await bridge.postgres.connection.connect(PostgresSettings(dsn=SecretStr(dsn)), "test")
        wire.rate_to_client = 500_000

        async def read() -> None:
            with bridge.postgres.connection.answered(session):
                await session.execute("select repeat('x', 2000000)")

        reading = asyncio.create_task(read())
        await until(lambda: session.signs_of_life > 30)
        wire.blackhole = True
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailableError, match="did not answer within 1 s"):
            await reading
        assert 0.9 < time.monotonic() - began < 3
        wire.blackhole = False
        await session.close()


async def test_an_answer_that_came_while_the_process_was_frozen_is_taken(bridge_database: str) -> None:
    session = await bridge.postgres.connection.connect(PostgresSettings(dsn=SecretStr(bridge_database)), "test")
    async with session:
        asyncio.get_running_loop().call_later(0.2, time.sleep, 1.5)
        with bridge.postgres.connection.answered(session, limit=1.0):
            cursor = await session.execute("select 1 from pg_sleep(0.5)")
        assert await cursor.fetchone() == (1,)


async def test_a_failover_to_another_host_loses_nothing(
    server_folder: Path, unique: str, messages: Messages, tmp_path: Path
) -> None:
    folder = server_folder / unique
    with PostgresServer(folder) as primary:
        migrate(primary.create_database("shop"))
        with StandbyServer(folder, primary) as standby:
            primary_dsn, standby_dsn = primary.dsn("shop"), standby.dsn("shop")
            both = f"postgresql://postgres@{primary.host}:{primary.port},{standby.host}:{standby.port}/shop"
            with Daemon(tmp_path, settings(both, messages)) as bridge:
                bridge.wait_for("bridge.leading")
                await emit(primary_dsn, 1, 500)
                ((there,),) = await execute(primary_dsn, "select pg_current_wal_lsn()::text")
                await rows_become(standby_dsn, f"select pg_last_wal_replay_lsn() >= '{there}'", [(True,)])
                await asyncio.to_thread(primary.kill)
                await asyncio.to_thread(standby.promote)
                await asyncio.to_thread(bridge.wait_for, "bridge.leading", count=2)
                await emit(standby_dsn, 501, 1000)
                assert await take(messages, 1000) == list(range(1, 1001))
                assert of(bridge, "postgres.lost", "postgres.restored") == ["postgres.lost", "postgres.restored"]
                assert bridge.stop() == 0


async def test_a_changed_password_is_waited_out_and_told(
    postgres: PostgresServer, bridge_database: str, messages: Messages, unique: str, tmp_path: Path
) -> None:
    role = sql.Identifier(unique)
    password = sql.SQL("alter role {} password {}")
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(sql.SQL("create role {} login in role bridge_relay").format(role))
        admin.execute(password.format(role, sql.Literal("first")))
        hba = Path(str(admin.execute("show hba_file").fetchall()[0][0]))
        before = hba.read_text()
        hba.write_text(f"host all {unique} 127.0.0.1/32 scram-sha-256\n{before}")
        admin.execute("select pg_reload_conf()")
    try:
        dsn = conninfo.make_conninfo(bridge_database, user=unique, password="first")
        with Daemon(tmp_path, settings(dsn, messages)) as bridge:
            bridge.wait_for("bridge.leading")
            with psycopg.connect(bridge_database, autocommit=True) as admin:
                admin.execute(password.format(role, sql.Literal("second")))
                admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", (unique,))
            told = await asyncio.to_thread(bridge.wait_for, "postgres.refusing")
            assert "refuses the login" in told["reason"]
            assert "first" not in told["reason"]
            await emit(bridge_database, 1, 10)
            with psycopg.connect(bridge_database, autocommit=True) as admin:
                admin.execute(password.format(role, sql.Literal("first")))
            assert await take(messages, 10) == list(range(1, 11))
            assert bridge.stop() == 0
    finally:
        hba.write_text(before)
        with psycopg.connect(bridge_database, autocommit=True) as admin:
            admin.execute("select pg_reload_conf()")
            admin.execute(sql.SQL("drop role {}").format(role))


@contextlib.asynccontextmanager
async def carrying(
    dsn: str, messages: Messages, tmp_path: Path, url: str | None = None, more: str = BRISK
) -> AsyncIterator[Daemon]:
    """A bridge that has carried a first event and stops cleanly at the end."""
    text = settings(dsn, messages, more)
    if url is not None:
        text = text.replace(messages.url, url)
    with Daemon(tmp_path, text) as bridge:
        await asyncio.to_thread(bridge.wait_for, "bridge.leading")
        await emit(dsn, 1, 5)
        assert await take(messages, 5) == [1, 2, 3, 4, 5]
        yield bridge
        assert await asyncio.to_thread(bridge.stop) == 0


async def test_connections_closed_by_the_brokers_administrator_lose_nothing(
    rabbitmq: RabbitMQServer, bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    async with carrying(bridge_database, messages, tmp_path) as bridge:
        # The test's own goes first: aiormq would leave the exception of a closed one where nobody asks for it.
        await messages.connection.close()
        await asyncio.to_thread(rabbitmq.ctl, "close_all_connections", "maintenance")
        await emit(bridge_database, 6, 1000)
        await messages.open()
        assert await take(messages, 995) == list(range(6, 1001))
        await asyncio.to_thread(bridge.wait_for, "sink.restored")
        assert of(bridge, "sink.lost", "sink.restored") == ["sink.lost", "sink.restored"]
        assert "maintenance" in bridge.wait_for("sink.lost")["reason"]


async def test_a_broker_that_refuses_connections_for_a_while_is_told_once(
    rabbitmq: RabbitMQServer, bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    async with Proxy(rabbitmq.host, rabbitmq.port) as wire:
        url = messages.url.replace(str(rabbitmq.port), str(wire.port))
        async with carrying(bridge_database, messages, tmp_path, url) as bridge:
            accepted = wire.accepted
            wire.refuse = True
            wire.cut()
            await emit(bridge_database, 6, 1000)
            await asyncio.to_thread(bridge.wait_for, "sink.lost")
            await until(lambda: wire.refused >= 3)
            assert wire.accepted == accepted
            wire.refuse = False
            assert await take(messages, 995) == list(range(6, 1001))
            await asyncio.to_thread(bridge.wait_for, "sink.restored")
            said = of(bridge, "sink.lost", "sink.refusing", "sink.restored")
            assert said == ["sink.lost", "sink.restored"]


async def test_a_memory_alarm_stops_reading_and_loses_nothing(
    rabbitmq: RabbitMQServer, bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    port = free_port()
    more = f'{BRISK}\n[observe]\nlisten = "127.0.0.1:{port}"'

    async def full() -> bool:
        return await metric(port, "pgbridge_events_in_flight") > 375

    async with carrying(bridge_database, messages, tmp_path, more=more):
        await asyncio.to_thread(rabbitmq.alarm, True)
        try:
            await emit(bridge_database, 6, 12_000)
            await until(full, "the window is full")
            read, memory = [await metric(port, name) for name in (READ, MEMORY)]
            assert read < 12_000
            # For a second; that it goes on reading nothing has no sign but this.
            for _ in range(20):
                await asyncio.sleep(0.05)
                assert await metric(port, READ) == read
                assert await metric(port, MEMORY) < memory + 20_000_000
        finally:
            await asyncio.to_thread(rabbitmq.alarm, False)
        assert await take(messages, 11_995) == list(range(6, 12_001))


async def test_a_deleted_exchange_is_waited_for(
    rabbitmq: RabbitMQServer, bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    async with carrying(bridge_database, messages, tmp_path) as bridge:
        channel = await messages.connection.channel()
        await channel.exchange_delete(messages.exchange)
        await emit(bridge_database, 6, 100)
        told = await asyncio.to_thread(bridge.wait_for, "sink.refusing")
        assert "pgbridge topology --apply" in told["reason"]
        await messages.open()
        assert await take(messages, 95) == list(range(6, 101))


async def test_what_a_deleted_queue_would_have_taken_becomes_dead_letters(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    async with carrying(bridge_database, messages, tmp_path):
        await messages.queue.delete(if_unused=False, if_empty=False)
        await emit(bridge_database, 6, 30)
        await until(lambda: _dead(bridge_database) == [(str(n), "unroutable") for n in range(6, 31)])


def _dead(dsn: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute("select payload, code from bridge.dead_letter order by sequence").fetchall()


async def test_a_full_queue_that_refuses_takes_a_keys_events_in_order_once_it_has_room(
    rabbitmq: RabbitMQServer, bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    async with carrying(bridge_database, messages, tmp_path) as bridge:
        await messages.queue.delete(if_unused=False, if_empty=False)
        channel = await messages.connection.channel()
        await channel.set_qos(100)
        name = f"{messages.exchange}-full"
        full = await channel.declare_queue(
            name, durable=True, arguments={"x-max-length": 20, "x-overflow": "reject-publish"}
        )
        await full.bind(messages.exchange, "#")
        await emit(bridge_database, 6, 1500)
        await asyncio.to_thread(bridge.wait_for, "sink.refusing")
        # The mark may be behind them all: then those that the queue has no room for are held.
        assert await execute(bridge_database, "select mark < 1500 or held <> '{}' from bridge.cursor") == [(True,)]
        seen: list[int] = []
        async with asyncio.timeout(60), full.iterator() as iterator:
            async for message in iterator:
                await message.ack()
                if int(message.body) not in seen:
                    seen.append(int(message.body))
                if len(seen) == 1495:
                    break
        assert sorted(seen) == list(range(6, 1501))
        await asyncio.to_thread(bridge.wait_for, "sink.restored")


async def test_a_crash_of_the_broker_loses_nothing(
    server_folder: Path, bridge_database: str, unique: str, tmp_path: Path
) -> None:
    with RabbitMQServer(server_folder / unique) as broker:
        messages = Messages(broker.url, unique)
        await messages.open()
        async with carrying(bridge_database, messages, tmp_path) as bridge:
            await emit(bridge_database, 6, 3000)
            await asyncio.to_thread(broker.kill)
            await emit(bridge_database, 3001, 6000)
            await asyncio.to_thread(broker.start)
            await messages.open()
            missing = set(range(6, 6001))
            async with asyncio.timeout(60):
                while missing:
                    # The crash may also bring back the first five, whose acknowledgements it forgot.
                    missing -= {int(message.body) for message in await messages.take(len(missing))}
            said = of(bridge, "sink.lost", "sink.restored")
            assert said == ["sink.lost", "sink.restored"], json.dumps(bridge.lines()[-20:])
            # What the libraries have to say of it is logged in the same form.
            assert all(line.startswith("{") for line in bridge.log.read_text().splitlines())
