"""What a process that listens counts, in Prometheus' terms: a registry of its own, as the workers have one."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector

REGISTRY: Final = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

OUTCOMES: Final = ("received", "repeated", "refused", "failed")
"""What may become of a webhook. All are there from the start, since a counter that appears with its first event has no
rise to be seen."""

NOTICES = Counter(
    "pgbridge_listener_notices_total",
    "Webhooks of other systems by what became of them",
    ["worker", "outcome"],
    registry=REGISTRY,
)
DATABASE_UP = Gauge(
    "pgbridge_listener_database_up", "1 while PostgreSQL answers this process", ["worker"], registry=REGISTRY
)
