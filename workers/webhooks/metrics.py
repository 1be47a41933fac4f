"""What a process that sends webhooks counts, in Prometheus' terms: a registry of its own, as the workers have one."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

REGISTRY: Final = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

OUTCOMES: Final = {
    "done": "delivered",
    "due": "retried",
    "failed": "failed",
    "skipped": "skipped",
    "repeated": "repeated",
    "late": "late",
}
"""By what `webhook_record()` says of an attempt, the label. All are there from the start, since a counter that appears
with its first event has no rise to be seen."""

CRASHED: Final = "crashed"
"""The label of attempts that ended in a mistake of ours."""

ATTEMPTS = Counter(
    "pgbridge_webhook_attempts_total",
    "Requests by what became of their delivery",
    ["worker", "outcome"],
    registry=REGISTRY,
)
REQUEST_SECONDS = Histogram(
    "pgbridge_webhook_request_seconds",
    "How long requests took, answered or not",
    ["worker"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60),
    registry=REGISTRY,
)
IN_FLIGHT = Gauge(
    "pgbridge_webhook_in_flight", "Deliveries that are being sent or recorded", ["worker"], registry=REGISTRY
)
DUE = Gauge(
    "pgbridge_webhook_due",
    "Deliveries of all processes that wait, also for a later attempt",
    ["worker"],
    registry=REGISTRY,
)
OPEN_BREAKERS = Gauge(
    "pgbridge_webhook_breakers_open", "Endpoints whose circuit breaker is not closed", ["worker"], registry=REGISTRY
)
DATABASE_UP = Gauge(
    "pgbridge_webhook_database_up", "1 while PostgreSQL answers this process", ["worker"], registry=REGISTRY
)
