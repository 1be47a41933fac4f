"""What can be set. Every field's description is its documentation (docs/settings.md is checked against it)."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from bridge.settings.values import Duration, Secret, Size

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
TopicPattern = Annotated[str, Field(min_length=1, max_length=255)]
LISTEN = r"^(\[[0-9a-fA-F:.]+\]|[^:\s\[\]]+):\d{1,5}$"
"""host:port; an IPv6 address stands in brackets."""


class Model(BaseModel):
    """Frozen, and an unknown key is an error: a typing mistake must never be a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _read_secret_files(cls, data: Any) -> Any:
        """Every secret `x` may be given as `x_file`, the path of a file that holds it."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for name, field in cls.model_fields.items():
            if field.annotation is not SecretStr or f"{name}_file" not in data:
                continue
            if name in data:
                raise ValueError(f"{name}_file: is given beside {name}; keep one of the two")
            path = data.pop(f"{name}_file")
            try:
                data[name] = Path(path).read_text(encoding="utf-8").rstrip("\n")
            except (OSError, TypeError) as error:
                said = error.strerror if isinstance(error, OSError) else "is no path"
                raise ValueError(f"{name}_file: the secret file {path!r} cannot be read: {said}") from None
        return data


class PostgresSettings(Model):
    dsn: Secret = SecretStr("")
    """Where the database is: a libpq URI or key=value string, of one or several hosts. Empty: PGHOST, PGUSER, ..."""
    connect_timeout: Duration = 10.0
    """How long one attempt to connect may take."""


class OutboxSettings(Model):
    retention: Duration = 7 * 86400.0
    """How long events stay in the log behind the slowest bridge; `pgbridge replay` reaches as far back."""
    page_size: int = Field(2000, ge=1, le=50_000)
    """Most events read at once; over a slow connection up to four times as many."""
    page_bytes: Size = 8_000_000
    """Most payload bytes read at once; one larger event is still read, alone."""
    poll_interval: Duration = 1.0
    """How often the log is read although no bell rang: the longest that a lost bell can delay an event."""


class ChannelsSettings(Model):
    listen: list[str] = Field(min_length=1)
    """Channels of plain pg_notify, exactly as pg_notify() takes them: capitals and spaces matter."""
    buffer: Literal["outbox", "memory"] = "outbox"
    """`outbox`: what is heard goes into the log first. `memory`: nothing is installed; what cannot be kept is lost."""
    buffer_events: int = Field(100_000, ge=1)
    """Most notifications held in memory; beyond them `memory` drops and counts, `outbox` stops listening."""
    heartbeat: Duration = 30.0
    """How often the listener must hear itself."""


class RelaySettings(Model):
    pages_in_flight: int = Field(8, ge=1, le=256)
    """Most pages that are read and not yet settled."""
    bytes_in_flight: Size = 64_000_000
    """Most payload bytes that are read and not yet settled."""
    retry_initial: Duration = 0.1
    """First delay before a refused message is published again."""
    retry_max: Duration = 10.0
    """Longest such delay."""
    shutdown_limit: Duration = 20.0
    """How long a stop waits for what is in flight."""


class TlsSettings(Model):
    ca_file: Path | None = None
    """Certificates to trust instead of the system's."""
    cert_file: Path | None = None
    """Client certificate."""
    key_file: Path | None = None
    """Its private key."""


class SinkSettings(Model):
    type: str
    """The kind of broker; `pgbridge check` lists the kinds that are installed."""
    publish_timeout: Duration = 30.0
    """How long a confirm may take before the outcome is unknown and the message is sent again."""


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


class NatsSettings(SinkSettings):
    url: Secret
    """nats:// or tls:// URL, or several with commas."""
    stream: str = Field("events", pattern=r"^[A-Za-z0-9_-]{1,255}$")
    """JetStream stream to publish to; the subject is the event's topic."""
    max_message_bytes: Size = 8_388_608
    """Largest message that the server takes (`max_payload`)."""
    tls: TlsSettings = TlsSettings()
    """Certificates for tls://."""


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
    max_message_bytes: Size = Field(9_800_000, le=9_800_000)
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
    """How long the topic keeps messages for subscriptions yet to come; 0 keeps none, else from 10 minutes to 31 days."""

    @field_validator("retention")
    @classmethod
    def _retention_that_pubsub_offers(cls, retention: float) -> float:
        if retention and not 600 <= retention <= 31 * 86400:
            raise ValueError('is neither 0 nor between "10m" and "31d"')
        return retention


class RouteSettings(Model):
    topic: TopicPattern
    """Pattern of topics: `*` stands for one word, `#` for any number of words."""
    sink: Name
    """The sink that takes them."""


class WorkerSettings(Model):
    handler: str
    """The function: `package.module:function`."""
    subscribe: list[TopicPattern] = []
    """Patterns of topics; empty: those that the handler was written for."""
    sink: Name | None = None
    """The sink whose broker the worker consumes from; may be left out when there is one."""
    concurrency: int = Field(4, ge=1, le=1000)
    """Handlers that run at once."""
    prefetch: int | None = Field(None, ge=1, le=65535)
    """Deliveries in hand at once; default: twice the concurrency."""
    timeout: Duration = 60.0
    """How long one run of the handler may take."""
    max_attempts: int = Field(8, ge=1, le=100)
    """Attempts before the event is dead-lettered."""
    retry_initial: Duration = 1.0
    """Delay before the second attempt; doubles with each further one."""
    retry_max: Duration = 600.0
    """Longest delay between two attempts."""
    reply: str | None = Field(None, pattern=r"^[^.]+\.[^.]+$")
    """SQL function `schema.name(event_id uuid, result jsonb)` that takes the handler's result."""
    shutdown_limit: Duration = 20.0
    """How long a stop waits for running handlers."""
    listen: str | None = Field(None, pattern=LISTEN)
    """`host:port` at which this worker serves `/metrics` and `/health`; left out: nowhere."""
    options: dict[str, Any] = {}
    """What the handler itself reads; see its documentation."""


class ObserveSettings(Model):
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged."""
    log_format: Literal["auto", "text", "json"] = "auto"
    """`auto`: text on a terminal, JSON otherwise."""
    listen: str | None = Field(None, pattern=LISTEN)
    """`host:port` at which the bridge serves `/metrics` and `/health`; left out: nowhere. Workers have their own."""


class Settings(Model):
    """All of bridge.toml."""

    name: Name
    """This bridge's name: its cursor in the log, and part of the events' source."""
    postgres: PostgresSettings = PostgresSettings()
    """The database."""
    outbox: OutboxSettings | None = None
    """Reading the log. Left out together with `channels.buffer = "memory"`, no schema is needed."""
    channels: ChannelsSettings | None = None
    """Plain pg_notify."""
    relay: RelaySettings = RelaySettings()
    """How much is in flight, and how failures are tried again."""
    sinks: dict[Name, SinkSettings] = {}
    """Brokers, by name."""
    routes: list[RouteSettings] = []
    """Which topics go to which sinks; every route that matches applies."""
    unrouted: Literal["dead_letter", "drop"] = "dead_letter"
    """What becomes of an event that no route takes."""
    workers: dict[Name, WorkerSettings] = {}
    """Worker processes, by name."""
    observe: ObserveSettings = ObserveSettings()
    """Logs, metrics and health."""

    @property
    def reads_outbox(self) -> bool:
        """Whether the log is read; if not, the database needs no schema of ours."""
        return self.outbox is not None or self.channels is None or self.channels.buffer == "outbox"

    @property
    def outbox_or_default(self) -> OutboxSettings:
        """How the log is read."""
        return self.outbox or OutboxSettings()

    @model_validator(mode="after")
    def _names_that_refer(self) -> "Settings":
        known = ", ".join(sorted(self.sinks)) or "none"
        for index, route in enumerate(self.routes):
            if route.sink not in self.sinks:
                raise ValueError(f"routes.{index}.sink: there is no sink named {route.sink!r}; known: {known}")
        for name, worker in self.workers.items():
            if worker.sink is not None and worker.sink not in self.sinks:
                raise ValueError(f"workers.{name}.sink: there is no sink named {worker.sink!r}; known: {known}")
        return self

    def sink_of(self, worker: str) -> str:
        """The name of the sink that a worker consumes from. Raises ValueError when it cannot be told."""
        named = self.workers[worker].sink
        if named is not None:
            return named
        if len(self.sinks) == 1:
            return next(iter(self.sinks))
        raise ValueError(f"workers.{worker}.sink: name one of the sinks {', '.join(sorted(self.sinks)) or '(none)'}")
