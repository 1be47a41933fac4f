"""The events of a log, for peers that measure publishing alone: read before their clock starts."""

import psycopg

from bridge.event import NO_HEADERS, Event


def events(dsn: str, count: int) -> list[Event]:
    """The first `count` events."""
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(
            "select event_id::text, topic, payload, key, created_at, content_type from bridge.outbox "
            "order by id limit %s",
            (count,),
        ).fetchall()
    return [
        Event(event_id, topic, payload.encode(), key, "/bench1/bridge1", created_at, content_type, NO_HEADERS)
        for event_id, topic, payload, key, created_at, content_type in rows
    ]
