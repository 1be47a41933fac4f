"""When to read: rung for while asleep, reading on by itself while awake. The readers of one session share it.

`emit()` rings only for a bridge whose `bell` row says that it sleeps, since NOTIFY takes a lock of the whole cluster.
Under load the bridge is awake and nobody rings. It falls asleep only after a quiet while, and wakes up only for a
burst, so that a trickle does not flip the row back and forth. A transaction may have looked at the row just before it
said *asleep*, and commit later without ringing: so until every transaction that ran at that moment has ended, the log
is polled, ever more slowly. A slow poll backs it all: a lost bell costs latency, never an event.

Nobody rings for a bridge that would not react: while no reader waits for the bell, because no sink has room, the row
says awake (`deaf`).
"""

import asyncio
import contextlib
import time
from collections import deque
from typing import Final

QUIET: Final = 1.0
"""Seconds without an event after which the bridge falls asleep."""
BUSY_PAGES: Final = 20
"""So many pages within one second of sleep show a load that is cheaper to poll for than to be rung for."""
UNCERTAIN_POLL: Final = 0.02
"""Seconds between two looks while a transaction from before the sleep may still commit unheard, at first."""
UNCERTAIN_SHARE: Final = 0.25
"""These looks grow apart to this share of the time that the uncertainty has lasted."""


class Doorbell:
    """Decides when the readers look into the log again. Times are `time.monotonic()` seconds."""

    def __init__(self, poll_interval: float) -> None:
        self._poll_interval = poll_interval
        self._rung = asyncio.Event()
        self.asleep = True
        self._certain_at: int | None = None
        self._asleep_since = self._last_event = time.monotonic()
        self._recent: deque[float] = deque(maxlen=BUSY_PAGES)
        self._listening = 0
        self._heard_last = time.monotonic()

    @property
    def next_ring(self) -> asyncio.Event:
        """What the next ring sets. A reader takes it before it looks, so that no ring falls between look and wait."""
        return self._rung

    def ring(self) -> None:
        """A NOTIFY of `bridge_bell` came."""
        rung, self._rung = self._rung, asyncio.Event()
        rung.set()

    def answered(self) -> bool:
        """A page with events was read. True when the bridge should now mark itself awake."""
        now = self._last_event = time.monotonic()
        self._recent.append(now)
        if self.asleep and len(self._recent) == BUSY_PAGES and now - self._recent[0] < 1.0:
            self.woke_up()
            return True
        return False

    def should_fall_asleep(self) -> bool:
        """Whether it has been quiet for long enough."""
        return not self.asleep and time.monotonic() - self._last_event > QUIET

    def fell_asleep(self, horizon: int) -> None:
        """The row says asleep; whoever may have seen it awake has a transaction id below `horizon`."""
        self.asleep = True
        self._certain_at = horizon
        self._asleep_since = time.monotonic()

    def woke_up(self) -> None:
        """The row says awake, or is about to."""
        self.asleep = False
        self._recent.clear()

    def deaf(self, seconds: float) -> bool:
        """Whether the row says asleep, and no reader has waited for a ring for so long."""
        return self.asleep and not self._listening and time.monotonic() - self._heard_last > seconds

    async def wait(self, xmin: int, ring: asyncio.Event) -> None:
        """Waits until it is worth to look again; not while awake. `xmin` is that of the snapshot that found nothing,
        `ring` the `next_ring` from before that look."""
        if not self.asleep:
            return
        patience = self._poll_interval
        if self._certain_at is not None and xmin < self._certain_at:
            lasted = time.monotonic() - self._asleep_since
            patience = min(patience, max(UNCERTAIN_POLL, UNCERTAIN_SHARE * lasted))
        self._listening += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await ring.wait()
        finally:
            self._listening -= 1
            self._heard_last = time.monotonic()
