"""NATS JetStream, as `pgbridge asyncapi` describes it."""

from collections.abc import Mapping, Sequence
from typing import Final

from bridge.brokers.description import Channel, Json, Server
from bridge.brokers.nats.message import CONTENT_TYPE, ID_HEADER, quote_value, subject_of
from bridge.brokers.nats.settings import NatsSettings
from bridge.event import ATTRIBUTE_PREFIX


class NatsDescription:
    """See `description.Description`."""

    bindings: Final[Json] = {}
    prefix: Final = ATTRIBUTE_PREFIX
    content_type: Final = CONTENT_TYPE
    headers: Final[Mapping[str, Json]] = {
        ID_HEADER: {"type": "string", "format": "uuid", "description": "The event's id; a replay has none."}
    }

    def __init__(self, settings: NatsSettings) -> None:
        self._settings = settings

    @property
    def words(self) -> str:
        tls = ", over TLS" if self._settings.encrypted else ""
        return (
            f"The JetStream stream {self._settings.stream}{tls}; the subject is its name and the event's topic. In "
            'headers all but printable ASCII, and space, `"` and `%`, is percent-encoded in UTF-8.'
        )

    @property
    def servers(self) -> Sequence[Server]:
        return [Server(address, "nats") for address in self._settings.servers.addresses]

    def written(self, text: str) -> str:
        return quote_value(text)

    def channel(self, topic: str) -> Channel:
        return Channel(topic, subject_of(self._settings.stream, topic))
