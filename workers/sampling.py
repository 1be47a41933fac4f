"""The samples that a process of a worker stores for charts, in `bridge.sample`, of what its metrics say.

What several processes count is added by the database; so are the times in hand, which give how many there were on
average. What could not be stored is given up, since nobody knows whether it was, and no event ever waits for it.
"""

import asyncio
import json
import math
import random
import time
from typing import Final

import structlog
from tenacity import wait_none

from bridge.errors import NoAnswerError, PgbridgeError
from bridge.process.increments import Increments, Key, current
from bridge.process.outage import Outage
from workers.inbox import Inbox
from workers.metrics import ATTEMPT_BUCKETS, ATTEMPT_SECONDS, DELIVERIES, HELD_KEYS, IN_HAND, QUEUE_DEPTH

log = structlog.get_logger()

INTERVAL: Final = 15.0
"""Seconds between two samples; the finest step of `bridge.sample`."""

LIMIT: Final = 5.0
"""Seconds that PostgreSQL has for one."""
LAST_LIMIT: Final = 1.0
"""The same for the last one of a process that stops."""
LEAST_LEFT: Final = 5.0
"""Seconds that the process must have left for it: to call a statement off may take longer than the statement."""

_BUCKET: Final = "pgbridge_worker_attempt_seconds_bucket"
_LEVELS: Final = {"pgbridge_worker_queue_depth": "queue_depth", "pgbridge_worker_held_keys": "held_keys"}


class Sampling:
    """Of one process of the worker `name`, from now on."""

    def __init__(self, name: str, inbox: Inbox) -> None:
        self._name = name
        self._inbox = inbox
        self._phase = random.random()  # noqa: S311 - so that not all write at the same time
        self._increments = Increments((DELIVERIES, ATTEMPT_SECONDS))
        self._since = time.monotonic()
        self._outage = Outage("samples", wait_none(), worker=name)
        self._left_out = False

    async def store_for_ever(self) -> None:
        """Stores one whenever it is due, until it is cancelled. A failure is told once."""
        while True:
            due_in = await self.store()
            await asyncio.sleep(due_in)

    async def store(self, limit: float = LIMIT) -> float:
        """Stores one, where PostgreSQL takes it within `limit` seconds; gives the seconds until the next is due."""
        covered = time.monotonic() - self._since
        counts, levels = self._counts(covered), self._levels()
        self._since = time.monotonic()
        try:
            try:
                async with asyncio.timeout(limit):
                    stored, due_in = await self._inbox.store_sample(
                        covered, json.dumps(counts), json.dumps(levels), self._phase
                    )
            except TimeoutError:
                raise NoAnswerError(f"PostgreSQL did not store a sample within {limit:g} s") from None
        except PgbridgeError as error:
            self._outage.lost(error)
            return INTERVAL
        self._outage.restored()
        if not stored and not self._left_out:
            log.warning("samples.left_out", worker=self._name, hint="bridge.sample keeps 300 names at a time")
        self._left_out = not stored
        return due_in

    def _counts(self, covered: float) -> dict[str, float]:
        counts: dict[str, float] = {}
        below: dict[float, float] = {}
        for (sample, pairs), count in self._increments.take().items():
            labels = dict(pairs)
            if labels["worker"] != self._name:
                continue
            if "outcome" in labels:
                if not sample.endswith("_created"):
                    counts[labels["outcome"]] = count
            elif sample == _BUCKET:
                below[float(labels["le"])] = count
        grown = 0.0
        lower: float | None = None
        for bound in (*ATTEMPT_BUCKETS, math.inf):
            if (count := below.get(bound, 0.0)) > grown:
                if lower is not None:
                    counts.setdefault(f"le_{lower:g}", 0.0)  # where the durations of the next one begin
                counts[f"le_{bound:g}"] = count - grown
            grown, lower = max(grown, count), bound
        in_hand = _of(self._name, current(IN_HAND)).get("pgbridge_worker_in_hand", 0.0)
        return {**counts, **({"in_hand": round(in_hand * covered, 3)} if in_hand else {})}

    def _levels(self) -> dict[str, float]:
        known = _of(self._name, current(QUEUE_DEPTH, HELD_KEYS))
        return {_LEVELS[sample]: value for sample, value in known.items()}


def _of(worker: str, found: dict[Key, float]) -> dict[str, float]:
    return {sample: value for (sample, labels), value in found.items() if dict(labels)["worker"] == worker}
