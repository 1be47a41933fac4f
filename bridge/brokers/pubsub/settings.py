"""What can be set of Google Cloud Pub/Sub."""

import os
from collections.abc import Sequence
from typing import ClassVar, Final, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from bridge.settings.models import Duration, PlainText, Secret, SinkSettings, Size, SomeSize

EXAMPLE: Final = "my-project"
"""A project of Google Cloud."""


class PubSubSettings(SinkSettings):
    project: str = Field(pattern=r"^[a-z][a-z0-9.:-]{2,}$")
    """Google Cloud project that holds topic and subscriptions."""
    topic: str = Field("events", pattern=r"^[A-Za-z][A-Za-z0-9._~+%-]{2,254}$")
    """Pub/Sub topic to publish to; the event's topic is the attribute `ce-type`, by which subscriptions filter."""
    credentials: Secret = SecretStr("")
    """JSON of a service account key or of a workload identity configuration. Empty: application default credentials."""
    endpoint: str = Field("pubsub.googleapis.com:443", pattern=r"^[^/\s]+:\d+$")
    """Host and port of the service; a regional one, as `europe-west1-pubsub.googleapis.com:443`, keeps a key's order
    when bridges run in several regions."""
    emulator_host: str = Field(
        default_factory=lambda: os.environ.get("PUBSUB_EMULATOR_HOST", ""), pattern=r"^([^/\s]+:\d+)?$"
    )
    """Host and port of Google's emulator, spoken to without credentials. Default: the variable PUBSUB_EMULATOR_HOST."""
    ordering: bool = True
    """Whether the event's key becomes the ordering key. At most 1 MB a second per key; without it there is no order."""
    max_message_bytes: SomeSize = Field(9_800_000, le=9_800_000)
    """Largest payload. Pub/Sub takes requests of 10 MB; the rest of them is room for attributes."""
    batch_messages: int = Field(1000, ge=1, le=1000)
    """Most messages in one request."""
    batch_bytes: Size = Field(2_000_000, ge=1, le=10_000_000)
    """Most bytes in one request; one larger message still goes, alone."""
    batch_delay: Duration = 0.0
    """How long a message may wait for others to share its request; every request is billed as 1 kB at least."""
    requests_in_flight: int = Field(64, ge=1, le=1000)
    """Most publish requests that wait for their confirm."""
    retention: Duration = 7 * 86400.0
    """How long the topic keeps messages for subscriptions yet to come; 0 keeps none, else 10 minutes to 31 days."""

    most_prefetch: ClassVar[int] = 1000
    """What one pull gives."""

    @property
    def address(self) -> str:
        """Where the service or the emulator is, as ``host:port``."""
        return self.emulator_host or self.endpoint

    @property
    def address_key(self) -> str:
        """The dotted key of the setting that says so."""
        return self.key("emulator_host" if self.emulator_host else "endpoint")

    @property
    def messaging_system(self) -> str:
        """See `SinkSettings.messaging_system`."""
        return "gcp_pubsub"

    @property
    def destination(self) -> str:
        """See `SinkSettings.destination`."""
        return self.topic

    @property
    def plain_text(self) -> Sequence[PlainText]:
        """See `SinkSettings.plain_text`."""
        if not self.emulator_host:
            return ()
        host = self.emulator_host.rpartition(":")[0]
        return (PlainText(host, "emulator_host", "Leave it out: the service itself is spoken to over TLS"),)

    @field_validator("retention")
    @classmethod
    def _retention_that_pubsub_offers(cls, retention: float) -> float:
        if retention and not 600 <= retention <= 31 * 86400:
            raise ValueError('is neither 0 nor between "10m" and "31d"')
        return retention

    @model_validator(mode="after")
    def _delay_is_no_silence(self) -> Self:
        if self.batch_delay >= self.publish_timeout:
            raise ValueError(
                f"batch_delay: {self.batch_delay:g} s is not below publish_timeout ({self.publish_timeout:g} s)"
            )
        return self
