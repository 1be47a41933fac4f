"""Sessions that emit events, and the ledger of what they know to be committed."""

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import psycopg
from psycopg import AsyncConnection
from psycopg.rows import TupleRow

from tests.faults.fates import HANDLED, Fate, choose
from tests.faults.poison import POISON, Row

SCHEMA = """
create schema shop;
create table shop.counter (name text primary key, n int not null default 0);
create table shop.reply (n bigserial, worker text not null, event_id uuid not null);
create function shop.counted(event_id uuid, result jsonb) returns void language sql
begin atomic insert into shop.reply (worker, event_id) values (result ->> 'by', event_id); end;
"""
PLACED, MOVED, PROBED = "shop.order.placed", "shop.order.moved", "shop.order.probed"
"""What workers take. The second goes to the queue that may be full."""
BURST = "shop.burst"
"""More at once than the writers make; no worker takes it."""
POISONED = "shop.poison"
"""What a row that `emit()` refuses is, and what follows it in its key."""
_ROLLED_BACK, _LATE, _MOVED = 0.1, 0.05, 0.2
_PATIENCE = 120.0
"""Seconds for which the database may be gone: longer than any fault takes it away."""


class Emitted(NamedTuple):
    """An event that the suite made."""

    key: str
    number: int
    """Counts the events of a key in the order of their commits."""
    topic: str
    is_poison: bool = False
    """Whether it may become a dead letter of the outbox."""
    fate: Fate = HANDLED
    """What it does to the workers that take it."""


@dataclass
class Ledger:
    """What is known to be committed."""

    committed: dict[str, Emitted] = field(default_factory=dict)
    """By event id."""
    rolled_back: int = 0
    unknown: int = 0
    """Commits that were interrupted, and looked up afterwards."""

    def ids(self, takes: Callable[[str], bool], *, poison: bool = False) -> set[str]:
        """The events of some topics; `poison`: those too that may become dead letters."""
        return {id_ for id_, event in self.committed.items() if takes(event.topic) and (poison or not event.is_poison)}


Work = Callable[[AsyncConnection[TupleRow]], Awaitable[dict[str, Emitted]]]
"""What a transaction does; gives the events that it emits."""


async def commit(connection: AsyncConnection[TupleRow], dsn: str, ledger: Ledger, work: Work) -> list[str]:
    """One transaction; the ids of its events. Raises psycopg.OperationalError, with the ledger right all the same."""
    await connection.execute("begin")
    emitted = await work(connection)
    try:
        await connection.execute("commit")
    except psycopg.OperationalError:
        ledger.unknown += 1
        if await _committed_after_all(dsn, connection.info.backend_pid, list(emitted)):
            ledger.committed.update(emitted)
        raise
    ledger.committed.update(emitted)
    return list(emitted)


async def _committed_after_all(dsn: str, pid: int, event_ids: list[str]) -> bool:
    """What became of a commit whose answer was lost: looked up once its session has ended.

    By the rows, not by the transaction's id: a crash may forget an id, and give it to another transaction. Raises
    TimeoutError when the database does not come back: then the run has nothing left to say.
    """
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(psycopg.OperationalError):
            async with await AsyncConnection.connect(dsn, autocommit=True, connect_timeout=5) as connection:
                alive = "select count(*) from pg_stat_activity where pid = %s and pid <> pg_backend_pid()"
                if await _value(connection, alive, pid) == "0":
                    found = "select count(*) from bridge.outbox where event_id = any(%s::uuid[])"
                    return await _value(connection, found, event_ids) == str(len(event_ids))
        await asyncio.sleep(0.05)
    raise TimeoutError(f"what became of a commit could not be looked up within {_PATIENCE:g} s")


async def commit_surely(dsn: str, ledger: Ledger, work: Work) -> list[str]:
    """The same on a connection of its own, and as often as it takes. Raises TimeoutError after `_PATIENCE`."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        emitted: dict[str, Emitted] = {}

        async def remembering(
            connection: AsyncConnection[TupleRow], emitted: dict[str, Emitted] = emitted
        ) -> dict[str, Emitted]:
            emitted |= await work(connection)
            return emitted

        try:
            async with await AsyncConnection.connect(dsn, autocommit=True, connect_timeout=5) as connection:
                return await commit(connection, dsn, ledger, remembering)
        except psycopg.OperationalError:
            if emitted and emitted.keys() <= ledger.committed.keys():
                return list(emitted)
            await asyncio.sleep(0.05)
    raise TimeoutError(f"the database took no event for {_PATIENCE:g} s")


class Writer:
    """One session that serialises with others on the rows of its keys, as a shop does on a customer or an order."""

    def __init__(self, dsn: str, ledger: Ledger, keys: list[str], seed: int, pause: float) -> None:
        """`pause`: most seconds between two transactions."""
        self._dsn = dsn
        self._ledger = ledger
        self._keys = keys
        self._random = random.Random(seed)
        self._pause = pause

    async def run(self, stop: asyncio.Event) -> None:
        """Commits until `stop`; an outage of the database is waited out."""
        while not stop.is_set():
            try:
                async with await AsyncConnection.connect(self._dsn, autocommit=True, connect_timeout=5) as connection:
                    while not stop.is_set():
                        await self._one(connection)
                        await asyncio.sleep(self._random.uniform(0, self._pause))
            except psycopg.OperationalError:
                await asyncio.sleep(0.05)

    async def _one(self, connection: AsyncConnection[TupleRow]) -> None:
        chance = self._random.random()
        keys = sorted(self._random.sample(self._keys, min(len(self._keys), self._random.choice((1, 1, 2, 3)))))

        async def work(connection: AsyncConnection[TupleRow]) -> dict[str, Emitted]:
            emitted = {}
            for key in keys:
                number = await _value(connection, "update shop.counter set n = n + 1 where name = %s returning n", key)
                topic = MOVED if self._random.random() < _MOVED else PLACED
                event = Emitted(key, int(number), topic, fate=choose(self._random))
                emitted[await _emit(connection, event)] = event
            if chance < _LATE:
                await asyncio.sleep(self._random.uniform(0.2, 1.5))
            if chance > 1 - _ROLLED_BACK:
                raise _RollBackError
            return emitted

        try:
            await commit(connection, self._dsn, self._ledger, work)
        except _RollBackError:
            await connection.execute("rollback")
            self._ledger.rolled_back += 1


class _RollBackError(Exception):
    """The writer changed its mind."""


async def _emit(connection: AsyncConnection[TupleRow], event: Emitted) -> str:
    statement = "select bridge.emit(%s, jsonb_build_object('n', %s::int, 'fate', %s::text), %s)::text"
    return await _value(connection, statement, event.topic, event.number, event.fate.name, event.key)


async def _value(connection: AsyncConnection[TupleRow], statement: str, *values: object) -> str:
    cursor = await connection.execute(statement, values)
    row = await cursor.fetchone()
    assert row is not None
    return str(row[0])


async def probe(dsn: str, ledger: Ledger, key: str) -> str:
    """Commits one event, the only one of its key, as soon as the database takes it, and returns its id."""

    async def work(connection: AsyncConnection[TupleRow]) -> dict[str, Emitted]:
        event = Emitted(key, 1, PROBED)
        return {await _emit(connection, event): event}

    return (await commit_surely(dsn, ledger, work))[0]


async def burst(dsn: str, ledger: Ledger, name: str, events: int, keys: int) -> None:
    """Commits many events at once."""

    async def work(connection: AsyncConnection[TupleRow]) -> dict[str, Emitted]:
        cursor = await connection.execute(
            "select bridge.emit(%s, jsonb_build_object('n', n / %s + 1), %s || n %% %s)::text, n "
            "from generate_series(0, %s - 1) as n",
            (BURST, keys, f"{name}-", keys, events),
        )
        return {id_: Emitted(f"{name}-{n % keys}", n // keys + 1, BURST) async for id_, n in cursor}

    await commit_surely(dsn, ledger, work)


async def many(dsn: str, ledger: Ledger, name: str, fates: Sequence[Fate]) -> None:
    """Commits at once an event for every worker of each of these fates, each with a key of its own."""

    async def work(connection: AsyncConnection[TupleRow]) -> dict[str, Emitted]:
        events = [Emitted(f"{name}-{place}", 1, MOVED, fate=fate) for place, fate in enumerate(fates)]
        return {await _emit(connection, event): event for event in events}

    await commit_surely(dsn, ledger, work)


async def poison(dsn: str, ledger: Ledger, name: str) -> None:
    """Commits one row of each kind that `emit()` refuses, past it, each between two good events of its key.

    Where the key is what is odd, its neighbours share it.
    """

    async def work(connection: AsyncConnection[TupleRow]) -> dict[str, Emitted]:
        emitted = {}
        for place, row in enumerate(POISON):
            key = f"{name}-{place}-{row.key}"
            for number, (each, is_poison) in enumerate(((Row(), False), (row, True), (Row(), False)), 1):
                event_id = str(uuid.uuid4())
                topic = POISONED if each.topic is None else each.topic
                await connection.execute(
                    "insert into bridge.outbox (event_id, topic, key, payload, content_type, headers, created_at) "
                    "values (%s, %s, %s, %s, %s, %s::text::jsonb, coalesce(%s::timestamptz, clock_timestamp()))",
                    (event_id, topic, key, f'{{"n": {number}}}', each.content_type, each.headers, each.created_at),
                )
                emitted[event_id] = Emitted(key, number, POISONED, is_poison or bool(row.key))
        return emitted

    await commit_surely(dsn, ledger, work)
