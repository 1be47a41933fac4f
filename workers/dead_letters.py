"""The workers' dead letters, for `pgbridge dead`, which knows no worker itself.

Registered under the entry point group ``pgbridge.dead_letters``.
"""

from collections.abc import Collection, Mapping
from datetime import datetime

from bridge.brokers.letters import PREFIX
from bridge.errors import SettingsError
from bridge.event import Event, Malformed
from bridge.observe.letters import Letter, LetterBox
from bridge.settings import NatsSettings, PubSubSettings, RabbitMQSettings, Settings, SinkSettings


def of_workers(settings: Settings, names: Collection[str]) -> Mapping[str, LetterBox]:
    """The boxes of these workers. Raises SettingsError."""
    boxes = {}
    for name in names:
        try:
            sink = settings.sink_of(name)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        box = _box(settings.sinks[sink], name, sink)
        if box is not None:
            boxes[name] = box
    return boxes


def _box(settings: SinkSettings, worker: str, sink: str) -> LetterBox | None:
    """None for a broker that keeps no dead letters, as memory."""
    # Imported here, since each needs its broker's package.
    match settings:
        case RabbitMQSettings():
            from bridge.brokers.rabbitmq.dead import RabbitMQDeadLetters

            return RabbitMQDeadLetters(settings, worker, sink)
        case NatsSettings():
            from bridge.brokers.nats.dead import NatsDeadLetters

            return NatsDeadLetters(settings, worker, sink)
        case PubSubSettings():
            from bridge.brokers.pubsub.dead import PubSubDeadLetters

            return PubSubDeadLetters(settings, worker, sink)
        case _:
            return None


def letter_of(
    worker: str,
    sink: str,
    event: Event | Malformed,
    message_id: str,
    marks: Mapping[str, str],
    payload: bytes,
    content_type: str | None,
) -> Letter:
    """A letter from a message and its ``x-pgbridge-...`` headers; `message_id` names one that is no event."""
    known = event if isinstance(event, Event) else None
    attempts = marks.get(f"{PREFIX}attempts", "0")
    return Letter(
        id=f"{worker}:{known.id if known else message_id}",
        box=worker,
        event_id=known.id if known else None,
        topic=known.topic if known else None,
        key=known.key if known else None,
        sink=sink,
        code=marks.get(f"{PREFIX}code", "unknown"),
        reason=marks.get(f"{PREFIX}reason", ""),
        attempts=int(attempts) if attempts.isdecimal() else 0,
        failed_at=_time(marks.get(f"{PREFIX}failed-at")),
        payload=payload,
        content_type=known.content_type if known else content_type,
        created_at=known.time if known else None,
        headers=known.headers if known else {},
        trace=marks.get(f"{PREFIX}trace", ""),
    )


def _time(text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        return None
