"""`pgbridge backfill`: every present row once, never older than what the log has of it, and in nobody's way."""

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection, sql
from psycopg.conninfo import make_conninfo

from bridge.commands.backfill import Progressed, Wish, backfill_table
from bridge.errors import DatabaseUnavailableError, PrivilegeError, SettingsError, UsageError
from bridge.settings import load
from tests.support.commands import command, json_of
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings
from tests.support.until import rows_become, until

TABLE = """
create schema shop;
create table shop.stock (
  id int primary key, uid bigint generated always as identity, v int not null default 0, note text default 'x');
insert into shop.stock (id) select n * 10 from generate_series(1, {rows}) n;
select bridge.watch('shop.stock');
"""
EVENTS = "select id, topic, key, payload::jsonb, headers from bridge.outbox order by id"
SENT = (
    "select payload::jsonb #> '{new,id}' from bridge.outbox where payload::jsonb ->> 'operation' = 'read' order by id"
)


def text(dsn: str) -> str:
    """Settings of a bridge that need not run: a backfill speaks with PostgreSQL only."""
    return f"""
name = "test"
[postgres]
dsn = "{dsn}"
[sinks.events]
type = "rabbitmq"
url = "amqp://guest@127.0.0.1:1"
exchange = "none"
[[routes]]
topic = "#"
sink = "events"
"""


def config(folder: Path, dsn: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bridge.toml"
    path.write_text(text(dsn), encoding="utf-8")
    return str(path)


async def backfilled(folder: Path, dsn: str, wish: Wish, stop: asyncio.Event | None = None) -> Progressed:
    """Runs one in this process."""
    return await backfill_table(load(Path(config(folder, dsn))), wish, stop=stop or asyncio.Event())


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`pgbridge backfill ...`, as a process that is gone at the end."""
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bridge.cli", "backfill", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
            await started.communicate()


async def sent(dsn: str) -> list[Any]:
    return [number for (number,) in await execute(dsn, SENT)]


class Model:
    """What a consumer knows of the table, by the events alone."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}
        self.versions: dict[int, int] = {}
        self.backwards: list[dict[str, Any]] = []

    def apply(self, events: Sequence[tuple[Any, ...]]) -> None:
        for _, _, key, payload, _ in events:
            old, new = payload["old"], payload["new"]
            if old is not None:
                self.rows.pop(old["id"], None)
            if new is None:
                continue
            assert key == str(new["id"])
            if self.versions.get(new["uid"], 0) > new["v"]:
                self.backwards.append(payload)
            self.versions[new["uid"]] = new["v"]
            self.rows[new["id"]] = new


class Writers:
    """Sessions that change rows, until they are told to stop. Each locks rows from the last to the first, against the
    order of a backfill, so that they never lock each other out."""

    def __init__(self, dsn: str, rows: int) -> None:
        self._dsn = dsn
        self._rows = rows
        self._stop = asyncio.Event()
        self.done = 0

    @asynccontextmanager
    async def at_work(self, count: int) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            for seed in range(count):
                tasks.create_task(self._write(random.Random(seed)))
            try:
                yield
            finally:
                self._stop.set()

    async def _write(self, chosen: random.Random) -> None:
        async with await AsyncConnection.connect(self._dsn) as connection:
            while not self._stop.is_set():
                await self._change(connection, chosen)
                await asyncio.sleep(chosen.choice((0, 0, 0.005)))
                await (connection.rollback() if chosen.random() < 0.2 else connection.commit())
                self.done += 1

    async def _change(self, connection: AsyncConnection[Any], chosen: random.Random) -> None:
        many = [chosen.randint(1, self._rows) * 10 for _ in range(chosen.choice((1, 1, 5, 50)))]
        await connection.execute("select from shop.stock where id = any(%s) order by id desc for update", (many,))
        match chosen.randrange(5):
            case 0:
                await connection.execute("delete from shop.stock where id = any(%s)", (many[:2],))
            case 1:
                await connection.execute(
                    "insert into shop.stock (id) select n from unnest(%s::int[]) n order by n desc "
                    "on conflict do nothing",
                    (many[:2],),
                )
            case 2:  # ahead of every backfill, to a place that is this row's only
                await connection.execute("update shop.stock set id = 100000 + uid, v = v + 1 where id = %s", (many[0],))
            case 3:  # behind it
                await connection.execute("update shop.stock set id = -uid, v = v + 1 where id = %s", (many[0],))
            case _:
                await connection.execute("update shop.stock set v = v + 1 where id = any(%s)", (many,))


async def rows_of(dsn: str) -> dict[int, dict[str, Any]]:
    return {row["id"]: row for (row,) in await execute(dsn, "select to_jsonb(s) from shop.stock s")}  # type: ignore[index,misc]


async def deadlocks(dsn: str) -> int:
    [(count,)] = await execute(dsn, "select deadlocks from pg_stat_database where datname = current_database()")
    return int(str(count))


async def test_beside_its_changes_every_row_is_known_in_the_end_and_no_version_goes_back(
    bridge_database: str, tmp_path: Path
) -> None:
    count = 3000
    await execute(bridge_database, TABLE.format(rows=count))
    writers = Writers(bridge_database, count)
    async with asyncio.timeout(60), writers.at_work(4):
        await until(lambda: writers.done > 20)
        before = writers.done
        done = await backfilled(tmp_path, bridge_database, Wish("shop.stock", chunk=50))
        assert writers.done - before > 50, "it met changes"
    assert done.finished
    model = Model()
    model.apply(await execute(bridge_database, EVENTS))
    assert model.backwards == []
    assert model.rows == await rows_of(bridge_database)
    assert await deadlocks(bridge_database) == 0
    [(own,)] = await execute(
        bridge_database, "select count(*) from bridge.outbox where headers ? 'backfill' and topic = 'shop.stock.read'"
    )
    assert own == done.sent


async def test_kills_and_interrupts_send_every_row_once(bridge_database: str, tmp_path: Path) -> None:
    count = 6000
    await execute(bridge_database, TABLE.format(rows=count))
    arguments = ("shop.stock", "--chunk", "100", "--rate", "2000", "--config", config(tmp_path, bridge_database))
    for number in range(1, 4):
        async with process(*arguments) as running:
            await until(lambda n=number: more_than(bridge_database, 500 * n))  # type: ignore[misc]
            if number < 3:
                running.kill()
            else:
                running.terminate()
            _, said = await running.communicate()
            if number == 3:
                assert running.returncode == 130
                assert b"Interrupted after" in said
    assert 1500 < len(await sent(bridge_database)) < count
    lines, said_again = await command("backfill", *arguments[:3], "--json", *arguments[5:])
    assert "Goes on after" in said_again
    last = json.loads(lines.splitlines()[-1])
    assert (last["sent"], last["finished"]) == (count, True)
    assert await sent(bridge_database) == [n * 10 for n in range(1, count + 1)]


async def more_than(dsn: str, count: int) -> bool:
    [(so_far,)] = await execute(dsn, "select coalesce(sum(sent), 0)::int from bridge.backfill")
    return int(str(so_far)) > count


async def test_rows_that_somebody_has_locked_for_long_hold_up_no_others(bridge_database: str, tmp_path: Path) -> None:
    await execute(bridge_database, TABLE.format(rows=500))
    async with await AsyncConnection.connect(bridge_database) as holder:
        await holder.execute("update shop.stock set v = 1 where id in (10, 2000)")
        await holder.execute("delete from shop.stock where id = 3000")
        running = asyncio.create_task(backfilled(tmp_path, bridge_database, Wish("shop.stock", chunk=100)))
        try:
            await rows_become(
                bridge_database,
                "select sent, jsonb_array_length(skipped), walked, ended_at is null from bridge.backfill",
                [(497, 3, True, True)],
            )
            [listed] = await json_of("backfill", "--list", "--config", config(tmp_path, bridge_database))
            assert (listed["running"], listed["skipped"], listed["outcome"]) == (True, 3, None)
            await holder.commit()
            done = await asyncio.wait_for(running, 20)
        finally:
            running.cancel()
    assert (done.sent, done.finished) == (499, True)
    model = Model()
    model.apply(await execute(bridge_database, EVENTS))
    assert model.backwards == []
    assert model.rows == await rows_of(bridge_database)
    assert model.rows[2000]["v"] == 1


async def test_a_row_that_is_never_free_for_long_gets_its_turn(bridge_database: str, tmp_path: Path) -> None:
    await execute(bridge_database, TABLE.format(rows=5))
    stop = asyncio.Event()

    async def keep_it_locked() -> None:
        async with await AsyncConnection.connect(bridge_database) as connection:
            while not stop.is_set():
                await connection.execute("update shop.stock set v = v + 1 where id = 30")
                await asyncio.sleep(0.02)  # while others queue for the lock
                await connection.commit()

    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(keep_it_locked())
        await until(lambda: locked_by_others(bridge_database))
        done = await backfilled(tmp_path, bridge_database, Wish("shop.stock"))
        stop.set()
    assert (done.sent, done.finished) == (5, True)
    model = Model()
    model.apply(await execute(bridge_database, EVENTS))
    assert model.backwards == []
    assert await deadlocks(bridge_database) == 0


async def locked_by_others(dsn: str) -> bool:
    [(waiting,)] = await execute(
        dsn, "select count(*) from pg_locks where not granted and locktype in ('tuple', 'transactionid')"
    )
    return int(str(waiting)) >= 2


async def test_a_table_that_somebody_has_locked_is_waited_for(bridge_database: str, tmp_path: Path) -> None:
    await execute(bridge_database, TABLE.format(rows=60))
    seen: list[str | None] = []
    async with await AsyncConnection.connect(bridge_database) as holder:
        await holder.execute("lock table shop.stock in access exclusive mode")
        with pytest.raises(DatabaseUnavailableError, match="lock timeout"):
            await backfilled(tmp_path, bridge_database, Wish("shop.stock"))
        await holder.rollback()
        running = asyncio.create_task(
            backfill_table(
                load(Path(config(tmp_path, bridge_database))),
                Wish("shop.stock", rate=50),
                stop=asyncio.Event(),
                told=lambda so_far: seen.append(so_far.waits_for),
            )
        )
        try:
            await until(lambda: more_than(bridge_database, 10))
            await holder.execute("lock table shop.stock in exclusive mode")
            await until(lambda: "a lock of the table" in seen)
            # Nothing that it holds stands in the way.
            await holder.execute("alter table shop.stock add column w int")
            await holder.commit()
            assert (await asyncio.wait_for(running, 20)).sent == 60
        finally:
            running.cancel()
    assert await deadlocks(bridge_database) == 0


async def test_a_second_one_is_refused_and_a_cancelled_one_ends(bridge_database: str, tmp_path: Path) -> None:
    await execute(bridge_database, TABLE.format(rows=2000))
    of = ("--config", config(tmp_path, bridge_database))
    async with process("shop.stock", "--rate", "100", *of) as running:
        await until(lambda: more_than(bridge_database, 100))
        with pytest.raises(UsageError, match=r"a backfill of shop\.stock runs already"):
            await backfilled(tmp_path, bridge_database, Wish("shop.stock"))
        _, said = await command("backfill", "shop.stock", "--cancel", *of)
        assert "is cancelled" in said
        _, err = await asyncio.wait_for(running.communicate(), 20)
        assert running.returncode == 2
        assert b"has ended. Somebody has cancelled or restarted it" in err
    done = await backfilled(tmp_path, bridge_database, Wish("shop.stock"))
    assert done.sent == 2000, "the next one begins at the beginning"
    assert [one["outcome"] for one in await json_of("backfill", "--list", *of)] == ["finished", "cancelled"]


async def test_changes_that_may_have_passed_unseen_end_an_interrupted_one(bridge_database: str, tmp_path: Path) -> None:
    await execute(bridge_database, TABLE.format(rows=300))
    stop = asyncio.Event()
    stopping = asyncio.create_task(backfilled(tmp_path, bridge_database, Wish("shop.stock", rate=100), stop))
    await until(lambda: more_than(bridge_database, 10))
    stop.set()
    assert not (await stopping).finished
    with pytest.raises(UsageError, match=r"has the topic 'shop\.stock\.read'\. Leave --topic out"):
        await backfilled(tmp_path, bridge_database, Wish("shop.stock", topic="other"))
    await execute(bridge_database, "select bridge.watch('shop.stock')")
    with pytest.raises(UsageError, match=r"the table was watched again\. Changes .* --restart"):
        await backfilled(tmp_path, bridge_database, Wish("shop.stock"))
    done = await backfilled(tmp_path, bridge_database, Wish("shop.stock", anew=True, topic="other"))
    assert (done.sent, done.topic, done.finished) == (300, "other", True)


async def test_it_waits_while_a_sink_of_its_topic_is_far_behind(bridge_database: str, tmp_path: Path) -> None:
    await execute(bridge_database, TABLE.format(rows=1000))
    position = (
        "insert into bridge.cursor (name, sink, mark, horizon, system_identifier, patterns) "
        "select 'test', %s, 0, pg_current_xact_id(), 1, %s"
    )
    await execute(bridge_database, position, "events", ["shop.#"])
    await execute(bridge_database, position, "idle", ["other.#"])
    running = asyncio.create_task(backfilled(tmp_path, bridge_database, Wish("shop.stock", chunk=50, backlog=200)))
    try:
        await until(lambda: more_than(bridge_database, 200))
        for _ in range(5):  # it looks again and again, and sends nothing
            await until(lambda: looked_again(bridge_database))
        [(waiting,)] = await execute(bridge_database, "select sent::int from bridge.backfill")
        assert 200 < int(str(waiting)) <= 250
        await execute(bridge_database, "update bridge.cursor set mark = 1000000 where sink = 'events'")
        assert (await asyncio.wait_for(running, 20)).sent == 1000
    finally:
        running.cancel()


async def looked_again(dsn: str) -> bool:
    """Whether its session has begun a statement since this was asked."""
    query = (
        "select query_start from pg_stat_activity "
        "where application_name = 'pgbridge backfill' and datname = current_database()"
    )
    [(before,)] = await execute(dsn, query)
    await until(lambda: began_after(dsn, query, before))
    return True


async def began_after(dsn: str, query: str, before: object) -> bool:
    return await execute(dsn, query) != [(before,)]


async def test_what_nobody_would_publish_is_refused_before_the_first_row(bridge_database: str, tmp_path: Path) -> None:
    await execute(bridge_database, TABLE.format(rows=10))
    path = Path(config(tmp_path, bridge_database))
    path.write_text(path.read_text().replace('topic = "#"', 'topic = "shop.stock.updated"'))
    with pytest.raises(SettingsError, match=r"none takes the topic 'shop\.stock\.read'"):
        await backfill_table(load(path), Wish("shop.stock"), stop=asyncio.Event())
    await execute(
        bridge_database,
        "insert into bridge.cursor (name, sink, mark, horizon, system_identifier, patterns) "
        "select 'test', 'events', 0, pg_current_xact_id(), 1, '{shop.stock.updated}'",
    )
    with pytest.raises(SettingsError, match=r"the bridge 'test' does not publish the topic 'shop\.stock\.read' yet"):
        await backfilled(tmp_path, bridge_database, Wish("shop.stock"))
    assert await sent(bridge_database) == []
    done = await backfill_table(load(path), Wish("shop.stock", topic="shop.stock.updated"), stop=asyncio.Event())
    assert done.sent == 10, "a refusal leaves nothing behind"


async def test_an_operator_needs_the_right_to_read_and_lock_the_rows(
    bridge_database: str, unique: str, tmp_path: Path
) -> None:
    await execute(bridge_database, TABLE.format(rows=10))
    role = sql.Identifier(unique)
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(
            sql.SQL("create role {0} login in role bridge_operator; grant usage on schema shop to {0}").format(role)
        )
        try:
            dsn = make_conninfo(bridge_database, user=unique)
            with pytest.raises(
                PrivilegeError, match=r"may not read and lock the rows of shop\.stock.*grant select, update"
            ):
                await backfilled(tmp_path, dsn, Wish("shop.stock"))
            admin.execute(sql.SQL("grant select, update (id) on shop.stock to {}").format(role))
            admin.execute("alter table shop.stock enable row level security")
            with pytest.raises(PrivilegeError, match="row security hides rows"):
                await backfilled(tmp_path, dsn, Wish("shop.stock"))
            admin.execute("alter table shop.stock disable row level security")
            assert (await backfilled(tmp_path, dsn, Wish("shop.stock"))).sent == 10
            with pytest.raises(UsageError, match=r"there is no table 'shop\.stuck'"):
                await backfilled(tmp_path, dsn, Wish("shop.stuck"))
        finally:
            admin.execute(sql.SQL("drop owned by {0}; drop role {0}").format(role))


KINDS = {
    "composite": ("a int, b text, primary key (b, a)", "n, repeat(chr(97 + n % 3), n % 2) || 'é''\"\\%s'", ""),
    "uuid": ("id uuid primary key", "gen_random_uuid()", ""),
    "time": (
        "id timestamptz primary key",
        "timestamptz '1890-01-01 00:00:00.000001+01' + n * interval '1 hour 1 us'",
        "",
    ),
    "numeric": ("id numeric primary key", "n / 7.0 - 1", ""),
    "float": ("id float8 primary key", "(n / 7.0 - 1)::float8", ""),
    "bytes": ("id bytea primary key", "decode(md5(n::text), 'hex')", ""),
    "enum": ("id mood, n int, primary key (id, n)", "(array['sad', 'so so', 'happy'])[1 + n % 3]::mood, n", ""),
    "domain": ("id small primary key", "n", ""),
    "fixed width": ("id char(5) primary key", "n::text", ""),
    "bits": ("id bit varying primary key", "n::bit(8)::varbit", ""),
    "negative": ("id bigint primary key", "n * -1000000000000", ""),
    "partitioned": (
        "id int, r text, primary key (id, r)",
        "n, (array['eu', 'us'])[1 + n % 2]",
        "partition by list (r)",
    ),
    "generated": ("id int primary key, twice int generated always as (id * 2) stored", "n", ""),
    "a name": ('"own_key"" %s" int primary key, entire int, r int', "n, 1, 2", ""),
    "foreign operators": ("id extensions.citext primary key", "chr(65 + n + 32 * (n % 2))", ""),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_row_has_the_key_and_the_form_of_its_changes_whatever_its_primary_key(
    bridge_database: str, tmp_path: Path, kind: str
) -> None:
    columns, values, clause = KINDS[kind]
    with psycopg.connect(bridge_database, autocommit=True) as connection:
        if "citext" in columns:
            connection.execute("create schema extensions; create extension citext schema extensions")
        connection.execute("create type mood as enum ('sad', 'so so', 'happy')")
        connection.execute("create domain small as int check (value < 1000)")
        connection.execute(f"create table t ({columns}) {clause}".encode())
        if clause:
            connection.execute("create table t_eu partition of t for values in ('eu')")
            connection.execute("create table t_us partition of t for values in ('us')")
        connection.execute(f"insert into t select {values} from generate_series(1, 21) n".encode())
        connection.execute("alter table t add column v int default 0; select bridge.watch('t')")
        assert (await backfilled(tmp_path, bridge_database, Wish("t", chunk=4))).finished
        connection.execute("update t set v = 1")
        read, updated = (
            connection.execute(
                "select key, (payload::jsonb -> 'new') - 'v' from bridge.outbox "
                "where payload::jsonb ->> 'operation' = %s order by key",
                (operation,),
            ).fetchall()
            for operation in ("read", "update")
        )
    assert len(read) == 21
    assert read == updated


async def test_a_row_that_moves_to_another_partition_is_not_lost(bridge_database: str, tmp_path: Path) -> None:
    await execute(
        bridge_database,
        "create table t (id int, r text, uid bigint generated always as identity, v int default 0, primary key (r, id))"
        " partition by list (r); create table t_a partition of t for values in ('a'); "
        "create table t_b partition of t for values in ('b'); "
        "insert into t (id, r) select n, 'b' from generate_series(1, 1000) n; select bridge.watch('t')",
    )
    stop = asyncio.Event()

    async def move(seed: int) -> None:
        chosen = random.Random(seed)
        async with await AsyncConnection.connect(bridge_database, autocommit=True) as connection:
            while not stop.is_set():
                await connection.execute(
                    "update t set r = case r when 'a' then 'b' else 'a' end, v = v + 1 where id = %s",
                    (3 * chosen.randint(0, 332) + seed + 1,),  # two who move one row fail by themselves
                )

    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        for seed in range(3):
            tasks.create_task(move(seed))
        done = await backfilled(tmp_path, bridge_database, Wish("t", chunk=20))
        stop.set()
    assert done.finished
    known: dict[int, dict[str, Any]] = {}
    for _, _, _, payload, _ in await execute(bridge_database, EVENTS):
        new: dict[str, Any] = payload["new"]  # type: ignore[index]
        assert new["v"] >= known.get(new["id"], new)["v"]
        known[new["id"]] = new
    rows = await execute(bridge_database, "select id, to_jsonb(t) from t")
    assert known == dict(rows)  # type: ignore[arg-type]


async def test_consumers_get_rows_as_events_with_a_mark(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    await execute(bridge_database, TABLE.format(rows=300))
    with Daemon(tmp_path, settings(bridge_database, messages)) as bridge:
        bridge.wait_for("bridge.leading")
        out, _ = await command("backfill", "shop.stock", "--backlog", "50", "--config", str(bridge.config))
        assert out.startswith("300 rows sent to the topic shop.stock.read, 300 of them now")
        taken = await messages.take(300)
        assert bridge.stop() == 0
    bodies = [json.loads(message.body) for message in taken]
    assert [body["new"]["id"] for body in bodies] == [n * 10 for n in range(1, 301)]
    assert {(body["operation"], body["schema"], body["table"], body["old"]) for body in bodies} == {
        ("read", "shop", "stock", None)
    }
    assert {(message.routing_key, message.headers["backfill"]) for message in taken} == {("shop.stock.read", "1")}
