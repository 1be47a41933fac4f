"""What the leader of a bridge asks the database for again and again: gauges that only its process serves, and the
samples that charts are made of (`recorder.py`).

The gauges are those of this bridge: whoever leads another one on the same log tells of that. A process that has lost
the lead, or could not ask, serves none, since what it knows is not how things are.
"""

import asyncio
import math
import time
from collections.abc import Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from tenacity import wait_none

from bridge.errors import PgbridgeError
from bridge.postgres.connection import answered, connect
from bridge.postgres.recorder import INTERVAL, Recorder
from bridge.postgres.status import Status, look
from bridge.process.metrics import REGISTRY
from bridge.process.outage import Outage
from bridge.settings import Settings


class Sample(Collector):
    """The gauges of the last look, which change all at once."""

    def __init__(self) -> None:
        self._families: Sequence[Metric] = ()

    def found(self, status: Status, name: str) -> None:
        """Takes what a look has found of the bridge `name`."""
        self._families = list(_families(status, name))

    def clear(self) -> None:
        """Nobody looks any more."""
        self._families = ()

    def collect(self) -> Sequence[Metric]:
        return self._families


SAMPLE = Sample()
REGISTRY.register(SAMPLE)


async def sample_for_ever(settings: Settings) -> None:
    """Looks whenever a sample is due, and every `observe.sample_interval` where that is shorter, until it is cancelled.
    A failure is told once, and tried again."""
    outage = Outage("samples", wait_none())
    recorder = Recorder(settings.name)
    asked = settings.observe.sample_interval
    interval = asked if asked < INTERVAL else math.inf
    must_store = False
    try:
        while True:
            began = time.monotonic()
            status = None
            stored = False
            try:
                # A connection for each look: a bridge does without it when there is none to have.
                connection = await connect(settings.postgres, f"pgbridge {settings.name} status")
                async with connection:
                    with answered(connection):
                        status = await look(connection, settings.outbox_or_default.retention)
                        SAMPLE.found(status, settings.name)
                        if not recorder.due_in:
                            await recorder.record(connection, status)
                            stored = True
            except PgbridgeError as error:
                outage.lost(error)
                must_store = status is not None
                if status is None:
                    SAMPLE.clear()
                    recorder.skip()
            else:
                # A look alone does not show that a sample can be stored again.
                if stored or not must_store:
                    outage.restored()
                    must_store = False
            await asyncio.sleep(max(0.0, min(recorder.due_in, interval - (time.monotonic() - began))))
    finally:
        SAMPLE.clear()


def _families(status: Status, name: str) -> Iterator[Metric]:
    backlog = GaugeMetricFamily("pgbridge_backlog_events", "Events of the log that are not settled", labels=["sink"])
    unsent = GaugeMetricFamily(
        "pgbridge_oldest_unsent_seconds", "Age of the oldest event that is not settled", labels=["sink"]
    )
    paused = GaugeMetricFamily("pgbridge_sink_paused", "1 while a person has paused the sink", labels=["sink"])
    letters = GaugeMetricFamily("pgbridge_dead_letters", "Dead letters of the outbox")
    for bridge in status.bridges:
        if bridge.name == name:
            letters.add_metric([], bridge.dead_letters)
            for position in bridge.sinks:
                backlog.add_metric([position.sink], position.backlog)
                unsent.add_metric([position.sink], position.oldest_unsent_seconds or 0.0)
                paused.add_metric([position.sink], position.paused is not None)
    yield from (backlog, unsent, paused, letters)
    guards = status.guards
    yield GaugeMetricFamily(
        "pgbridge_notification_queue_usage",
        "Used part of the server's queue for NOTIFY, 0 to 1",
        value=guards.notification_queue_usage,
    )
    if guards.sees_sessions:
        yield GaugeMetricFamily(
            "pgbridge_oldest_transaction_seconds",
            "Age of the oldest transaction",
            value=guards.oldest_transaction_seconds or 0.0,
        )
    yield GaugeMetricFamily("pgbridge_outbox_bytes", "Size of the log, with indexes", value=guards.outbox_bytes)
    oldest = guards.oldest_event_at
    yield GaugeMetricFamily(
        "pgbridge_oldest_event_seconds",
        "Age of the oldest event in the log",
        value=0.0 if oldest is None else (status.at - oldest).total_seconds(),
    )
    yield GaugeMetricFamily(
        "pgbridge_scheduled_events",
        "Events that wait for their time, of 100,000 at most",
        value=status.scheduled.events,
    )
    due = status.scheduled.next_at
    yield GaugeMetricFamily(
        "pgbridge_scheduled_overdue_seconds",
        "For how long the first of them has been due",
        value=0.0 if due is None else max(0.0, (status.at - due).total_seconds()),
    )
