"""Events as tests need them: one factory, whose every field can be given."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from uuid import uuid4

from bridge.event import Event


def make_event(number: int = 0, **changes: object) -> Event:
    """An event like any other, under an id of its own. `number` tells it apart: it is the payload, and gives one of
    seven keys. `changes` are fields of Event; a payload that is not bytes is written as JSON.
    """
    payload = changes.pop("payload", {"number": number})
    event = Event(
        id=str(uuid4()),
        topic="shop.order.inserted",
        payload=payload if isinstance(payload, bytes) else json.dumps(payload).encode(),
        key=str(number % 7),
        source="/shop/test",
        time=datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC),
        content_type="application/json",
        headers={},
    )
    return event._replace(**changes)  # type: ignore[arg-type]  # names and types are the caller's to get right


def make_events(count: int) -> list[Event]:
    """Events with the numbers from 0 on."""
    return [make_event(number) for number in range(count)]


def ids(events: Iterable[Event]) -> list[str]:
    """Their ids, in order."""
    return [event.id for event in events]
