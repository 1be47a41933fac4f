"""The workers as the database knows them beside `status`: their processes, what they have in hand, what became of the
rest, and the keys that they hold. All of it with a bound on what is looked at: an inbox has millions of rows, and no
index over what is not finished, which every event that finishes would pay for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from operator import itemgetter
from typing import Any, Final, Literal

from psycopg.rows import class_row

from bridge.postgres.connection import answered
from bridge.postgres.history import Span, quantile, read_history
from bridge.postgres.wire import Connection

LOOK_AT: Final = 1500
"""Events that are looked at, those begun last, of all workers together."""

SHOWN: Final = 20
"""Events of each kind, and keys of a page, that are given."""

STEPS: Final = 100
"""Keys, of all workers together, over which a page of those of one worker steps at most."""

LATELY: Final = Span("5 minutes", 15, 20)
"""What `Lately` is made of."""

_FRESH: Final = 3
"""Steps: of the queue, what the last sample in them says; what it was before is not what it is."""

_FIRST_LINE: Final = -(2**63)

Part = Literal["running", "waiting", "effects", "failed", "finished"]


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a worker: a session of PostgreSQL, with which its claims live and die."""

    pid: int
    """Of that session, in PostgreSQL."""
    since: datetime | None
    """None where the owner of the schema may not see it."""
    address: str | None
    """As for `since`; None for a socket of this machine, too."""
    in_hand: int
    oldest_at: datetime | None
    """When the oldest event in hand was begun for the first time."""


@dataclass(frozen=True, slots=True)
class AtWork:
    """What a worker has in hand, and what of it waits."""

    processes: list[Process] = field(default_factory=list)
    next_due_at: datetime | None = None
    """When the next of those that wait is tried again."""
    open_effects: int = 0
    """Events with an outside effect that was begun and has no outcome."""

    @property
    def oldest_at(self) -> datetime | None:
        """When the oldest event in hand was begun for the first time."""
        return min((process.oldest_at for process in self.processes if process.oldest_at is not None), default=None)


async def at_work(connection: Connection, names: Sequence[str]) -> dict[str, AtWork]:
    """By name, of all these workers.

    Raises DatabaseUnavailableError, PrivilegeError, SchemaError.
    """
    with answered(connection):
        cursor = await connection.execute(
            "select worker, pid, since, host(address), in_hand, oldest_at, next_due_at, open_effects "
            "from bridge.worker_processes(%s::text[], %s)",
            [list(names), LOOK_AT],
        )
        rows = await cursor.fetchall()
    found = {name: AtWork() for name in names}
    for name, pid, since, address, in_hand, oldest_at, due_at, effects in rows:
        known = found[name]
        processes = known.processes
        if pid is not None:
            processes = [*processes, Process(pid, since, address, in_hand, oldest_at)]
        found[name] = AtWork(processes, known.next_due_at or due_at, known.open_effects + effects)
    return found


@dataclass(frozen=True, slots=True)
class Handled:
    """An event that a worker has begun."""

    part: Part
    event_id: str
    attempts: int
    started_at: datetime
    """When it was begun for the first time."""
    finished_at: datetime | None
    due_at: datetime | None
    """When it may be tried again."""
    ended_at: datetime | None
    """When the broker took its dead letter."""
    pid: int | None
    """The process that has it in hand."""
    code: str | None
    """Of the failure with which it was given up, until the broker has its dead letter, which has it then."""
    reason: str | None
    open_effects: Mapping[str, str] | None
    """In the part `effects`: each operation that has no outcome, and when it was begun, as ISO 8601 has it."""

    @property
    def open(self) -> list[tuple[str, datetime]]:
        """The same, as times, in their order."""
        found = [(name, datetime.fromisoformat(at)) for name, at in (self.open_effects or {}).items()]
        return sorted(found, key=itemgetter(1))

    @property
    def seconds(self) -> float | None:
        """From the first attempt to the reply."""
        return None if self.finished_at is None else max(0.0, (self.finished_at - self.started_at).total_seconds())


async def worker_events(connection: Connection, name: str) -> dict[Part, list[Handled]]:
    """What one worker has in hand, what waits, open effects, and what became of the rest: 20 of each at most, see
    `bridge.worker_events`. Raises as `at_work`."""
    parts: dict[Part, list[Handled]] = {"running": [], "waiting": [], "effects": [], "failed": [], "finished": []}
    with answered(connection):
        async with connection.cursor(row_factory=class_row(Handled)) as cursor:
            await cursor.execute(
                "select part, event_id::text, attempts, started_at, finished_at, due_at, ended_at, pid, code, reason, "
                "open_effects from bridge.worker_events(%s, %s, %s)",
                [name, LOOK_AT, SHOWN],
            )
            for event in await cursor.fetchall():
                parts[event.part].append(event)
    return parts


@dataclass(frozen=True, slots=True)
class HeldKey:
    """A key that waits for a dead letter."""

    key: str
    event_id: str
    """Of the first, which is to be replayed or discarded."""
    since: datetime
    behind: int
    """Events that wait behind it; 100 stands for more, too."""


@dataclass(frozen=True, slots=True)
class HeldKeys:
    """A page of them, in no order that would mean anything."""

    keys: list[HeldKey]
    next_after: int | None
    """Where the next page, or the rest of the search, begins; None at the end."""


async def held_keys(connection: Connection, name: str, after: int | None = None) -> HeldKeys:
    """Keys that one worker holds; `after` as a page before gave it. Raises as `at_work`."""
    with answered(connection):
        cursor = await connection.execute(
            "select next_after, key, event_id::text, since, behind from bridge.keys_held(%s, %s, %s, %s)",
            [name, _FIRST_LINE if after is None else after, STEPS, SHOWN],
        )
        rows = await cursor.fetchall()
    return HeldKeys([HeldKey(*row[1:]) for row in rows if row[1] is not None], rows[0][0])


@dataclass(frozen=True, slots=True)
class Lately:
    """What the samples of the last five minutes say of a worker, over all its processes."""

    outcomes: Mapping[str, int]
    """How many deliveries became what; only what there was."""
    per_second: float
    """Handled, while there were samples."""
    median: float | None
    """Of the durations of attempts, in seconds; None where there was none."""
    slow: float | None
    """So long took 99 % of them at most."""
    depth: int | None = None
    """Messages in its queue, at a sample of the last minute; None without one, and on Pub/Sub, which does not tell."""


async def lately(connection: Connection, names: Sequence[str]) -> dict[str, Lately]:
    """By name; without those that have stored no sample. Raises as `at_work`."""
    found: dict[str, Lately] = {}
    for name, history in (await read_history(connection, "worker", "", names, LATELY)).items():
        slots = [slot for slot in history.slots if slot is not None]
        counts: dict[str, Any] = {}
        for slot in slots:
            for count, value in slot.counts.items():
                counts[count] = counts.get(count, 0.0) + value
        if slots:
            outcomes = {
                count: round(value)
                for count, value in sorted(counts.items())
                if value and count != "in_hand" and not count.startswith("le_")
            }
            rate = counts.get("handled", 0.0) / (LATELY.step * len(slots))
            fresh = [slot.levels for slot in history.slots[-_FRESH:] if slot is not None]
            depths = [levels["queue_depth"] for levels in fresh if "queue_depth" in levels]
            depth = round(depths[-1]) if depths else None
            found[name] = Lately(outcomes, rate, quantile(counts, 0.5), quantile(counts, 0.99), depth)
    return found
