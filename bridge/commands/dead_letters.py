"""All dead letters as one list: the outbox's, and those of each worker's queue, in boxes with one name each.

`pgbridge dead` (dead.py) is the command; dead_outbox.py has the rows of the outbox, and each broker its own queues.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from bridge.brokers.contract import DeadLetters, Letter, Order, Verdict
from bridge.brokers.registry import broker_of
from bridge.commands.dead_groups import group_id
from bridge.commands.dead_outbox import (
    OUTBOX,
    Report,
    discard_letters,
    list_letters,
    read_letters,
    replay_letters,
)
from bridge.commands.republish import Pace
from bridge.errors import PgbridgeError, UsageError
from bridge.event import matches
from bridge.postgres.connection import connect, database_errors
from bridge.postgres.wire import Connection
from bridge.process.tasks import unless_stopped
from bridge.settings import Settings


@dataclass(frozen=True, slots=True)
class Choice:
    """Which letters; what is empty or None does not restrict."""

    ids: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    """Patterns."""
    codes: tuple[str, ...] = ()
    sinks: tuple[str, ...] = ()
    """Letters of the outbox that these sinks refused."""
    workers: tuple[str, ...] = ()
    """Letters of these workers' queues."""
    since: datetime | None = None
    limit: int | None = None
    groups: tuple[str, ...] = ()
    """Ids, as `dead_groups.group_id` gives them."""
    until: datetime | None = None
    """Given up then, or before: what somebody has seen, and nothing that came meanwhile."""

    @property
    def is_empty(self) -> bool:
        """Whether it restricts nothing."""
        lists = (self.ids, self.topics, self.codes, self.sinks, self.workers, self.groups)
        return not (any(lists) or self.since or self.until or self.limit)

    def takes(self, letter: Letter) -> bool:
        """Whether the letter is meant; `limit` is for whoever counts."""
        return (
            (not self.ids or letter.id in self.ids)
            and (not self.topics or any(matches(pattern, letter.topic or "") for pattern in self.topics))
            and (not self.codes or letter.code in self.codes)
            and (not self.sinks or (letter.box == OUTBOX and letter.sink in self.sinks))
            and (not self.workers or letter.box in self.workers)
            and (not self.groups or group_id(letter) in self.groups)
            and (self.since is None or (letter.failed_at is not None and letter.failed_at >= self.since))
            and (self.until is None or letter.failed_at is None or letter.failed_at <= self.until)
        )

    def looks_into(self, box: str) -> bool:
        """Whether letters of a box can be meant at all; `box` is ``outbox`` or a worker."""
        return (
            (not self.ids or any(id_.partition(":")[0] == box for id_ in self.ids))
            and (not self.workers or box in self.workers)
            and (not self.sinks or box == OUTBOX)
        )


Unreachable = Callable[[str, PgbridgeError], None]
"""Gets the name of a box that could not be looked into, and why."""


async def find(settings: Settings, choice: Choice, unreachable: Unreachable) -> list[Letter]:
    """The letters that are meant: the outbox's first, then each worker's, each oldest first. They stay.

    Raises UsageError for an id or a worker that there cannot be. Whatever a box raises goes to `unreachable`.
    """
    found: list[Letter] = []

    async def keep(letter: Letter) -> Verdict:
        if choice.takes(letter) and (choice.limit is None or len(found) < choice.limit):
            found.append(letter)
        return "keep"

    boxes = boxes_of(settings, choice)
    if settings.reads_outbox and choice.looks_into(OUTBOX):
        try:
            async with _connected(settings) as connection:
                for letter in await list_letters(connection, settings.name):
                    await keep(letter)
        except PgbridgeError as error:
            unreachable(OUTBOX, error)
    for name, box in boxes.items():
        try:
            await box.walk(keep)
        except PgbridgeError as error:
            unreachable(name, error)
    return found


async def show(settings: Settings, id_: str) -> Letter:
    """One letter with all that is known of it. Raises UsageError when there is none, and what its box raises."""
    found: list[Letter] = []

    def fail(_: str, error: PgbridgeError) -> None:
        raise error

    if id_.startswith(f"{OUTBOX}:"):
        async with _connected(settings) as connection:
            found = await read_letters(connection, settings.name, [id_])
    else:
        found = await find(settings, Choice(ids=(id_,)), fail)
    if not found:
        raise UsageError(f"there is no dead letter {id_}; `pgbridge dead list` shows those that there are")
    return found[0]


class _Enough(Exception):  # noqa: N818 - named for what it says
    """Ends a walk: no further letter is wanted."""


@dataclass(slots=True)
class Outcome:
    """What came of a replay or a discard."""

    done: int = 0
    refused: int = 0
    """Letters whose replay was refused again; they stay."""
    seen: set[str] = field(default_factory=set)
    """Ids of the letters that were acted on."""
    groups: set[str] = field(default_factory=set)
    """Ids of their groups."""
    stopped: bool = False
    """Whether it was interrupted."""


async def replay_or_discard(
    settings: Settings,
    action: Literal["replay", "discard"],
    choice: Choice,
    *,
    person: str,
    why: str = "",
    rate: float | None = None,
    report: Report,
    stop: asyncio.Event,
) -> Outcome:
    """Replays or discards the letters that are meant; each is audited, as an act of this `person`, and reported.

    Stops soon after `stop` is set. Raises UsageError, and what database and brokers raise.
    """
    outcome = Outcome()
    pace = Pace(rate)

    def count(letter: Letter, problem: str | None) -> None:
        if problem is None:
            outcome.done += 1
        else:
            outcome.refused += 1
        outcome.seen.add(letter.id)
        outcome.groups.add(group_id(letter))
        report(letter, problem)

    boxes = boxes_of(settings, choice)
    async with _connected(settings) as connection:
        taken = 0
        if choice.looks_into(OUTBOX):
            letters = [letter for letter in await list_letters(connection, settings.name) if choice.takes(letter)]
            letters = letters[: choice.limit]
            taken = len(letters)
            if action == "replay":
                await replay_letters(settings, connection, letters, pace, person, report=count, stop=stop)
            elif letters:
                await discard_letters(connection, letters, person, why)
                for letter in letters:
                    count(letter, None)

        async def decide(letter: Letter) -> Verdict:
            nonlocal taken
            if stop.is_set() or (choice.limit is not None and taken >= choice.limit):
                raise _Enough
            if not choice.takes(letter):
                return "keep"
            taken += 1
            if action == "replay":
                await unless_stopped(stop, pace.wait(1))
                if stop.is_set():
                    raise _Enough
            # Before the broker acts: a crash in between leaves a line too many, never one too few.
            await _audit(connection, letter, f"{action}ed", person, why)
            count(letter, None)
            return action

        for name, box in boxes.items():
            holds = settings.workers[name].holds
            order = await _places(connection, name) if holds and action == "replay" else None
            with suppress(_Enough):
                await box.walk(decide, order)
    outcome.stopped = stop.is_set()
    return outcome


async def _places(connection: Connection, worker: str) -> Order:
    """The order in which the letters of a worker that holds keys may run; behind them, those that hold none."""
    with database_errors():
        held = await connection.execute("select event_id::text, place from bridge.held where worker = %s", [worker])
        places: dict[str, int] = dict(await held.fetchall())

    def place(letter: Letter) -> float:
        return places.get(letter.inbox_id or "", math.inf)

    return place


async def _audit(connection: Connection, letter: Letter, action: str, person: str, why: str) -> None:
    with database_errors():
        await connection.execute(
            "select bridge.audit_dead_letter(%s, %s, %s, %s, %s, %s, %s, %s)",
            (letter.id, action, letter.event_id, letter.topic, letter.code, letter.reason, person, why),
        )


def boxes_of(settings: Settings, choice: Choice) -> Mapping[str, DeadLetters]:
    """The workers' boxes that can be meant, by worker. Raises UsageError for an unknown worker, and SettingsError."""
    named = {*choice.workers, *(id_.partition(":")[0] for id_ in choice.ids)} - {OUTBOX}
    if unknown := sorted(named - set(settings.workers)):
        known = ", ".join([OUTBOX, *sorted(settings.workers)])
        raise UsageError(f"there is no worker {', '.join(map(repr, unknown))}; ids begin with one of: {known}")
    wanted = [name for name in settings.workers if choice.looks_into(name)]
    boxes: dict[str, DeadLetters] = {}
    for name in wanted:
        sink = settings.sinks[settings.sink_of(name)]
        box = broker_of(sink).dead_letters(sink, name, lanes=settings.workers[name].lanes)
        if box is not None:
            boxes[name] = box
    return boxes


@asynccontextmanager
async def _connected(settings: Settings) -> AsyncIterator[Connection]:
    connection = await connect(settings.postgres, "pgbridge dead")
    async with connection:
        yield connection


def selected_ids(ids: Sequence[str]) -> tuple[str, ...]:
    """Ids as given on the command line. Raises UsageError for one without a colon."""
    for id_ in ids:
        if ":" not in id_:
            raise UsageError(
                f"{id_!r} is not the id of a dead letter, which looks like outbox:12 or <worker>:<event id>"
            )
    return tuple(ids)
