"""Google Cloud Pub/Sub, as `pgbridge asyncapi` describes it."""

from collections.abc import Mapping, Sequence
from typing import Final

from bridge.brokers.description import Channel, Json, Server
from bridge.brokers.pubsub.message import CONTENT_TYPE, GOOGLE_TRACE
from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.event import ATTRIBUTE_PREFIX


class PubSubDescription:
    """See `description.Description`."""

    bindings: Final[Json] = {}
    prefix: Final = ATTRIBUTE_PREFIX
    content_type: Final = CONTENT_TYPE
    headers: Final[Mapping[str, Json]] = {
        GOOGLE_TRACE: {"type": "string", "description": "As traceparent, where Google's client libraries look for it."}
    }

    def __init__(self, settings: PubSubSettings) -> None:
        self._settings = settings

    @property
    def words(self) -> str:
        ordering = ", which is the ordering key, too" if self._settings.ordering else ""
        return (
            "One Pub/Sub topic for all events; the event's topic is the attribute `ce-type`, by which a subscription "
            f"can filter. Headers are the message's attributes; `ce-subject` is the event's key{ordering}."
        )

    @property
    def servers(self) -> Sequence[Server]:
        return [Server(self._settings.address, "googlepubsub")]

    def written(self, text: str) -> str:
        return text

    def channel(self, topic: str) -> Channel:
        name = self._settings.topic
        return Channel(name, f"projects/{self._settings.project}/topics/{name}")
