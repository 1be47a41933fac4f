"""Events as tests need them: one factory, whose every field can be given."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from bridge.event import Event
from workers import testing

_FIELDS: dict[str, Any] = {
    "topic": "shop.order.inserted",
    "source": "/shop/test",
    "time": datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC),
}


def make_event(number: int = 0, **changes: Any) -> Event:
    """An event like any other, under an id of its own. `number` tells it apart: it is the payload, and gives one of
    seven keys. `changes` are what `workers.testing.make_event` takes.
    """
    return testing.make_event(**{**_FIELDS, "payload": {"number": number}, "key": str(number % 7), **changes})


def make_events(count: int) -> list[Event]:
    """Events with the numbers from 0 on."""
    return [make_event(number) for number in range(count)]


def ids(events: Iterable[Event]) -> list[str]:
    """Their ids, in order."""
    return [event.id for event in events]
