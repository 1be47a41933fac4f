"""The samples that the leader of a bridge stores for charts, in `bridge.sample`; `history.py` reads them.

A sample says what was counted since the one before. So a process that begins anew, or takes the lead, needs to know
nothing of the one before it, and what several count is added by the database. What could not be stored is given up,
since nobody knows whether it was: a chart has a gap then, and never anything twice.
"""

import json
import random
import time
from typing import Final

import structlog

from bridge.postgres.connection import database_errors
from bridge.postgres.status import Status
from bridge.postgres.wire import Connection, array_text
from bridge.process.increments import Increments
from bridge.process.metrics import EVENTS_CONFIRMED, EVENTS_DEAD, EVENTS_RETRIED

log = structlog.get_logger()

INTERVAL: Final = 15.0
"""Seconds between two samples; the finest step of `bridge.sample`."""

_COUNTS: Final = {
    "pgbridge_events_confirmed_total": "published",
    "pgbridge_events_retried_total": "retried",
    "pgbridge_events_dead_lettered_total": "dead_lettered",
}
"""What a metric of a sink is called in its samples."""


class Recorder:
    """Of the bridge `name`, from the moment that its process leads."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._phase = random.random()  # noqa: S311 - so that not all write at the same time
        self._increments = Increments((EVENTS_CONFIRMED, EVENTS_RETRIED, EVENTS_DEAD))
        self._since = time.monotonic()
        self._last_id: int | None = None
        self._due = self._since
        self._left_out = 0

    @property
    def due_in(self) -> float:
        """Seconds until the next sample."""
        return max(0.0, self._due - time.monotonic())

    def skip(self) -> None:
        """Gives up what was counted since the last sample."""
        self._increments.take()
        self._begin(None)

    def _begin(self, last_id: int | None) -> None:
        self._last_id = last_id
        self._since = time.monotonic()
        self._due = self._since + INTERVAL

    async def record(self, connection: Connection, status: Status) -> None:
        """Stores a sample of what was found just now. Raises what `bridge.postgres.connection.translated` raises."""
        bridge = next((bridge for bridge in status.bridges if bridge.name == self._name), None)
        covered = time.monotonic() - self._since
        counted = self._counted()
        emitted = 0 if bridge is None or self._last_id is None else max(0, bridge.last_id - self._last_id)
        self._begin(None if bridge is None else bridge.last_id)
        if bridge is None:
            return
        names: list[str | None] = [None, *(position.sink for position in bridge.sinks)]
        counts = [{"emitted": float(emitted)}, *(counted.get(position.sink, {}) for position in bridge.sinks)]
        levels = [
            {"dead_letters": bridge.dead_letters, "scheduled": status.scheduled.events},
            *(
                {"backlog": at.backlog, "lag": round(at.oldest_unsent_seconds or 0.0, 3), "held": at.held}
                for at in bridge.sinks
            ),
        ]
        parameters = (
            self._name,
            array_text(names),
            covered,
            array_text(map(json.dumps, counts)),
            array_text(map(json.dumps, levels)),
            self._phase,
        )
        with database_errors():
            cursor = await connection.execute(
                "select left_out, next_in from "
                "bridge.store_samples(%s, %s::text[], %s, %s::text[]::jsonb[], %s::text[]::jsonb[], %s)",
                parameters,
            )
            [(left_out, next_in)] = await cursor.fetchall()
        self._due = time.monotonic() + next_in
        if left_out and not self._left_out:
            log.warning("samples.left_out", sinks=left_out, hint="bridge.sample keeps 300 names at a time")
        self._left_out = left_out

    def _counted(self) -> dict[str, dict[str, float]]:
        """By sink, since the last sample."""
        by_sink: dict[str, dict[str, float]] = {}
        for (sample, labels), count in self._increments.take().items():
            if sample in _COUNTS:
                counted = by_sink.setdefault(dict(labels)["sink"], {})
                counted[_COUNTS[sample]] = counted.get(_COUNTS[sample], 0.0) + count
        return by_sink
