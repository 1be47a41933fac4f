"""Where every bridge is in the log: what `pgbridge status` shows, and what the leader's gauges say (`sample.py`)."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from bridge.errors import UsageError
from bridge.postgres.connection import connect, database_errors
from bridge.postgres.pause import Pause
from bridge.postgres.wire import Connection
from bridge.settings import Settings


@dataclass(frozen=True, slots=True)
class SinkPosition:
    """One sink's place in the log. Ages in seconds; None where there is nothing."""

    sink: str
    """Its name; empty for what no route takes, ``*`` for every sink of a bridge that has not run since an upgrade."""
    mark: int
    gaps: int
    """Ids below the mark that may still appear."""
    held: int
    """Events below the mark that its broker refused for now, and what waits behind them."""
    backlog: int
    """Events that are not settled."""
    backlog_exact: bool
    """False where it was too long to be counted, and is reckoned from its beginning and the distance of the ids."""
    oldest_unsent_seconds: float | None
    stored_seconds: float
    """Since the position was stored; it is stored only when something was settled."""
    problem: str | None
    """Why it is behind, in words."""
    problem_seconds: float | None
    paused: Pause | None = None

    @property
    def title(self) -> str:
        """What people call it."""
        return _NO_SINK.get(self.sink, f"sink {self.sink}")


_NO_SINK: Final = {"": "events without a route", "*": "all sinks, as before the upgrade"}


@dataclass(frozen=True, slots=True)
class Bridge:
    """One bridge, and how far its sinks are."""

    name: str
    leader: str | None
    """``host:pid`` of the process that leads; None while nobody does."""
    leader_since: datetime | None
    last_id: int
    asleep: bool
    dead_letters: int
    sinks: tuple[SinkPosition, ...]
    standing_by: int = 0
    """Processes of this name that are ready to lead, beside the leader."""

    @property
    def oldest_unsent_seconds(self) -> float | None:
        """Age of the oldest event that some sink has not settled."""
        return max((sink.oldest_unsent_seconds or 0.0 for sink in self.sinks), default=None) or None


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """How one worker stands, by its inbox."""

    worker: str
    running: int
    """Events that living processes have claimed; what runs without a claim is in no inbox yet."""
    waiting: int
    """Events that wait for another attempt."""
    finished_last_hour: int
    dead_letters: int
    """That the inbox knows of and nobody has discarded since."""
    held_keys: int
    exact: bool
    """False where there are more events than were counted: then more may run, and more were finished."""
    paused: Pause | None


@dataclass(frozen=True, slots=True)
class Guards:
    """What in the database endangers the log."""

    notification_queue_usage: float
    """Used part of the server's queue, 0 to 1; when it is full, every NOTIFY fails."""
    oldest_transaction_seconds: float | None
    oldest_transaction: str | None
    """Who holds the oldest transaction or snapshot; it stops vacuum and keeps gaps open."""
    sees_sessions: bool
    """Whether the schema's owner may see other sessions; if not, the oldest transaction is not known."""
    outbox_bytes: int
    oldest_event_at: datetime | None
    next_prune_at: datetime | None
    """When the oldest event is due to be deleted, if every bridge has settled it by then."""
    held_back_by: tuple[str, ...]
    """Bridges whose unsettled events are past the retention, so that nothing behind them is deleted."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Events that are scheduled, and not in the log before their time."""

    events: int
    exact: bool
    """False where there are more than were counted: 100,000."""
    next_at: datetime | None
    """When the first is due; past where no bridge leads, or somebody is cancelling it."""


@dataclass(frozen=True, slots=True)
class Status:
    """A look at everything."""

    at: datetime
    bridges: tuple[Bridge, ...]
    guards: Guards
    scheduled: Waiting
    workers: tuple[WorkerStatus, ...] = ()
    """Where they were asked for."""


_PROCESSES: Final = """
select n, count(*)
from unnest(%s::text[]) n
join pg_catalog.pg_stat_activity a on a.application_name = left('pgbridge ' || n || ' bell', 63)
where a.datname = current_database()
group by n
"""
"""How many processes listen for a bridge: each has one such session. Every role sees these columns of all sessions."""


COUNTED: Final = 100_000
"""Events that are counted where nobody says how many."""


async def clock(connection: Connection) -> datetime:
    """The time there. Raises as `look`."""
    with database_errors():
        cursor = await connection.execute("select clock_timestamp()")
        [(now,)] = await cursor.fetchall()
    return now  # type: ignore[no-any-return]


async def look(
    connection: Connection, retention: float, workers: Sequence[str] | None = None, *, counted: int = COUNTED
) -> Status:
    """Looks once; `retention` in seconds. With `workers`, at those too, as `look_at_workers`. Of each sink's backlog,
    and of the inbox, so many events are `counted` at most.

    Raises DatabaseUnavailableError, PrivilegeError, SchemaError.
    """
    with database_errors():
        cursor = await connection.execute(
            "select clock_timestamp(), name, leader, leader_since, last_id, asleep, dead_letters, sink, mark, gaps, "
            "held, backlog, backlog_exact, oldest_unsent_at, stored_at, problem, problem_since from bridge.status(%s)",
            [counted],
        )
        rows = await cursor.fetchall()
        names = sorted({row[1] for row in rows})
        cursor = await connection.execute(
            "select n, p.sink, p.since, p.who, p.why from unnest(%s::text[]) n, bridge.paused_sinks(n) p", [names]
        )
        pauses = {(name, sink): Pause(*pause) for name, sink, *pause in await cursor.fetchall()}
        cursor = await connection.execute(_PROCESSES, [names])
        processes: dict[str, int] = dict(await cursor.fetchall())
        working = () if workers is None else await look_at_workers(connection, workers, counted)
        cursor = await connection.execute(
            "select clock_timestamp(), notification_queue_usage, oldest_transaction_at, oldest_transaction, "
            "sees_sessions, outbox_bytes, bridge.calendar_time(oldest_event_at) from bridge.guards()"
        )
        [(now, queue, transaction_at, transaction, sees, size, oldest)] = await cursor.fetchall()
        cursor = await connection.execute("select waiting, is_exact, next_at from bridge.scheduled_status()")
        [waiting] = await cursor.fetchall()
    bridges: dict[str, Bridge] = {}
    for at, name, leader, since, last_id, asleep, letters, sink, *place, unsent_at, stored_at, words, began in rows:
        ages = _age(at, unsent_at), _age(at, stored_at) or 0.0, words, _age(at, began)
        position = SinkPosition(*[sink, *place, *ages, pauses.get((name, sink))])
        beside = max(0, processes.get(name, 0) - (leader is not None))
        known = bridges.get(name) or Bridge(name, leader, since, last_id, asleep, letters, (), beside)
        bridges[name] = replace(known, sinks=(*known.sinks, position))
    return Status(
        now,
        tuple(bridges.values()),
        Guards(
            queue,
            _age(now, transaction_at),
            transaction,
            sees,
            size,
            oldest,
            oldest + timedelta(seconds=retention) if oldest else None,
            tuple(b.name for b in bridges.values() if (b.oldest_unsent_seconds or 0.0) > retention),
        ),
        Waiting(*waiting),
        working,
    )


async def look_at_workers(connection: Connection, names: Sequence[str], counted: int) -> tuple[WorkerStatus, ...]:
    """These workers, and all that have an inbox. Raises as `look`."""
    with database_errors():
        cursor = await connection.execute(
            "select worker, running, waiting, finished_last_hour, dead_letters, held_keys, is_exact, paused_since, "
            "paused_by, paused_why from bridge.worker_status(%s::text[], %s)",
            [list(names), counted],
        )
        rows = await cursor.fetchall()
    return tuple(
        WorkerStatus(
            worker, running, waiting, finished, dead, held, exact, None if since is None else Pause(since, who, why)
        )
        for worker, running, waiting, finished, dead, held, exact, since, who, why in rows
    )


def _age(now: datetime, then: datetime | None) -> float | None:
    return max(0.0, (now - then).total_seconds()) if then is not None else None


async def watch(settings: Settings, interval: float | None, *, workers: bool = False) -> AsyncIterator[Status]:
    """A look, and with `interval` (seconds) further ones without end; with `workers`, at those too.

    Raises what `look` and `connect` raise, and UsageError where the settings keep nothing in the database.
    """
    if not settings.reads_outbox:
        raise UsageError(
            'with channels.buffer = "memory" nothing is kept in the database, so it has no status; '
            "set observe.listen and look at /health and /metrics"
        )
    connection = await connect(settings.postgres, f"pgbridge {settings.name} status")
    async with connection:
        while True:
            names = sorted(settings.workers) if workers else None
            yield await look(connection, settings.outbox_or_default.retention, names)
            if interval is None:
                return
            await asyncio.sleep(interval)


@dataclass(frozen=True, slots=True)
class Rates:
    """Events a second between two looks, by the distance of ids; rolled back ones count."""

    emitted: float
    settled: float


def rates(before: Status, after: Status, name: str, sink: str) -> Rates | None:
    """Of one sink of one bridge; None when it is missing from either look."""
    seconds = (after.at - before.at).total_seconds()
    old, new = _position(before, name, sink), _position(after, name, sink)
    if old is None or new is None or seconds <= 0:
        return None
    return Rates(max(0, new[0] - old[0]) / seconds, max(0, new[1] - old[1]) / seconds)


def _position(status: Status, name: str, sink: str) -> tuple[int, int] | None:
    """The log's last id and the sink's mark."""
    for bridge in status.bridges:
        for position in bridge.sinks if bridge.name == name else ():
            if position.sink == sink:
                return bridge.last_id, position.mark
    return None
