"""What a bridge counts and measures, in Prometheus' terms: one registry a process, which `health.py` serves.

What happens to events is counted a page or a batch at a time: counting each event would cost as much as publishing it.
What only the database knows is asked by the leader (`postgres/sample.py`). All of it is served with the label `bridge`,
which is the same for all of a process (`exposition.py`).
"""

from collections.abc import Collection
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

REGISTRY: Final = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

EVENTS_READ = Counter("pgbridge_events_read_total", "Events read for a sink", ["sink"], registry=REGISTRY)
EVENTS_CONFIRMED = Counter(
    "pgbridge_events_confirmed_total", "Messages that a broker confirmed", ["sink"], registry=REGISTRY
)
EVENTS_RETRIED = Counter(
    "pgbridge_events_retried_total", "Messages that are published again", ["sink"], registry=REGISTRY
)
EVENTS_IN_FLIGHT = Gauge(
    "pgbridge_events_in_flight", "Events that are read and not yet settled or held", ["sink"], registry=REGISTRY
)
EVENTS_HELD = Gauge(
    "pgbridge_events_held",
    "Events that the broker refused for now, and what waits behind them",
    ["sink"],
    registry=REGISTRY,
)
BYTES_IN_FLIGHT = Gauge(
    "pgbridge_bytes_in_flight", "Bytes of payload, key and headers in flight and held", ["sink"], registry=REGISTRY
)
SETTLE_SECONDS = Histogram(
    "pgbridge_settle_seconds",
    "From the recording of a page's first event, by the database's clock, until the page is settled, by ours",
    ["sink"],
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 3600),
    registry=REGISTRY,
)
EVENTS_DEAD = Counter(
    "pgbridge_events_dead_lettered_total",
    "Events that became dead letters; of the sink with no name, those that no route takes",
    ["sink", "code"],
    registry=REGISTRY,
)
LEADING = Gauge("pgbridge_leading", "1 while this process leads, 0 while it stands by", registry=REGISTRY)
DATABASE_UP = Gauge("pgbridge_database_up", "1 while the session with PostgreSQL works", registry=REGISTRY)
SINK_UP = Gauge("pgbridge_sink_up", "1 while the sink's connection works", ["sink"], registry=REGISTRY)
NOTIFICATIONS = Counter("pgbridge_notifications_total", "Plain notifications that were heard", registry=REGISTRY)
NOTIFICATIONS_DROPPED = Counter(
    "pgbridge_notifications_dropped_total", "Notifications that no memory was left for", registry=REGISTRY
)
DEAF_SECONDS = Counter(
    "pgbridge_deaf_seconds_total", "Time in which nobody listened to plain notifications", registry=REGISTRY
)
EVENTS_PRUNED = Counter(
    "pgbridge_events_pruned_total", "Events deleted from the log after their retention", registry=REGISTRY
)

NO_ROUTE: Final = "no_route"
"""The code of an event that no route takes; it has no sink."""

CODES: Final = ("unroutable", "too_large", "malformed", "access_refused", "refused", "ends_connection")
"""Codes of dead letters that the brokers of this package, and the way to them, give. A broker from outside may have
others."""

_PER_SINK: Final = (
    EVENTS_READ,
    EVENTS_CONFIRMED,
    EVENTS_RETRIED,
    EVENTS_IN_FLIGHT,
    EVENTS_HELD,
    BYTES_IN_FLIGHT,
    SETTLE_SECONDS,
)


def begin(sinks: Collection[str]) -> None:
    """Makes all label sets that are known, with zeros: a counter that appears with its first event has no rise that an
    alert could see."""
    for sink in sinks:
        for metric in _PER_SINK:
            metric.labels(sink)
        for code in CODES:
            EVENTS_DEAD.labels(sink, code)
    EVENTS_DEAD.labels("", NO_ROUTE)
