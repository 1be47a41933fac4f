"""Publishing part of the log again. The cursor is not touched, so a bridge that runs is not disturbed."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from psycopg import AsyncConnection

from bridge.commands.republish import Pace, opened, republish
from bridge.event import Event, matches
from bridge.postgres.connection import connect
from bridge.relay import Routes
from bridge.settings import Settings
from bridge.sources import DeadLetter
from bridge.sources.log import LogReader, Position
from bridge.sources.outbox import bury

_SLACK = timedelta(minutes=1)
"""Ids and times rise together, but for transactions side by side and clocks that are set: so far is looked around."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which events of the log."""

    since: datetime
    until: datetime
    topics: tuple[str, ...] = ()
    """Patterns; none means all."""

    def takes(self, event: Event) -> bool:
        """Whether the event belongs to it."""
        return self.since <= event.time < self.until and (
            not self.topics or any(matches(pattern, event.topic) for pattern in self.topics)
        )


@dataclass(slots=True)
class Replayed:
    """What came of a replay so far."""

    confirmed: int = 0
    """Events that every sink took."""
    refused: int = 0
    """Events that a sink, or all routes, refused for ever; they stand among the dead letters."""
    by_topic: Counter[str] = field(default_factory=Counter)
    """Events of the part, by topic."""
    log_begins: datetime | None = None
    """The oldest event that the log still has, when the part begins before it."""
    begin: int = 0
    """Ids between which the part lies, for progress."""
    end: int = 0
    position: int = 0


async def replay(
    settings: Settings,
    part: Part,
    *,
    rate: float | None = None,
    dry_run: bool = False,
    stop: asyncio.Event,
    progress: Callable[[Replayed], None] = lambda _: None,
) -> Replayed:
    """Publishes a part of the log again, in order, through today's routes; with `dry_run`, only counts it.

    Returns when all is confirmed or dead-lettered, or soon after `stop` is set. Raises DatabaseUnavailableError,
    PrivilegeError, SchemaError, BrokerUnavailableError, RefusedError, SettingsError.
    """
    told = Replayed()
    connection = await connect(settings.postgres, "pgbridge replay", options="-c timezone=UTC")
    async with connection:
        pages = _pages(settings, connection, part, Pace(rate).chunk, told)
        if dry_run:
            async for _ in pages:
                progress(told)
            return told

        async def settled(events: Sequence[Event], refused: Sequence[DeadLetter]) -> None:
            if refused:
                await bury(connection, settings.name, refused)
            lost = {letter.event.id for letter in refused}
            told.refused += len(lost)
            told.confirmed += len(events) - len(lost)
            told.position = events[-1].sequence
            progress(told)

        routes = Routes([(route.topic, route.sink) for route in settings.routes])
        async with opened(settings, settings.sinks) as sinks:
            await republish(settings.relay, sinks, routes, pages, Pace(rate), settled, stop)
    return told


async def _pages(
    settings: Settings, connection: AsyncConnection[tuple[Any, ...]], part: Part, chunk: int, told: Replayed
) -> AsyncIterator[Sequence[Event]]:
    """The part's events in chunks, read in larger pages."""
    outbox = settings.outbox_or_default
    reader = LogReader(connection, settings.name, page_size=outbox.page_size, page_bytes=outbox.page_bytes)
    ((begin, end, first_id, oldest),) = await reader.fetch_all(
        "select bridge.position_at(%s), bridge.position_at(%s), first.id, first.created_at from (values (1)) one "
        "left join (select id, created_at from bridge.outbox order by id limit 1) first on true",
        (part.since - _SLACK, part.until + _SLACK),
    )
    told.begin = told.position = mark = begin - 1
    told.end = end
    told.log_begins = oldest if first_id is not None and first_id > 1 and oldest > part.since else None
    while mark < end - 1:
        # Without gaps: a replay takes what is committed now.
        reader.start(Position(mark, ()), None)
        events, position, _ = await reader.read()
        if not events:
            return
        mark = position.mark
        wanted = [event for event in events if event.sequence < end and part.takes(event)]
        told.by_topic.update(event.topic for event in wanted)
        for start in range(0, len(wanted), chunk):
            yield wanted[start : start + chunk]
        if not wanted:
            yield ()
