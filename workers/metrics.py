"""What a worker process counts, in Prometheus' terms: a registry of its own, for nothing of the bridge happens here."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

REGISTRY: Final = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

OUTCOMES: Final = (
    "handled",
    "repeated",
    "busy",
    "early",
    "retried",
    "dead_lettered",
    "refused",
    "given_back",
    "unsettled",
    "crashed",
)
"""What may become of a delivery. All are there from the start, since a counter that appears with its first event has no
rise to be seen."""

DELIVERIES = Counter(
    "pgbridge_worker_events_total", "Deliveries by what became of them", ["worker", "outcome"], registry=REGISTRY
)
IN_HAND = Gauge("pgbridge_worker_in_hand", "Deliveries that run or are being settled", ["worker"], registry=REGISTRY)
ATTEMPT_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
ATTEMPT_SECONDS = Histogram(
    "pgbridge_worker_attempt_seconds",
    "From the claim of an event until its handler and reply are done, or have failed",
    ["worker"],
    buckets=ATTEMPT_BUCKETS,
    registry=REGISTRY,
)
QUEUE_DEPTH = Gauge(
    "pgbridge_worker_queue_depth",
    "Messages that wait for the worker on the broker, also for another attempt",
    ["worker"],
    registry=REGISTRY,
)
HELD_KEYS = Gauge(
    "pgbridge_worker_held_keys",
    "Keys that dead letters hold, of a worker with on_dead_letter = hold",
    ["worker"],
    registry=REGISTRY,
)
DATABASE_UP = Gauge(
    "pgbridge_worker_database_up", "1 while PostgreSQL answers this worker", ["worker"], registry=REGISTRY
)
BROKER_UP = Gauge(
    "pgbridge_worker_broker_up", "1 while the connection to the broker works", ["worker"], registry=REGISTRY
)
PAUSED = Gauge("pgbridge_worker_paused", "1 while a person has paused the worker", ["worker"], registry=REGISTRY)
