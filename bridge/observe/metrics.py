"""Counters and gauges, in Prometheus' terms. One registry a process; `health.py` serves it."""

from prometheus_client import Counter, Gauge

EVENTS_READ = Counter("pgbridge_events_read_total", "Events read from the source")
EVENTS_CONFIRMED = Counter("pgbridge_events_confirmed_total", "Messages that a broker confirmed", ["sink"])
EVENTS_RETRIED = Counter("pgbridge_events_retried_total", "Messages that are published again", ["sink"])
EVENTS_DEAD = Counter("pgbridge_events_dead_lettered_total", "Events that became dead letters", ["code"])
PAGES_IN_FLIGHT = Gauge("pgbridge_pages_in_flight", "Pages that are read and not yet settled")
BYTES_IN_FLIGHT = Gauge("pgbridge_bytes_in_flight", "Payload bytes that are read and not yet settled")
LEADING = Gauge("pgbridge_leading", "1 while this bridge reads, 0 while it stands by")
SINK_UP = Gauge("pgbridge_sink_up", "1 while the sink's connection works", ["sink"])
NOTIFICATIONS = Counter("pgbridge_notifications_total", "Plain notifications that were heard")
NOTIFICATIONS_DROPPED = Counter("pgbridge_notifications_dropped_total", "Notifications that no memory was left for")
DEAF_SECONDS = Counter("pgbridge_deaf_seconds_total", "Time in which nobody listened to plain notifications")
