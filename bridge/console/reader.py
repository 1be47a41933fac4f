"""The one reader of the database's state in this process: one look an interval however many browsers wait for it, and
none when nobody does."""

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Final

from tenacity import wait_none

from bridge.console.database import Database
from bridge.errors import PgbridgeError
from bridge.postgres.pause import may_pause
from bridge.postgres.status import Status, look
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
"""So many times as long as a look has taken, there is none: the console takes a tenth of one session's time at most,
whatever the database is busy with."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of the database."""

    status: Status | None = None
    """The last look that was answered."""
    before: Status | None = None
    """The one before, where it is not long ago: with it there are rates."""
    may_act: bool = False
    """Whether the console's login may do more than look."""
    outage: str | None = None
    """Why there is no newer one."""
    outage_seconds: float = 0.0


class Reader:
    """Looks when it is asked to."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._pace = settings.console.interval
        """Seconds from one look to the next."""
        self._outage = Outage("postgres", wait_none())
        self._seen = Seen()
        self._looked = float("-inf")
        self._looking: asyncio.Task[None] | None = None
        self._is_outdated = False
        self.looks = 0
        """How often it has."""

    def outdate(self) -> None:
        """Somebody has changed what is known: who asks next gets a look that begins after this."""
        self._is_outdated = True

    async def look(self) -> Seen:
        """What is known, by a look that is not old; by an older one where the database does not
        answer."""
        if self._looking is None and (self._is_outdated or time.monotonic() - self._looked >= self._pace):
            self._looking = asyncio.create_task(self._look())
        if self._looking is not None:
            # Whoever waits may leave; the others want the answer.
            await asyncio.wait([self._looking], timeout=_PATIENCE)
        if self._looking is not None and not self._outage.lasts:
            silence = f"PostgreSQL has not answered for {_PATIENCE:g} s"
            return replace(self._seen, outage=silence, outage_seconds=_PATIENCE)
        return replace(self._seen, outage=self._outage.reason, outage_seconds=self._outage.seconds)

    async def _look(self) -> None:
        try:
            await self._look_once()
            if self._is_outdated:  # what it found may be of before
                await self._look_once()
        finally:
            self._looking = None

    async def _look_once(self) -> None:
        self._is_outdated = False
        settings = self._settings
        began = time.monotonic()
        self._pace = settings.console.interval
        try:
            async with self._database.connection() as connection:
                status = await look(
                    connection, settings.outbox_or_default.retention, sorted(settings.workers), counted=COUNTED
                )
                may_act = await may_pause(connection)
        except PgbridgeError as error:
            self._outage.lost(error)
        else:
            self._outage.restored()
            before = self._seen.status
            self._pace = max(self._pace, _REST * (time.monotonic() - began))
            if before is not None and (status.at - before.at).total_seconds() > max(_RATES_WITHIN, 3 * self._pace):
                before = None
            self._seen = Seen(status, before, may_act)
        finally:
            self.looks += 1
            self._looked = time.monotonic()

    async def close(self) -> None:
        """Ends a look that is under way."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
