"""What a broker is to a consumer that has never heard of pgbridge: where it is, and how a message stands on it, in the
words of AsyncAPI 3.0. For `pgbridge asyncapi`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

Json = dict[str, Any]
"""A JSON object: a schema, or another part of a document."""


@dataclass(frozen=True, slots=True)
class Server:
    """One host. None of this holds a login."""

    host: str
    """``host:port``; an IPv6 address is in brackets."""
    protocol: str
    """By its name in AsyncAPI: ``amqp``, ``amqps``, ``nats``, ``googlepubsub``."""
    version: str | None = None
    """Of the protocol."""
    pathname: str | None = None
    """What stands behind the host in a URL."""


@dataclass(frozen=True, slots=True)
class Channel:
    """Where events of a topic are."""

    name: str
    """Tells it from the sink's other channels; topics whose channels have one name share it."""
    address: str
    """As the broker has it: a routing key, a subject, the name of a topic."""
    bindings: Json = field(default_factory=dict)
    """What AsyncAPI has for the channels of this protocol."""


class Description(Protocol):
    """What the settings of one sink say of its broker."""

    @property
    def words(self) -> str:
        """For a person: which part of the broker it is, and what is not in a message's headers."""

    @property
    def servers(self) -> Sequence[Server]:
        """The hosts of one broker, at least one."""

    @property
    def bindings(self) -> Json:
        """What AsyncAPI has for sending over this protocol."""

    @property
    def prefix(self) -> str:
        """What the names of CloudEvents' attributes begin with among a message's headers."""

    @property
    def content_type(self) -> str | None:
        """The header that says what the payload is; None where a message has another place for it."""

    @property
    def headers(self) -> Mapping[str, Json]:
        """The JSON Schemas of headers that a message may have beside CloudEvents' attributes, by name."""

    def written(self, text: str) -> str:
        """A header's value as it stands in a message."""

    def channel(self, topic: str) -> Channel:
        """Where events of a topic go."""


@runtime_checkable
class DescribedBroker(Protocol):
    """A `contract.Broker` that has a description. One that has none is left out of documents."""

    def description(self, settings: Any, /) -> Description:
        """Of a sink with these settings. Connects to nothing."""
