"""RabbitMQ, as `pgbridge asyncapi` describes it."""

from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import quote

from bridge.brokers.description import Channel, Json, Server
from bridge.brokers.rabbitmq.lanes import LANE
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.event import AMQP_PREFIX

_BINDING_VERSION: Final = "0.3.0"


class RabbitMQDescription:
    """See `description.Description`."""

    bindings: Final[Json] = {
        "amqp": {"deliveryMode": 2, "mandatory": True, "timestamp": True, "bindingVersion": _BINDING_VERSION}
    }
    prefix: Final = AMQP_PREFIX
    content_type: Final = None
    headers: Final[Mapping[str, Json]] = {
        LANE: {
            "type": "string",
            "pattern": "^[0-9]{2}$",
            "description": "The lane of the key, for ordered workers of pgbridge.",
        }
    }

    def __init__(self, settings: RabbitMQSettings) -> None:
        self._settings = settings

    @property
    def words(self) -> str:
        return (
            f"The topic exchange {self._settings.exchange}; the routing key is the event's topic. Headers are those of "
            "the message's header table; its properties `message_id`, `timestamp`, `app_id` and `content_type` hold "
            "the event's id, time and source, and the payload's type, too."
        )

    @property
    def servers(self) -> Sequence[Server]:
        return [
            Server(
                f"[{at.host}]:{at.port}" if ":" in at.host else f"{at.host}:{at.port}",
                "amqps" if at.tls else "amqp",
                "0.9.1",
                f"/{quote(at.virtual_host, safe='')}",
            )
            for at in self._settings.addresses
        ]

    def written(self, text: str) -> str:
        return text

    def channel(self, topic: str) -> Channel:
        exchange = {
            "name": self._settings.exchange,
            "type": "topic",
            "durable": True,
            "autoDelete": False,
            "vhost": self._settings.login.virtual_host,
        }
        binding = {"is": "routingKey", "exchange": exchange, "bindingVersion": _BINDING_VERSION}
        return Channel(topic, topic, {"amqp": binding})
