"""Counters and gauges, in Prometheus' terms. One registry a process; `health.py` serves it.

What happens to events is counted a page or a batch at a time: counting each event would cost as much as publishing it.
What only the database knows is asked by the leader, every 15 s (`postgres/status.py`).
"""

from prometheus_client import Counter, Gauge, Histogram

EVENTS_READ = Counter("pgbridge_events_read_total", "Events read for a sink", ["sink"])
EVENTS_CONFIRMED = Counter("pgbridge_events_confirmed_total", "Messages that a broker confirmed", ["sink"])
EVENTS_RETRIED = Counter("pgbridge_events_retried_total", "Messages that are published again", ["sink"])
EVENTS_DEAD = Counter("pgbridge_events_dead_lettered_total", "Events that became dead letters", ["code"])
EVENTS_IN_FLIGHT = Gauge("pgbridge_events_in_flight", "Events that are read and not yet settled or held", ["sink"])
EVENTS_HELD = Gauge(
    "pgbridge_events_held", "Events that the broker refused for now, and what waits behind them", ["sink"]
)
BYTES_IN_FLIGHT = Gauge("pgbridge_bytes_in_flight", "Bytes of payload, key and headers in flight and held", ["sink"])
PER_SINK = (EVENTS_READ, EVENTS_CONFIRMED, EVENTS_RETRIED, EVENTS_IN_FLIGHT, EVENTS_HELD, BYTES_IN_FLIGHT)
"""What is there for each sink from the start: a counter that appears with its first event has no rise to be seen."""
SETTLE_SECONDS = Histogram(
    "pgbridge_settle_seconds",
    "From the recording of a page's first event, by the database's clock, until the page is settled, by ours",
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 3600),
)
LEADING = Gauge("pgbridge_leading", "1 while this bridge reads, 0 while it stands by")
SINK_UP = Gauge("pgbridge_sink_up", "1 while the sink's connection works", ["sink"])
DATABASE_UP = Gauge("pgbridge_database_up", "1 while the session with PostgreSQL works")
NOTIFICATIONS = Counter("pgbridge_notifications_total", "Plain notifications that were heard")
NOTIFICATIONS_DROPPED = Counter("pgbridge_notifications_dropped_total", "Notifications that no memory was left for")
DEAF_SECONDS = Counter("pgbridge_deaf_seconds_total", "Time in which nobody listened to plain notifications")
EVENTS_PRUNED = Counter("pgbridge_events_pruned_total", "Events deleted from the log after their retention")

BACKLOG = Gauge("pgbridge_backlog_events", "Events of the log that are not settled", ["bridge", "sink"])
OLDEST_UNSENT = Gauge(
    "pgbridge_oldest_unsent_seconds", "Age of the oldest event that is not settled", ["bridge", "sink"]
)
DEAD_LETTERS = Gauge("pgbridge_dead_letters", "Dead letters of the outbox", ["bridge"])
NOTIFICATION_QUEUE = Gauge("pgbridge_notification_queue_usage", "Used part of the server's queue for NOTIFY, 0 to 1")
OLDEST_TRANSACTION = Gauge("pgbridge_oldest_transaction_seconds", "Age of the oldest transaction that is seen")
OUTBOX_BYTES = Gauge("pgbridge_outbox_bytes", "Size of the log, with indexes")
OLDEST_EVENT = Gauge("pgbridge_oldest_event_seconds", "Age of the oldest event in the log")
SCHEDULED = Gauge("pgbridge_scheduled_events", "Events that wait for their time, of 100,000 at most")
OVERDUE = Gauge("pgbridge_scheduled_overdue_seconds", "For how long the first of them has been due")
