"""What can be set of RabbitMQ, and where its URL says that it is."""

from dataclasses import dataclass, field
from ssl import SSLContext
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import Field

from bridge.brokers.tls import tls_context
from bridge.errors import SettingsError
from bridge.settings.models import Duration, Secret, SinkSettings, Size, TlsSettings


class RabbitMQSettings(SinkSettings):
    url: Secret
    """amqp:// or amqps:// URL with user, password and virtual host."""
    exchange: str = Field("events", max_length=255)
    """Topic exchange to publish to; the routing key is the event's topic."""
    max_message_bytes: Size = 16_777_216
    """Largest payload the broker takes: `max_message_size` of RabbitMQ (16 MiB since 4.0, 128 MiB before)."""
    heartbeat: Duration = 30.0
    """AMQP heartbeat; a peer silent for twice as long is dead."""
    tls: TlsSettings = TlsSettings()
    """Certificates for amqps://."""


_PORTS = {"amqp": 5672, "amqps": 5671}


@dataclass(frozen=True, slots=True)
class Address:
    """Host, virtual host, and who we are."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    virtual_host: str
    tls: SSLContext | None = field(repr=False)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def address_of(settings: RabbitMQSettings) -> Address:
    """Raises SettingsError, which never shows the URL, since the password stands in it."""
    try:
        parts = urlsplit(settings.url.get_secret_value())
        port = parts.port
    except ValueError:
        raise SettingsError(
            "url: is no URL, or its port is no number; write amqp://user:password@host:5672/vhost, "
            "and % and / in user or password as %25 and %2F"
        ) from None
    problem = _problem_with(parts)
    if problem:
        raise SettingsError(f"url: {problem}")
    return Address(
        host=parts.hostname or "",
        port=port or _PORTS[parts.scheme],
        user=unquote(parts.username or "guest"),
        password=unquote(parts.password if parts.password is not None else "guest"),
        virtual_host=unquote(parts.path[1:]) or "/",
        tls=tls_context(settings.tls) if parts.scheme == "amqps" else None,
    )


def _problem_with(parts: SplitResult) -> str | None:
    if parts.scheme not in _PORTS:
        return "begins with neither amqp:// nor amqps://"
    if not parts.hostname:
        return "names no host; write amqp://user:password@host/vhost"
    if parts.query or parts.fragment:
        return "has a part behind ? or #; heartbeat and certificates are settings of their own (heartbeat, tls)"
    if "/" in parts.path[1:]:
        return "has more than one / in its virtual host; write %2F for a slash in a name"
    return None
