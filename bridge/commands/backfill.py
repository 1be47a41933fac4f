"""`pgbridge backfill`: the present rows of a watched table as events, beside its changes."""

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from bridge.commands.republish import Pace
from bridge.errors import SettingsError, UsageError
from bridge.postgres import backfill as steps
from bridge.postgres.backfill import Backfill, Begun, BusyError, Step
from bridge.postgres.connection import connect
from bridge.postgres.pooler import require_own_session
from bridge.postgres.wire import Connection
from bridge.process.logs import configure
from bridge.process.person import current_person
from bridge.process.tasks import run, unless_stopped
from bridge.process.terminal import (
    age,
    config_option,
    exit_codes,
    json_option,
    moment,
    print_json,
    rate_option,
    stop_on_interrupt,
)
from bridge.process.terminal import (
    table as print_table,
)
from bridge.routes import Routes
from bridge.settings import Settings, load

NAME: Final = "pgbridge backfill"
"""How PostgreSQL lists its session."""

_FIRST_CHUNK: Final = 100
"""Rows, while it is not known how long they take."""
_CHUNK_SECONDS: Final = 0.1
"""How long the rows of a chunk may stay locked, as far as their number decides it."""
_MOST_SKIPPED: Final = 1000
"""Rows that are skipped and remembered; each chunk stores them anew."""
_RETRY_INTERVAL: Final = 1.0
"""Seconds between two looks whether what was skipped is still locked."""
_SHORTEST_WAIT, _LONGEST_WAIT = 0.02, 0.5
"""Seconds between two looks at what it waits for."""
_LINE_INTERVAL: Final = 1.0
"""Seconds between two lines of JSON."""


@dataclass(slots=True)
class Progressed:
    """How far a backfill is."""

    topic: str
    about: int
    sent: int
    """Rows in all, with those before it was interrupted."""
    sent_here: int = 0
    """By this process."""
    skipped: int = 0
    finished: bool = False
    waits_for: str | None = None
    """In words, while it cannot go on."""
    began: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Rows a second, of this process."""
        return self.sent_here / max(time.monotonic() - self.began, 0.001)

    @property
    def seconds_left(self) -> float | None:
        """By its rate; None while that says nothing."""
        return max(self.about - self.sent, 0) / self.rate if self.sent_here else None


@dataclass(frozen=True, slots=True)
class Wish:
    """What a person asked for."""

    table: str
    topic: str | None = None
    """None: as the table's watch says."""
    rate: float | None = None
    """Most rows a second."""
    chunk: int = 1000
    """Most rows that are locked at once."""
    backlog: int = 10_000
    """It waits while a sink is further behind than this many events."""
    anew: bool = False


class _Backfilling:
    """One backfill under way, on its session."""

    def __init__(self, settings: Settings, connection: Connection, wish: Wish, begun: Begun) -> None:
        self.progress = Progressed(begun.topic, begun.about, begun.sent)
        self._key = settings.postgres.key("dsn")
        self._connection = connection
        self._wish = wish
        self._run = begun.run
        self._pace = Pace(wish.rate)
        self._most = wish.chunk if wish.rate is None else min(wish.chunk, self._pace.chunk)
        self._size = min(self._most, _FIRST_CHUNK)
        self._walked = False
        self._retry_at = 0.0
        self._waited = 0
        """How often it has waited for the lock of one row; each time it is another row's turn."""

    async def require_reader(self, settings: Settings) -> None:
        """Raises SettingsError where nobody would publish the events: each row would become a dead letter."""
        topic = self.progress.topic
        if not Routes([(route.topic, route.sink) for route in settings.routes]).sinks_of(topic):
            raise SettingsError(
                f"routes: none takes the topic {topic!r}, so no row would reach a broker. Add one and restart the "
                "bridge, or name another topic: --topic TOPIC"
            )
        sinks = [at for at in await self._behind() if at.bridge == settings.name]
        if sinks and not any(at.takes for at in sinks):
            raise SettingsError(
                f"routes: the bridge {settings.name!r} does not publish the topic {topic!r} yet, so no row would reach "
                "a broker. Let it read its settings: restart it, or send it SIGHUP"
            )

    async def go_on(self, stop: asyncio.Event, told: Callable[[Progressed], None]) -> None:
        """Until all rows are sent, or `stop` is set. Raises what `steps.chunk` raises, but for BusyError."""
        pause = _SHORTEST_WAIT
        while not (stop.is_set() or self.progress.finished):
            taken, self.progress.waits_for = await self._try()
            told(self.progress)
            if taken:
                await unless_stopped(stop, self._pace.wait(taken))
            if self.progress.waits_for is None:
                pause = _SHORTEST_WAIT
            else:
                await unless_stopped(stop, asyncio.sleep(pause))
                pause = min(2 * pause, _LONGEST_WAIT)

    async def _try(self) -> tuple[int, str | None]:
        """The rows that a step has sent, and what the next one has to wait for."""
        behind = [at for at in await self._behind() if at.takes and at.behind > self._wish.backlog]
        if behind:
            worst = max(behind, key=attrgetter("behind"))
            return 0, f"the sink {worst.sink!r} of the bridge {worst.bridge!r}, which is {worst.behind} events behind"
        try:
            return await self._step(), None
        except BusyError:
            skipped = self.progress.skipped
            return 0, f"{skipped} rows that others have locked" if skipped else "a lock of the table"

    async def _step(self) -> int:
        """One transaction, or a second one if the first could do nothing. Raises BusyError."""
        skipped = self.progress.skipped
        if skipped and (self._walked or time.monotonic() >= self._retry_at):
            self._retry_at = time.monotonic() + _RETRY_INTERVAL
            taken = self._count(await steps.skipped(self._connection, self._key, self._run))
            if taken or self.progress.finished:
                return taken
        if skipped and (self._walked or skipped >= _MOST_SKIPPED):
            # Where a row is never free for long, only who queues for its lock gets it.
            self._waited += 1
            return self._count(await steps.skipped(self._connection, self._key, self._run, self._waited))
        began = time.monotonic()
        step = await steps.chunk(self._connection, self._key, self._run, self._size, _MOST_SKIPPED)
        self._size = self._next_size(time.monotonic() - began)
        return self._count(step)

    def _next_size(self, seconds: float) -> int:
        if seconds > _CHUNK_SECONDS:
            return max(1, self._size // 2)
        return min(2 * self._size, self._most) if seconds < _CHUNK_SECONDS / 4 else self._size

    def _count(self, step: Step) -> int:
        self._walked = step.walked
        self.progress.sent += step.taken
        self.progress.sent_here += step.taken
        self.progress.skipped = step.skipped
        self.progress.finished = step.finished
        return step.taken

    async def _behind(self) -> list[steps.Backlog]:
        return await steps.sinks_behind(self._connection, self._key, self.progress.topic)


async def backfill_table(
    settings: Settings,
    wish: Wish,
    *,
    stop: asyncio.Event,
    began: Callable[[Begun], None] = lambda _: None,
    told: Callable[[Progressed], None] = lambda _: None,
) -> Progressed:
    """Sends every row of a watched table as an event, or goes on where a backfill of it was interrupted.

    Returns when all are sent, or soon after `stop` is set. Raises UsageError, SettingsError, PrivilegeError, and what
    `connect` and `translated` give.
    """
    connection = await connect(settings.postgres, NAME)
    async with connection:
        # The lock that keeps a second one away is the session's.
        await require_own_session(connection, settings.postgres, NAME)
        key = settings.postgres.key("dsn")
        begun = await steps.begin(connection, key, wish.table, wish.topic, current_person(), anew=wish.anew)
        began(begun)
        backfilling = _Backfilling(settings, connection, wish, begun)
        try:
            await backfilling.require_reader(settings)
        except SettingsError:
            if not begun.sent:
                await steps.cancel(connection, key, wish.table)
            raise
        await backfilling.go_on(stop, told)
    return backfilling.progress


async def _list(settings: Settings, most: int) -> list[Backfill]:
    connection = await connect(settings.postgres, NAME)
    async with connection:
        return await steps.backfills(connection, settings.postgres.key("dsn"), most)


async def _cancel(settings: Settings, table: str) -> bool:
    connection = await connect(settings.postgres, NAME)
    async with connection:
        return await steps.cancel(connection, settings.postgres.key("dsn"), table)


@click.command()
@click.argument("table", required=False)
@click.option("--topic", help="The topic of the events; default: as the table is watched, SCHEMA.TABLE.read.")
@rate_option
@click.option("--chunk", type=click.IntRange(1), default=1000, show_default=True, help="Most rows locked at once.")
@click.option(
    "--backlog", type=click.IntRange(1), default=10_000, show_default=True,
    help="Waits while a sink of the topic is further behind than so many events.",
)  # fmt: skip
@click.option("--restart", "anew", is_flag=True, help="Begins anew; does not go on where it was interrupted.")
@click.option("--cancel", "cancelled", is_flag=True, help="Ends the backfill of TABLE that has not ended.")
@click.option("--list", "listed", is_flag=True, help="Lists those that have not ended, and the last others.")
@config_option
@json_option
@exit_codes
def backfill(
    table: str | None, topic: str | None, rate: float | None, chunk: int, backlog: int, anew: bool, cancelled: bool,
    listed: bool, config: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Sends the present rows of a watched table as events, beside its changes.

    Each row becomes an event with the operation "read" and the key of its changes, in order with them. What was
    interrupted goes on where it was; two at once are refused.
    """
    settings = load(config)
    configure(settings.observe)
    if not settings.reads_outbox:
        raise UsageError('with channels.buffer = "memory" nothing is kept in the database, so there is no backfill')
    if listed:
        _show(run(_list(settings, 100)), as_json)
    elif table is None:
        raise UsageError("name a table, or --list")
    elif cancelled:
        done = run(_cancel(settings, table))
        click.echo(
            f"The backfill of {table} {'is cancelled' if done else 'is not under way: nothing to cancel'}.", err=True
        )
    else:
        _run(settings, Wish(table, topic, rate, chunk, backlog, anew), as_json)


def _run(settings: Settings, wish: Wish, as_json: bool) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    console = Console(stderr=True)
    lines = _Lines(wish.table) if as_json else None

    async def work(bar: Progress) -> Progressed:
        stop = asyncio.Event()
        stop_on_interrupt(stop)
        task = bar.add_task("looking at the table")

        def show(so_far: Progressed) -> None:
            if lines is not None:
                lines.show(so_far)
            # The estimate may be too low.
            bar.update(task, description=_words(so_far), total=max(1, so_far.about, so_far.sent), completed=so_far.sent)

        return await backfill_table(settings, wish, stop=stop, began=_remark, told=show)

    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        done = run(work(bar))
    if lines is not None:
        lines.print(done)
    elif done.finished:
        click.echo(
            f"{done.sent} rows sent to the topic {done.topic}, {done.sent_here} of them now, {done.rate:.0f} a second."
        )
    if not done.finished:
        click.echo(
            f"Interrupted after {done.sent} rows. The same command goes on from there; --cancel gives up.", err=True
        )
        sys.exit(130)


def _remark(begun: Begun) -> None:
    if begun.sent:
        click.echo(f"Goes on after {begun.sent} rows.", err=True)
    if begun.unseen:
        missing = " and ".join(f"{operation}s" for operation in begun.unseen)
        click.echo(f"The table's watch does not tell of {missing}: what they change meanwhile is not sent.", err=True)
    if begun.unkeyed:
        click.echo(
            "The watched columns leave out a part of the primary key: a row whose key is changed meanwhile, to one "
            "that was passed, is not sent.",
            err=True,
        )


def _words(so_far: Progressed) -> str:
    text = f"{so_far.sent} of about {so_far.about}, {so_far.rate:.0f}/s"
    if so_far.waits_for is not None:
        return f"{text}, waits for {so_far.waits_for}"
    return text if so_far.seconds_left is None else f"{text}, {age(so_far.seconds_left)} left"


class _Lines:
    """Progress for programs: a line of JSON a second, and one at the end."""

    def __init__(self, table: str) -> None:
        self._table = table
        self._next = time.monotonic()

    def show(self, so_far: Progressed) -> None:
        """Prints it when it is time."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _LINE_INTERVAL
            self.print(so_far)

    def print(self, so_far: Progressed) -> None:
        """Prints it."""
        left = so_far.seconds_left
        print_json(
            {
                "table": self._table,
                "topic": so_far.topic,
                "sent": so_far.sent,
                "about": so_far.about,
                "skipped": so_far.skipped,
                "rate": round(so_far.rate, 1),
                "seconds_left": None if left is None else round(left, 1),
                "waits_for": so_far.waits_for,
                "finished": so_far.finished,
            }
        )


def _show(found: list[Backfill], as_json: bool) -> None:
    if as_json:
        print_json([asdict(one) for one in found], indent=2)
        return
    if not found:
        click.echo("No table was backfilled.")
    print_table(
        [
            {
                "table": one.table,
                "state": one.outcome or ("running" if one.running else "interrupted"),
                "sent": str(one.sent),
                "of about": str(one.about),
                "locked": str(one.skipped),
                "began": moment(one.started_at),
                "by": one.who,
                "topic": one.topic,
            }
            for one in found
        ],
        whole=("table", "began"),
    )
