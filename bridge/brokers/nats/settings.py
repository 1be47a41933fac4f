"""What can be set of NATS."""

from pydantic import Field

from bridge.settings.models import Secret, SinkSettings, Size, TlsSettings


class NatsSettings(SinkSettings):
    url: Secret
    """nats:// or tls:// URL, or several with commas."""
    stream: str = Field("events", pattern=r"^[A-Za-z0-9_-]{1,255}$")
    """JetStream stream to publish to; the subject is the event's topic."""
    max_message_bytes: Size = 8_388_608
    """Largest message that the server takes (`max_payload`)."""
    tls: TlsSettings = TlsSettings()
    """Certificates for tls://."""
