"""PgBouncer before the database: everything works through session mode, `emit()` through transaction mode too, and
there whatever needs a session of its own refuses.

`PGBOUNCER` names another program than Debian's.
"""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from bridge.commands.events import tail_events
from bridge.errors import RefusedError
from bridge.postgres import schema
from bridge.postgres.connection import connect
from bridge.settings import PostgresSettings
from tests.support.commands import command, json_of
from tests.support.daemons import Daemon, run_command
from tests.support.messages import execute
from tests.support.pgbouncer import PgBouncer
from tests.support.servers import MissingProgramError, NatsServer, PostgresServer
from tests.support.shop import SHOP, Replies
from tests.support.until import rows_become, until
from tests.support.unwrapped import unwrapped
from workers.session import ClaimSession
from workers.webhooks.deliveries import Deliveries

SETTINGS = """
name = "test"
[postgres]
dsn = "{dsn}"
[sinks.events]
type = "nats"
url = "{url}"
stream = "{stream}"
max_message_bytes = "10kB"
[[routes]]
topic = "#"
sink = "events"
[workers.{stream}-echo]
handler = "tests.support.worker_handlers:echo"
reply = "shop.rendered"
[workers.{stream}-refuse]
handler = "tests.support.worker_handlers:refuse"
"""

LOCKS = """
select count(*) from pg_locks where locktype = 'advisory'
and database = (select oid from pg_database where datname = current_database())
"""


def pooler(folder: Path, postgres: PostgresServer, mode: str) -> Iterator[PgBouncer]:
    try:
        server = PgBouncer(folder, postgres, mode)  # type: ignore[arg-type] # it is one of the two
    except MissingProgramError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have every server: {error}")
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture(scope="module")
def session_mode(server_folder: Path, postgres: PostgresServer) -> Iterator[PgBouncer]:
    yield from pooler(server_folder, postgres, "session")


@pytest.fixture(scope="module")
def transaction_mode(server_folder: Path, postgres: PostgresServer) -> Iterator[PgBouncer]:
    yield from pooler(server_folder, postgres, "transaction")


@pytest.fixture
def pooled(session_mode: PgBouncer, bridge_database: str) -> str:
    """The DSN of the test's database through a pool in session mode."""
    return session_mode.before(bridge_database)


@pytest.fixture
def unpinned(transaction_mode: PgBouncer, bridge_database: str) -> str:
    """The same in transaction mode."""
    return transaction_mode.before(bridge_database)


Configured = Callable[[str], Daemon]


@pytest.fixture
def configured(tmp_path: Path, nats_server: NatsServer, unique: str) -> Configured:
    """A bridge, which is not started, with these settings and this DSN."""

    def configure(dsn: str) -> Daemon:
        return Daemon(tmp_path, SETTINGS.format(dsn=dsn, url=nats_server.url, stream=unique))

    return configure


def worker_of(bridge: Daemon, name: str) -> Daemon:
    return Daemon(bridge.folder / name, bridge.config.read_text(), "run", name, module="workers.cli")


@pytest.mark.parametrize("start", ["nothing", "the version before"])
async def test_migrate_installs_and_upgrades_through_session_mode(
    session_mode: PgBouncer,
    database: str,
    configured: Configured,
    monkeypatch: pytest.MonkeyPatch,
    start: str,
) -> None:
    newest = schema.migrations()[-1]
    if start != "nothing":
        with monkeypatch.context() as before:
            older = schema.migrations()[:-1]
            before.setattr(schema, "migrations", lambda: older)
            before.setattr(schema, "_roles_sql", lambda: "select")  # which are the newest version's
            schema.migrate(database)
    config = str(configured(session_mode.before(database)).config)
    would, _ = await command("migrate", "--dry-run", "--config", config)
    assert f"{newest.version:04} {newest.name}: would be applied" in would
    assert len(would.splitlines()) == (len(schema.migrations()) if start == "nothing" else 1)
    did, _ = await command("migrate", "--config", config)
    assert did == would.replace("would be applied", "applied")
    again, _ = await command("migrate", "--config", config)
    assert "nothing to do" in again


async def test_every_command_works_through_session_mode(
    pooled: str, bridge_database: str, configured: Configured, unique: str
) -> None:
    await execute(bridge_database, SHOP)
    bridge = configured(pooled)
    at = ("--config", str(bridge.config))
    await command("topology", "--apply", *at)
    out, _ = await command("check", *at)
    assert "through a pooler" in out
    with Daemon(bridge.folder / "tail", bridge.config.read_text(), "tail") as tail, bridge:
        await asyncio.to_thread(bridge.wait_for, "bridge.leading")
        tailing = "select count(*) from pg_stat_activity where application_name = 'pgbridge tail' and state = 'idle'"
        await rows_become(bridge_database, tailing, [(1,)])
        await command("emit", "refuse.one", "{}", *at)
        await command("emit", "refuse.two", "x" * 20_000, *at)
        await until(lambda: "refuse.two" in tail.log.read_text())
        await rows_become(bridge_database, "select code from bridge.dead_letter", [("too_large",)])
        with worker_of(bridge, f"{unique}-refuse") as worker:
            await asyncio.to_thread(worker.wait_for, "event.dead_lettered")
            assert await asyncio.to_thread(worker.stop) == 0
        (status,) = (await json_of("status", *at))["bridges"]
        assert status["leader"]
        assert await asyncio.to_thread(bridge.stop) == 0
    letters = {letter["topic"]: letter["id"] for letter in await json_of("dead", "list", *at)}
    assert sorted(letters) == ["refuse.one", "refuse.two"]
    for letter in letters.values():
        assert (await json_of("dead", "show", letter, *at))["id"] == letter
    await command("dead", "replay", letters["refuse.one"], *at)
    await command("dead", "discard", letters["refuse.two"], "--why", "a test", *at)
    assert await json_of("dead", "list", *at) == []
    assert (await json_of("where", "1", *at))["logged"]["topic"] == "refuse.one"
    await command("pause", "--sink", "events", *at)
    await command("resume", "--sink", "events", *at)
    assert len(await json_of("cursor", "show", *at)) == 1
    await command("cursor", "set", "events", "--to", "0", *at)
    await command("replay", "--from", "1h", "--topic", "refuse.one", *at)
    await command("cursor", "forget", "events", "--skip", *at)


async def test_a_bridge_and_a_worker_work_through_session_mode_and_a_worker_that_was_killed_keeps_no_claim(
    pooled: str, bridge_database: str, configured: Configured, unique: str, replies: Replies
) -> None:
    await execute(bridge_database, SHOP)
    bridge = configured(pooled)
    await command("topology", "--apply", "--config", str(bridge.config))
    leads_and_claims = [(2,)]
    with bridge, worker_of(bridge, f"{unique}-echo") as worker:
        await rows_become(bridge_database, LOCKS, leads_and_claims)
        worker.kill()
        await rows_become(bridge_database, LOCKS, [(1,)])
        worker.start()
        await rows_become(bridge_database, LOCKS, leads_and_claims)
        await execute(
            bridge_database, "select bridge.emit('shop.order.placed', to_jsonb(n)) from generate_series(1, 500) n"
        )
        await rows_become(bridge_database, "select count(*), count(distinct event_id) from shop.invoice", [(500, 500)])
        assert await asyncio.to_thread(worker.stop) == 0
        assert await asyncio.to_thread(bridge.stop) == 0
    await rows_become(bridge_database, LOCKS, [(0,)])


def invoices(dsn: str) -> int:
    with psycopg.connect(dsn) as connection:
        [(count,)] = connection.execute("select count(*) from shop.invoice").fetchall()
    return int(count)


async def test_a_server_connection_that_another_client_had_is_as_new(pooled: str, bridge_database: str) -> None:
    """Both clients give their first prepared statement the same name."""
    settings = PostgresSettings(dsn=SecretStr(pooled))
    backends = set()
    for number, statement in enumerate(("select pg_backend_pid(), $1::int", "select pg_backend_pid(), $1::int + 1")):
        session = await connect(settings, f"client {number}")
        async with session:
            for _ in range(2):
                [(backend, value)] = await session.rows(statement, 1)
                assert value == 1 + number
            shown = [
                row
                for name in ("application_name", "client_encoding", "TimeZone", "statement_timeout")
                for row in await (await session.execute(f"show {name}")).fetchall()
            ]
            assert shown == [(f"client {number}",), ("UTF8",), ("UTC",), ("0",)]
            backends.add(backend)
        # PgBouncer has the server connection back once it was reset.
        await rows_become(
            bridge_database,
            f"select state from pg_stat_activity where pid = {backend} and query ilike 'discard all'",
            [("idle",)],
        )
    assert len(backends) == 1


async def test_emit_works_through_transaction_mode_and_keeps_the_order_of_a_key(
    unpinned: str, pooled: str, bridge_database: str, configured: Configured, unique: str, replies: Replies
) -> None:
    await execute(bridge_database, SHOP)
    bridge = configured(pooled)
    await command("topology", "--apply", "--config", str(bridge.config))
    clients = [psycopg.connect(unpinned, prepare_threshold=None) for _ in range(3)]
    for number in range(30):
        with clients[number % 3].transaction():
            clients[number % 3].execute(
                "select bridge.emit('shop.order.placed', %s::jsonb, key => 'one')", [str(number)]
            )
    for client in clients:
        client.close()
    await command("emit", "shop.order.placed", "30", "--key", "one", "--config", str(bridge.config))
    with bridge, worker_of(bridge, f"{unique}-echo"):
        await until(lambda: invoices(bridge_database) == 31)
    ordered = "select payload from bridge.outbox where key = 'one' order by id"
    assert [int(str(payload)) for (payload,) in await execute(bridge_database, ordered)] == list(range(31))


async def test_the_bridge_its_check_and_a_worker_refuse_transaction_mode_and_leave_no_lock_in_the_pool(
    unpinned: str, bridge_database: str, configured: Configured, unique: str
) -> None:
    await execute(bridge_database, SHOP)
    bridge = configured(unpinned)
    await asyncio.to_thread(run_command, "topology", "--apply", "--config", str(bridge.config))
    for module, words in (
        ("bridge.cli", ("run",)),
        ("bridge.cli", ("check",)),
        ("workers.cli", ("run", f"{unique}-echo")),
    ):
        done = await asyncio.to_thread(run_command, *words, "--config", str(bridge.config), module=module)
        said = unwrapped(done.stdout) + done.stderr
        assert done.returncode == 69, said
        assert "postgres.dsn: " in said
        assert "pooler in transaction mode (PgBouncer)" in said
        assert "to a pool in session mode" in said
        assert "Traceback" not in said
        assert await execute(bridge_database, LOCKS) == [(0,)], words


async def test_what_prepares_statements_refuses_transaction_mode_too(unpinned: str) -> None:
    settings = PostgresSettings(dsn=SecretStr(unpinned))
    with pytest.raises(RefusedError, match="pooler in transaction mode"):
        await anext(tail_events(settings, "test", ()))
    deliveries = Deliveries(settings, "hooks", lease=10.0, schedule=[1.0])
    with pytest.raises(RefusedError, match="pooler in transaction mode"):
        await deliveries.open()


async def test_channels_without_a_log_refuse_transaction_mode_before_they_lead(
    unpinned: str, bridge_database: str, tmp_path: Path
) -> None:
    """The lock of the lead would stay with the pool: the next start would stand by for ever, and hear nothing."""
    channels = '[channels]\nlisten = ["news"]\nbuffer = "memory"\n[sinks.events]\ntype = "memory"\n'
    config = tmp_path / "bridge.toml"
    config.write_text(
        f'name = "test"\n[postgres]\ndsn = "{unpinned}"\n{channels}[[routes]]\ntopic = "#"\nsink = "events"\n'
    )
    for _ in range(2):
        _, said = await command("run", "--config", str(config), expect=69)
        assert "pooler in transaction mode (PgBouncer)" in said
        assert await execute(bridge_database, LOCKS) == [(0,)]


async def test_the_session_of_claims_takes_a_lock_in_session_mode_and_none_in_transaction_mode(
    pooled: str, unpinned: str, bridge_database: str
) -> None:
    session = ClaimSession(PostgresSettings(dsn=SecretStr(pooled)), "test")
    await session.renew(instead_of=0)
    await session.beat()
    assert await execute(bridge_database, LOCKS) == [(1,)]
    await session.close()
    await rows_become(bridge_database, LOCKS, [(0,)])
    refused = ClaimSession(PostgresSettings(dsn=SecretStr(unpinned)), "test")
    with pytest.raises(RefusedError, match="pooler in transaction mode"):
        await refused.renew(instead_of=0)
    assert refused.token == 0
    assert await execute(bridge_database, LOCKS) == [(0,)]


async def test_start_parameters_that_the_pooler_does_not_take_are_a_mistake_in_the_dsn(
    pooled: str, configured: Configured
) -> None:
    bridge = configured(make_conninfo(pooled, options="-c work_mem=8MB"))
    await command("topology", "--apply", "--config", str(bridge.config))
    for words in (["check"], ["status"], ["migrate"]):
        said = unwrapped("".join(await command(*words, "--config", str(bridge.config), expect=78)))
        assert "postgres.dsn: " in said
        assert "the pooler at 127.0.0.1:" in said
        assert "Remove `options`" in said
