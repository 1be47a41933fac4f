"""Sessions that emit events, and the ledger of what they know to be committed."""

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass, field

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

SCHEMA = """
create schema shop;
create table shop.counter (name text primary key, n int not null default 0);
create table shop.reply (event_id uuid not null, result jsonb);
create function shop.counted(event_id uuid, result jsonb) returns void language sql
begin atomic insert into shop.reply values (event_id, result); end;
"""
TOPIC = "shop.order.placed"
_ROLLED_BACK, _LATE = 0.1, 0.05


@dataclass
class Ledger:
    """What is known to be committed. A number counts the events of a key in the order of their commits."""

    committed: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Key and number by event id."""
    rolled_back: int = 0
    unknown: int = 0
    """Commits that were interrupted, and looked up afterwards."""


class Writer:
    """One session that serialises with others on the rows of its keys, as a shop does on a customer or an order."""

    def __init__(
        self, dsn: str, ledger: Ledger, keys: list[str], seed: int, pause: float, *, steady: bool = False
    ) -> None:
        """`pause`: most seconds between two transactions; `steady`: none rolls back or commits late."""
        self._dsn = dsn
        self._ledger = ledger
        self._keys = keys
        self._random = random.Random(seed)
        self._pause = pause
        self._steady = steady

    async def run(self, stop: asyncio.Event) -> None:
        """Commits until `stop`; an outage of the database is waited out."""
        while not stop.is_set():
            try:
                async with await AsyncConnection.connect(self._dsn, autocommit=True, connect_timeout=5) as connection:
                    while not stop.is_set():
                        await self.commit_one(connection)
                        await asyncio.sleep(self._random.uniform(0, self._pause))
            except psycopg.OperationalError:
                await asyncio.sleep(0.05)

    async def commit_one(self, connection: AsyncConnection[TupleRow]) -> list[str]:
        """One transaction; the ids of its events, none when it rolled back."""
        chance = 0.5 if self._steady else self._random.random()
        keys = sorted(self._random.sample(self._keys, min(len(self._keys), self._random.choice((1, 1, 2, 3)))))
        await connection.execute("begin")
        emitted: dict[str, tuple[str, int]] = {}
        for key in keys:
            number = await _value(connection, "update shop.counter set n = n + 1 where name = %s returning n", key)
            statement = "select bridge.emit(%s, jsonb_build_object('n', %s::int), %s)::text"
            emitted[await _value(connection, statement, TOPIC, number, key)] = (key, int(number))
        if chance < _LATE:
            await asyncio.sleep(self._random.uniform(0.2, 1.5))
        if chance > 1 - _ROLLED_BACK:
            await connection.execute("rollback")
            self._ledger.rolled_back += 1
            return []
        try:
            await connection.execute("commit")
        except psycopg.OperationalError:
            self._ledger.unknown += 1
            if await self._committed_after_all(connection.info.backend_pid, list(emitted)):
                self._ledger.committed.update(emitted)
            raise
        self._ledger.committed.update(emitted)
        return list(emitted)

    async def _committed_after_all(self, pid: int, event_ids: list[str]) -> bool:
        """What became of a commit whose answer was lost: looked up once its session has ended.

        By the rows, not by the transaction's id: a crash may forget an id, and give it to another transaction.
        """
        while True:
            with contextlib.suppress(psycopg.OperationalError):
                async with await AsyncConnection.connect(self._dsn, autocommit=True, connect_timeout=5) as connection:
                    alive = "select count(*) from pg_stat_activity where pid = %s and pid <> pg_backend_pid()"
                    if await _value(connection, alive, pid) == "0":
                        found = "select count(*) from bridge.outbox where event_id = any(%s::uuid[])"
                        return await _value(connection, found, event_ids) == str(len(event_ids))
            await asyncio.sleep(0.05)


async def _value(connection: AsyncConnection[TupleRow], statement: str, *values: object) -> str:
    cursor = await connection.execute(statement, values)
    row = await cursor.fetchone()
    assert row is not None
    return str(row[0])


async def probe(dsn: str, ledger: Ledger, number: int) -> str:
    """Commits one event as soon as the database takes it, and returns its id."""
    key = f"probe-{number}"
    writer = Writer(dsn, ledger, [key], number, 0, steady=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        before = set(ledger.committed)
        try:
            async with await AsyncConnection.connect(dsn, autocommit=True, connect_timeout=5) as connection:
                await connection.execute("insert into shop.counter values (%s) on conflict do nothing", (key,))
                if ids := await writer.commit_one(connection):
                    return ids[0]
        except psycopg.OperationalError:
            if found := [id_ for id_ in set(ledger.committed) - before if ledger.committed[id_][0] == key]:
                return found[0]
            await asyncio.sleep(0.05)
    raise TimeoutError("the database took no event for two minutes")
