"""`pgbridge backfill` of a large table, alone and beside clients that update it, and whether the log tells it all."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import psycopg

from tests.bench.bridge import settings_of
from tests.bench.registry import theme
from tests.bench.results import Row, at_most
from tests.bench.rounds import take_turns
from tests.bench.sql import PGBENCH
from tests.bench.world import World

CLIENTS = 4
TABLE = """
create table public.stock (id bigint primary key, v bigint not null default 0, note text not null);
insert into public.stock (id, note) select n, repeat('x', 100) from generate_series(1, {rows}) n;
select bridge.watch('public.stock', topic => 'bench.stock');
"""
UPDATE = "\\set id random(1, {rows})\nupdate public.stock set v = v + 1 where id = :id;\n"

WRONG = """
with event as (
  select id, key::bigint as row, (payload::jsonb #>> '{new,v}')::bigint as v,
         payload like '{"operation": "read"%' as read
  from bridge.outbox
), in_order as (
  select e.*, lag(e.v) over own as before, lead(e.id) over own is null as is_last from event e
  window own as (partition by e.row order by e.id)
)
select (select count(*) from public.stock s where not exists (
          select from in_order e where e.row = s.id and e.is_last and e.v = s.v)) as missing,
       (select count(*) from in_order e where e.v < e.before) as older,
       (select count(*) from event e where e.read) - (select count(*) from public.stock) as not_once,
       (select count(*) from event e where not e.read) as changes
"""
"""Rows that the log does not tell as they are, versions behind newer ones, rows too many or too few, and changes."""


class Filled(NamedTuple):
    """What a backfill of the whole table took."""

    rate: float
    """Rows a second, of the command, from its first to its last."""
    memory: float
    """Most resident memory of the command, in MB (10^6 bytes)."""
    changes: int
    """Updates that were committed meanwhile."""


@contextmanager
def _updating(world: World, dsn: str, rows: int) -> Iterator[None]:
    script = world.folder / "update.pgbench"
    script.write_text(UPDATE.format(rows=rows))
    command = [str(PGBENCH), "-n", "-f", str(script), "-c", str(CLIENTS), "-j", "1", "-T", "3600", dsn]
    clients = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        clients.terminate()
        clients.wait()


def _fill(world: World, rows: int, *, updated: bool) -> Filled:
    dsn = world.database()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(TABLE.format(rows=rows).encode())
        connection.execute("vacuum (analyze) public.stock")
        connection.execute("checkpoint")
        config = world.folder / f"{world.unique('backfill')}.toml"
        # Nothing connects to the sink.
        sink = {"type": "rabbitmq", "url": "amqp://guest@127.0.0.1:1", "exchange": "none"}
        config.write_text(settings_of("bench", dsn, sink))
        with _updating(world, dsn, rows) if updated else nullcontext():
            command = [
                sys.executable,
                "-m",
                "bridge.cli",
                "backfill",
                "public.stock",
                "--json",
                "--config",
                str(config),
            ]
            with Path(f"{config}.json").open("w+b") as said:
                process = subprocess.Popen(command, stdout=said)
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                said.seek(0)
                lines = said.read().splitlines()
        if process.returncode != 0:
            raise RuntimeError(f"the backfill ended with {process.returncode}")
        missing, older, not_once, changes = connection.execute(WRONG).fetchone() or (0, 0, 0, 0)
        if (missing, older, not_once) != (0, 0, 0) or (updated and not changes):
            raise RuntimeError(f"missing {missing}, older {older}, not once {not_once}, changes {changes}")
    world.postgres.drop_database(psycopg.conninfo.conninfo_to_dict(dsn)["dbname"])  # type: ignore[arg-type]
    return Filled(json.loads(lines[-1])["rate"], usage.ru_maxrss * 1024 / 1e6, changes)


@theme("backfill")
def backfill(world: World) -> Sequence[Row]:
    """1,000,000 rows under four clients that update rows at random; beside the same without them."""
    rows = 50_000 if world.quick else 1_000_000
    alone = "no clients"
    contenders = {
        "ours": lambda: _fill(world, rows, updated=True),
        alone: lambda: _fill(world, rows, updated=False),
    }
    found = take_turns(world.rounds, contenders, lambda filled: filled.rate)
    ours, peer = found.values["ours"], found.values[alone]
    error = "; ".join(found.errors.values())
    rates = [filled.rate for filled in ours], [filled.rate for filled in peer]
    return [
        Row("backfill: rows, 4 clients update", "rows/s", *rates, alone, None, error, found.not_quiet),
        Row(
            "backfill: peak memory", "MB", [filled.memory for filled in ours], target=at_most(100), error=error,
            not_quiet=found.not_quiet,
        ),
    ]  # fmt: skip
