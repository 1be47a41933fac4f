"""`pgbridge replay`: publishes part of the log again. It leaves the cursor alone, so a running bridge goes on."""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from bridge.commands.republish import Pace, open_sinks, republish
from bridge.errors import UsageError
from bridge.event import Event, matches
from bridge.postgres.connection import answered, connect
from bridge.postgres.pooler import require_own_session
from bridge.postgres.wire import Connection
from bridge.process.logs import configure
from bridge.process.tasks import run
from bridge.process.terminal import (
    Moment,
    config_option,
    dry_run_option,
    exit_codes,
    json_option,
    moment,
    print_json,
    rate_option,
    stop_on_interrupt,
    table,
    topic_option,
)
from bridge.routes import Routes
from bridge.settings import Settings, load
from bridge.sources import DeadLetter
from bridge.sources.log import LogReader, Position, fetch_all
from bridge.sources.outbox import bury

_SLACK: Final = timedelta(minutes=1)
"""How far beyond its times a part is read. Ids rise with the times of their events, but not strictly: transactions run
side by side, and clocks are set."""

_SCANNED: Final = 100_000
"""Ids that are looked through for their topics at once; some 50 ms."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which events of the log."""

    since: datetime
    until: datetime
    topics: tuple[str, ...] = ()
    """Patterns; none means all."""
    number: int | None = None
    """Of the one event that is meant."""

    @classmethod
    def of(cls, number: int) -> Self:
        """The event with this number in the log, and no other."""
        return cls(datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC), number=number)

    def takes(self, event: Event) -> bool:
        """Whether the event belongs to it."""
        return self.since <= event.time < self.until and self.takes_topic(event.topic)

    def takes_topic(self, topic: str) -> bool:
        """Whether events of this topic may belong to it."""
        return not self.topics or any(matches(pattern, topic) for pattern in self.topics)


@dataclass(slots=True)
class Replayed:
    """What came of a replay so far."""

    confirmed: int = 0
    """Events that every sink took."""
    refused: int = 0
    """Events that a sink refused for good, or that no route takes; they are among the dead letters now."""
    by_topic: Counter[str] = field(default_factory=Counter)
    """Events of the part, by topic."""
    log_begins: datetime | None = None
    """The oldest event that the log still has, when the part begins before it."""
    begin: int = 0
    """Ids between which the part lies, for progress."""
    end: int = 0
    position: int = 0


async def replay_log(
    settings: Settings,
    part: Part,
    *,
    rate: float | None = None,
    dry_run: bool = False,
    stop: asyncio.Event,
    progress: Callable[[Replayed], None] = lambda _: None,
) -> Replayed:
    """Publishes a part of the log again, in order, through today's routes; with `dry_run`, only counts it.

    Returns when all is confirmed or dead-lettered, or soon after `stop` is set. Raises what `connect`, `translated`
    and the sinks raise.
    """
    replayed = Replayed()
    connection = await connect(settings.postgres, "pgbridge replay")
    async with connection:
        await require_own_session(connection, settings.postgres, "pgbridge replay")
        if dry_run:
            async for _ in _pages(settings, connection, part, Pace(rate).chunk, replayed):
                progress(replayed)
            return replayed

        async def settled(events: Sequence[Event], refused: Sequence[DeadLetter]) -> None:
            if refused:
                await bury(connection, settings.name, refused)
            lost = {letter.event.id for letter in refused}
            replayed.refused += len(lost)
            replayed.confirmed += len(events) - len(lost)
            replayed.position = events[-1].sequence
            progress(replayed)

        routes = Routes([(route.topic, route.sink) for route in settings.routes])
        topics = await _topics(connection, part)
        needed = {sink for topic in topics for sink in routes.sinks_of(topic)}
        pages = _pages(settings, connection, part, Pace(rate).chunk, replayed, topics)
        async with open_sinks(settings, sorted(needed)) as sinks:
            await republish(settings, sinks, routes, pages, Pace(rate), settled, stop)
    return replayed


async def _topics(connection: Connection, part: Part) -> frozenset[str]:
    """The topics of the part's events. So it is known which sinks are needed before anything is published."""
    found: set[str] = set()
    begin, end = await _range(connection, part)
    for start in range(begin, end, _SCANNED):
        with answered(connection):
            cursor = await connection.execute(
                "select distinct topic from bridge.outbox "
                "where id >= %s and id < %s and created_at >= %s and created_at < %s",
                (start, min(start + _SCANNED, end), part.since, part.until),
            )
            found.update(topic for (topic,) in await cursor.fetchall())
    return frozenset(filter(part.takes_topic, found))


async def _range(connection: Connection, part: Part) -> tuple[int, int]:
    """The part lies among these numbers, of which the last is without."""
    if part.number is not None:
        return part.number, part.number + 1
    with answered(connection):
        cursor = await connection.execute(
            "select bridge.position_at(%s), bridge.position_at(%s)", (part.since - _SLACK, part.until + _SLACK)
        )
        [(begin, end)] = await cursor.fetchall()
    return begin, end


async def _pages(
    settings: Settings,
    connection: Connection,
    part: Part,
    chunk: int,
    replayed: Replayed,
    topics: frozenset[str] | None = None,
) -> AsyncIterator[Sequence[Event]]:
    """The part's events in chunks, read in larger pages.

    With `topics`, events that were committed since those were looked up, under others, are left out.
    """
    outbox = settings.outbox_or_default
    reader = LogReader(connection, settings.name, page_size=outbox.page_size, page_bytes=outbox.page_bytes)
    begin, end = await _range(connection, part)
    first = await fetch_all(
        connection, "select id, bridge.calendar_time(created_at) from bridge.outbox order by id limit 1", ()
    )
    replayed.begin = replayed.position = mark = begin - 1
    replayed.end = end
    if part.number is None:
        replayed.log_begins = next((oldest for first_id, oldest in first if first_id > 1 and oldest > part.since), None)
    while mark < end - 1:
        # Without gaps: a replay takes what is committed now.
        reader.start(Position(mark, ()), None)
        look = await reader.read(end - 1 - mark)
        if not look.rows:
            return
        events, mark = look.events, look.position.mark
        wanted = [event for event in events if event.sequence < end and part.takes(event)]
        if topics is not None:
            wanted = [event for event in wanted if event.topic in topics]
        replayed.by_topic.update(event.topic for event in wanted)
        for start in range(0, len(wanted), chunk):
            yield wanted[start : start + chunk]
        if not wanted:
            yield ()


@click.command()
@click.option("--from", "since", type=Moment(), required=True, help='From this time: "2026-02-03 14:05", or "2h" ago.')
@click.option("--to", "until", type=Moment(), help="Up to, and without, this time; default: now.")
@topic_option
@rate_option
@dry_run_option
@config_option
@json_option
@exit_codes
def replay(
    since: datetime, until: datetime | None, topics: tuple[str, ...], rate: float | None, dry_run: bool,
    config: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Publishes part of the log again, in order.

    The events keep their ids and get the header `replayed`. Ends with 1 when a sink refused some of them.
    """
    settings = load(config)
    configure(settings.observe)
    part = Part(since, until or datetime.now(UTC), topics)
    if part.since >= part.until:
        raise UsageError(f"--from {moment(part.since)} is not before --to {moment(part.until)}")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))

    async def work(bar: Progress) -> tuple[Replayed, bool]:
        stop = asyncio.Event()
        stop_on_interrupt(stop)
        task = bar.add_task("reading")

        def show(so_far: Replayed) -> None:
            text = f"{so_far.confirmed} published, {so_far.refused} refused"
            done = so_far.position - so_far.begin
            bar.update(task, description=text, total=max(1, so_far.end - so_far.begin), completed=done)

        replayed = await replay_log(settings, part, rate=rate, dry_run=dry_run, stop=stop, progress=show)
        return replayed, stop.is_set()

    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        replayed, stopped = run(work(bar))
    if replayed.log_begins is not None:
        click.echo(f"The log begins at {moment(replayed.log_begins)}; events before that are pruned.", err=True)
    if as_json:
        print_json({"confirmed": replayed.confirmed, "refused": replayed.refused, "by_topic": replayed.by_topic})
    elif dry_run:
        rows = [{"events": str(count), "topic": topic} for topic, count in sorted(replayed.by_topic.items())]
        table(rows, whole=("topic",))
        click.echo(f"{replayed.by_topic.total()} would be published.", err=True)
    else:
        refused_hint = " and now among the dead letters: pgbridge dead list" if replayed.refused else ""
        click.echo(f"{replayed.confirmed} published, {replayed.refused} refused{refused_hint}.")
    sys.exit(130 if stopped else int(bool(replayed.refused)))
