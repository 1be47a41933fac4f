"""The one reader of the database's state in this process: one look an interval however many browsers wait for it, and
none when nobody does. It looks at what is shown, and at nothing else."""

import asyncio
import time
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum, auto
from typing import Final

from tenacity import wait_none

from bridge.console.database import Database
from bridge.errors import PgbridgeError
from bridge.postgres.pause import may_pause
from bridge.postgres.status import Status, WorkerStatus, clock, look, look_at_workers
from bridge.postgres.wire import Connection
from bridge.process.outage import Outage
from bridge.settings import Settings

_PATIENCE: Final = 3.0
"""Seconds for which a page waits for a look, before it is shown without."""
_RATES_WITHIN: Final = 30.0
"""Seconds between two looks from which rates are made; of what was long ago they would say too little."""


COUNTED: Final = 1000
"""Events that a look counts of each sink's backlog, and of each kind in the workers' inbox: a hundred times less than
the command `status` does, since it is asked again and again."""
_REST: Final = 10
"""So many times as long as a look at a subject has taken, there is none at that: each takes a tenth of one session's
time at most, whatever the database is busy with."""
SELDOM: Final = 3
"""Intervals for which that is kept which has to be found among many rows."""


class Subject(Enum):
    """What a page may want to know. Whether the database answers, and what the console may do there, all pages do."""

    DATABASE = auto()
    BRIDGES = auto()
    WORKERS = auto()


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of the database, of all subjects or of fewer."""

    at: datetime | None = None
    """When that was found which is asked for, by the clock of the database: the oldest part of it."""
    status: Status | None = None
    """The last look at the bridges that was answered; without workers."""
    before: Status | None = None
    """The one before, where it is not long ago: with it there are rates."""
    workers: tuple[WorkerStatus, ...] | None = None
    may_act: bool | None = None
    """Whether the console's login may do more than look."""
    outage: str | None = None
    """Why there is nothing newer."""
    outage_seconds: float = 0.0


@dataclass(slots=True)
class _Looked:
    """When one subject was looked at."""

    at: datetime | None = None
    """When the last look that was answered was, by the clock of the database."""
    asked: float = float("-inf")
    """When somebody last asked for it."""
    began: float = float("-inf")
    """When the last look began, whatever came of it."""
    old_at: float = float("-inf")
    """When what it found is old."""
    pace: float = 0.0
    """Seconds between the last two, at least."""


class Reader:
    """Looks when it is asked to."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._outage = Outage("postgres", wait_none())
        self._seen = Seen()
        self._looked = {subject: _Looked() for subject in Subject}
        self._outdated_at = float("-inf")
        self._owed: set[Subject] = set()
        """What a look has failed at. Whatever is looked at next, so are these: the outage ends with all of them."""
        self._looking: asyncio.Task[None] | None = None
        self.looks = 0
        """How often it has."""

    def outdate(self) -> None:
        """Somebody has changed what is known: who asks next gets a look that begins after this."""
        self._outdated_at = time.monotonic()

    async def look(self, *subjects: Subject) -> Seen:
        """What is known, by a look at these subjects that is not old; by an older one where the database does not
        answer."""
        wanted = {Subject.DATABASE, *subjects}
        for subject in wanted:
            self._looked[subject].asked = time.monotonic()
        silence = None
        try:
            async with asyncio.timeout(_PATIENCE):
                while self._is_due(wanted):
                    if self._looking is None:
                        self._looking = asyncio.create_task(self._look(self._worth_a_look(wanted)))
                    # Whoever waits may leave; the others want the answer.
                    await asyncio.wait([self._looking])
        except TimeoutError:
            silence = f"PostgreSQL has not answered for {_PATIENCE:g} s"
        shown = subjects or (Subject.DATABASE,)
        at = min(filter(None, (self._looked[subject].at for subject in shown)), default=None)
        if silence is not None and not self._outage.lasts:
            return replace(self._seen, at=at, outage=silence, outage_seconds=_PATIENCE)
        return replace(self._seen, at=at, outage=self._outage.reason, outage_seconds=self._outage.seconds)

    def _is_due(self, wanted: set[Subject]) -> bool:
        """Whether to look now. Between two looks that is so only for what none of them would renew."""
        if self._is_old(Subject.DATABASE):
            return True
        return any(self._is_old(subject, self._settings.console.interval) for subject in wanted)

    def _is_old(self, subject: Subject, more: float = 0.0) -> bool:
        """Whether it is older than it may be, by so many seconds `more`."""
        looked = self._looked[subject]
        return time.monotonic() >= looked.old_at + more or looked.began <= self._outdated_at

    def _worth_a_look(self, wanted: set[Subject]) -> set[Subject]:
        """What is old, and wanted now or shown by another page; and what is owed."""
        lately = time.monotonic() - 2 * self._settings.console.interval
        shown = {subject for subject, looked in self._looked.items() if looked.asked >= lately}
        return {subject for subject in wanted | shown if self._is_old(subject)} | self._owed

    async def _look(self, subjects: set[Subject]) -> None:
        looked = {subject: self._looked[subject] for subject in Subject if subject in subjects}
        for it in looked.values():
            it.began = time.monotonic()
        try:
            async with self._database.connection() as connection:
                now = await clock(connection)
                for subject, it in looked.items():
                    began = time.monotonic()
                    self._seen = await self._ask(connection, subject)
                    it.at, it.pace = now, max(self._interval(subject), _REST * (time.monotonic() - began))
                    it.old_at = time.monotonic() + it.pace
        except PgbridgeError as error:
            self._owed |= subjects
            self._outage.lost(error)
        else:
            self._owed -= subjects
            self._outage.restored()
        finally:
            soon = time.monotonic() + self._settings.console.interval
            for it in looked.values():
                it.old_at = max(it.old_at, soon)
            self.looks += 1
            self._looking = None

    async def _ask(self, connection: Connection, subject: Subject) -> Seen:
        """What is known with what is found."""
        settings, seen = self._settings, self._seen
        match subject:
            case Subject.DATABASE:
                return replace(seen, may_act=await may_pause(connection))
            case Subject.BRIDGES:
                status = await look(connection, settings.outbox_or_default.retention, counted=COUNTED)
                before = seen.status
                if before is not None and (status.at - before.at).total_seconds() > self._rates_within:
                    before = None
                return replace(seen, status=status, before=before)
            case Subject.WORKERS:
                return replace(seen, workers=await look_at_workers(connection, sorted(settings.workers), COUNTED))

    @property
    def _rates_within(self) -> float:
        return max(_RATES_WITHIN, 3 * self._looked[Subject.BRIDGES].pace)

    def _interval(self, subject: Subject) -> float:
        return self._settings.console.interval * (SELDOM if subject is Subject.WORKERS else 1)

    async def close(self) -> None:
        """Ends a look that is under way."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
