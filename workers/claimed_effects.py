"""The effects of an event that a worker runs, recorded in the inbox."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bridge.process.outage import Outage
from workers.claim import Claim
from workers.effects import Effect, Recorded
from workers.inbox import Inbox

_LONG: Final = 0.5
"""Seconds that no statement of ours takes on a database that works."""


class OutageError(Exception):
    """The handler ran for longer than it may since the database was gone, which is no fault of its own."""


@dataclass(slots=True)
class Effects:
    """The effects of one attempt. An outage of the database is waited out, as long as the handler may run."""

    inbox: Inbox
    claim: Claim
    database: Outage
    declared: bool
    """Whether the worker's settings say that it has effects."""
    gave_up_in_outage: bool = False
    """Whether the handler's time was up while it waited for the database."""

    async def begin_effect(self, operation: str, given: Recorded | None) -> Effect[Recorded]:
        """See `effects.EffectStore`. Raises RuntimeError where the settings say that there is none."""
        if not self.declared:
            raise RuntimeError(
                f"effect({operation!r}): workers.{self.claim.worker}.effects is false, so the event may run twice at "
                "once; remove that setting"
            )
        with self._waiting():
            return await self.database.outlast(self.inbox.begin_effect, self.claim, operation, given)

    async def begin_effect_again(self, effect: Effect[Recorded], given: Recorded | None) -> Effect[Recorded]:
        """See `effects.EffectStore`."""
        with self._waiting():
            return await self.database.outlast(self.inbox.begin_effect_again, self.claim, effect, given)

    async def end_effect(self, effect: Effect[Recorded]) -> None:
        """See `effects.EffectStore`."""
        with self._waiting():
            await self.database.outlast(self.inbox.end_effect, self.claim, effect)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except asyncio.CancelledError:
            # An outage is known only once something has failed, and a wait for a connection may last longer than the
            # handler may run.
            self.gave_up_in_outage = self.database.lasts or time.monotonic() - began > _LONG
            raise
