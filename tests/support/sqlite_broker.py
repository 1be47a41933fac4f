"""A broker in one SQLite file, written against `bridge.brokers.contract` alone; the test that installs it shows what
a kind of broker needs: one object, and an entry point in the group ``pgbridge.brokers``.
"""

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from bridge.brokers.accounts import Accounts, Installation
from bridge.brokers.contract import (
    CONFIRMED,
    Broker,
    Decide,
    Declaration,
    Failure,
    Letter,
    Never,
    NotSent,
    Order,
    Outcome,
    Queue,
    Sink,
    Subscription,
)
from bridge.errors import BrokerUnavailableError, TopologyError
from bridge.event import Event, Malformed, attributes, from_attributes, matches, replay_mark
from bridge.settings import SinkSettings

LOOK_INTERVAL: Final = 0.02
"""Seconds between two looks for messages."""

SCHEMA: Final = """
create table if not exists subscription (worker text primary key, patterns text not null);
create table if not exists message (
    id integer primary key, worker text not null, state text not null default 'ready',
    attempt integer not null default 1, due real not null default 0,
    attributes text not null, payload blob not null, failure text
);
"""


class SqliteSettings(SinkSettings):
    """``[sinks.<name>]`` with ``type = "sqlite"``."""

    path: Path
    """The file."""


def connect(settings: SqliteSettings) -> sqlite3.Connection:
    """Raises BrokerUnavailableError where no file can be."""
    try:
        return sqlite3.connect(settings.path, isolation_level=None, timeout=10)
    except sqlite3.OperationalError as error:
        raise BrokerUnavailableError(f"{settings.key('path')}: {settings.path} cannot be opened: {error}") from error


def has_tables(connection: sqlite3.Connection) -> bool:
    (count,) = connection.execute(
        "select count(*) from sqlite_schema where name in ('subscription', 'message')"
    ).fetchone()
    return bool(count == 2)


class SqliteSink:
    def __init__(self, settings: SqliteSettings) -> None:
        self._settings = settings
        self._connection: sqlite3.Connection | None = None

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    @property
    def stalled(self) -> str | None:
        """See `contract.Sink.stalled`."""
        return None

    @property
    def pipelines(self) -> bool:
        """See `contract.Sink.pipelines`."""
        return True

    async def open(self) -> None:
        connection = connect(self._settings)
        if not has_tables(connection):
            raise TopologyError(f"{self._settings.key('path')}: no tables. Run `pgbridge topology --apply`")
        self._connection = connection

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        if self._connection is None:
            return [NotSent("the sink is not open")] * len(events)
        subscriptions = self._connection.execute("select worker, patterns from subscription").fetchall()
        self._connection.execute("begin immediate")
        outcomes = [self._deliver(event, subscriptions) for event in events]
        self._connection.execute("commit")
        return outcomes

    def _deliver(self, event: Event, subscriptions: Sequence[tuple[str, str]]) -> Outcome:
        assert self._connection is not None
        wanted = [w for w, patterns in subscriptions if any(matches(p, event.topic) for p in json.loads(patterns))]
        if not wanted:
            return Never("unroutable", f"nobody subscribes to {event.topic!r}")
        row = (json.dumps({**attributes(event), "content-type": event.content_type}), event.payload)
        for worker in wanted:
            self._connection.execute(
                "insert into message (worker, attributes, payload) values (?, ?, ?)", (worker, *row)
            )
        return CONFIRMED

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        connection = connect(self._settings)
        name = str(self._settings.path)
        if has_tables(connection):
            return [Declaration("tables", name, "present")]
        if not apply:
            return [Declaration("tables", name, "missing")]
        connection.executescript(SCHEMA)
        return [Declaration("tables", name, "declared")]

    async def close(self) -> None:
        self._connection = None


class SqliteDelivery:
    def __init__(self, queue: "SqliteQueue", row: tuple[int, int, str, bytes]) -> None:
        self._queue = queue
        self._id, self.attempt, self._attributes, self._payload = row

    @property
    def event(self) -> Event | Malformed:
        return event_of(self._attributes, self._payload)

    async def ack(self) -> None:
        self._queue.change("delete from message where id = ?", self._id)

    async def retry(self, delay: float) -> None:
        again = "update message set state = 'ready', attempt = attempt + 1, due = ? where id = ?"
        self._queue.change(again, time.time() + delay, self._id)

    async def dead_letter(self, failure: Failure) -> None:
        told = json.dumps([failure.code, failure.reason, self.attempt, datetime.now(UTC).isoformat()])
        self._queue.change("update message set state = 'dead', failure = ? where id = ?", told, self._id)

    async def give_back(self) -> None:
        self._queue.change("update message set state = 'ready' where id = ?", self._id)


def event_of(written: str, payload: bytes) -> Event | Malformed:
    flat: dict[str, str] = json.loads(written)
    try:
        return from_attributes(flat, payload, flat.pop("content-type", None))
    except Malformed as error:
        return error


class SqliteQueue:
    def __init__(self, settings: SqliteSettings, subscription: Subscription) -> None:
        self._settings = settings
        self._subscription = subscription
        self._connection: sqlite3.Connection | None = None
        self._stopped = False

    async def open(self) -> None:
        connection = connect(self._settings)
        if (await self.topology(apply=False))[0].state != "present":
            raise TopologyError(
                f"{self._settings.key('path')}: no subscription {self._subscription.worker}. "
                "Run `pgbridge topology --apply`"
            )
        self._connection = connection
        self._stopped = False

    def change(self, statement: str, *values: object) -> list[Any]:
        if self._connection is None:
            raise BrokerUnavailableError(f"{self._settings.key('path')}: the queue is closed")
        return self._connection.execute(statement, values).fetchall()

    async def deliveries(self) -> AsyncIterator[SqliteDelivery]:
        while not self._stopped:
            rows = self.change(
                "update message set state = 'taken' where id = (select min(id) from message "
                "where worker = ? and state = 'ready' and due <= ?) returning id, attempt, attributes, payload",
                self._subscription.worker,
                time.time(),
            )
            for row in rows:
                yield SqliteDelivery(self, row)
            if not rows:
                await asyncio.sleep(LOOK_INTERVAL)

    @property
    def in_hand(self) -> int:
        taken = "select count(*) from message where worker = ? and state = 'taken'"
        [(count,)] = self.change(taken, self._subscription.worker)
        return int(count)

    async def depth(self) -> int:
        ready = "select count(*) from message where worker = ? and state = 'ready'"
        [(count,)] = self.change(ready, self._subscription.worker)
        return int(count)

    async def stop(self) -> None:
        self._stopped = True

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        connection = connect(self._settings)
        worker, patterns = self._subscription.worker, json.dumps(list(self._subscription.topics))
        known = (
            has_tables(connection)
            and connection.execute(
                "select 1 from subscription where worker = ? and patterns = ?", (worker, patterns)
            ).fetchone()
        )
        if known or not apply:
            return [Declaration("subscription", worker, "present" if known else "missing")]
        connection.execute("insert or replace into subscription values (?, ?)", (worker, patterns))
        return [Declaration("subscription", worker, "declared")]

    async def close(self) -> None:
        self._connection = None


class SqliteDeadLetters:
    def __init__(self, settings: SqliteSettings, worker: str) -> None:
        self._settings = settings
        self._worker = worker

    async def walk(self, decide: Decide, order: Order | None = None) -> None:
        connection = connect(self._settings)
        rows = connection.execute(
            "select id, attributes, payload, failure from message where worker = ? and state = 'dead'", (self._worker,)
        ).fetchall()
        found = [
            (row, written, self._letter(event_of(written, payload), row, payload, json.loads(failure)))
            for row, written, payload, failure in rows
        ]
        for row, written, letter in found if order is None else sorted(found, key=lambda each: order(each[2])):
            match await decide(letter):
                case "replay":
                    marked = json.dumps({**json.loads(written), **replay_mark()})
                    connection.execute(
                        "update message set state = 'ready', failure = null, attributes = ? where id = ?", (marked, row)
                    )
                case "discard":
                    connection.execute("delete from message where id = ?", (row,))
                case "keep":
                    pass

    def _letter(self, event: Event | Malformed, row: int, payload: bytes, failure: list[Any]) -> Letter:
        known = event if isinstance(event, Event) else None
        code, reason, attempts, failed_at = failure
        return Letter(
            id=f"{self._worker}:{known.id if known else row}",
            box=self._worker,
            event_id=known.id if known else None,
            topic=known.topic if known else None,
            key=known.key if known else None,
            sink=self._settings.name,
            code=code,
            reason=reason,
            attempts=attempts,
            failed_at=datetime.fromisoformat(failed_at),
            payload=payload,
        )


class Sqlite:
    """What the entry point names."""

    settings = SqliteSettings
    requires = None
    example = "/var/lib/shop/events.db"

    def accounts(self, installation: Installation, /) -> Accounts:
        how = "let bridge and workers write to {file}"
        return Accounts({"path": installation.place}, {}, "sqlite.txt", "Whoever may write to the file.\n", how)

    def sink(self, settings: SqliteSettings, /) -> Sink:
        return SqliteSink(settings)

    def queue(self, settings: SqliteSettings, subscription: Subscription, /) -> Queue:
        return SqliteQueue(settings, subscription)

    def dead_letters(self, settings: SqliteSettings, worker: str, /, *, lanes: int = 1) -> SqliteDeadLetters:
        return SqliteDeadLetters(settings, worker)


BROKER: Final[Broker] = Sqlite()
