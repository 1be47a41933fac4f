"""The workers' dead letters, for `pgbridge dead`, which knows no worker itself.

Registered under the entry point group ``pgbridge.dead_letters``.
"""

from collections.abc import Collection, Mapping

from bridge.brokers.contract import LetterBox
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.errors import SettingsError
from bridge.settings import Settings, SinkSettings


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
