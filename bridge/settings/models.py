"""What can be set. Every field's description is its documentation (docs/settings.md is checked against it)."""

import math
import re
from collections.abc import Sequence
from ipaddress import ip_network
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    SecretStr,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from bridge.errors import SettingsError, UsageError

_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES: Final = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_RATE: Final = re.compile(r"(\d+)\s*/\s*(s|m|h)")
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|KiB|MiB|GiB)")


_LONGEST_DURATION: Final = 20_000 * 86400.0
"""Seconds. Beyond 2**31 libpq takes no time-out, and beyond some 2900 centuries PostgreSQL has no time."""


def parse_duration(value: object) -> float:
    """Seconds of ``"500ms"``, ``"30s"``, ``"5m"``, ``"2h"``, ``"7d"`` or a number. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())):
        seconds = float(match[1]) * _SECONDS[match[2]]
    else:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError('is not a duration; write a number and a unit, as in "500ms", "30s", "5m", "2h", "7d"')
    if seconds < 0:
        raise ValueError("is negative; a duration is zero or more")
    if seconds > _LONGEST_DURATION:
        raise ValueError(f"is longer than {_LONGEST_DURATION / 86400:g}d, which is the longest duration")
    return seconds


def parse_size(value: object) -> int:
    """Bytes of ``"64MB"``, ``"1MiB"`` or a whole number. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(float(match[1]) * _BYTES[match[2]])
    raise ValueError('is not a size; write a number and a unit, as in "10MB" or "64MiB"')


_HIGHEST_RATE: Final = 1_000_000
"""A second. PostgreSQL's times have microseconds."""


def parse_rate(value: object) -> float:
    """Times a second of ``"25/s"``, ``"100/m"`` or ``"2000/h"``. Raises ValueError."""
    if not isinstance(value, str) or (match := _RATE.fullmatch(value.strip())) is None:
        raise ValueError('is not a rate; write a whole number and a unit of time, as in "25/s", "100/m", "2000/h"')
    rate = int(match[1]) / _SECONDS[match[2]]
    if not rate:
        raise ValueError("is zero, at which nothing ever begins; leave it out for no limit")
    if rate > _HIGHEST_RATE:
        raise ValueError(f"is more than {_HIGHEST_RATE}/s, the highest rate; leave it out for no limit")
    return rate


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema({"type": ["string", "number"], "examples": ["500ms", "30s", "7d"]}),
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"type": ["string", "integer"], "examples": ["10MB", "64MiB"]}),
]
Rate = Annotated[
    float,
    BeforeValidator(parse_rate),
    WithJsonSchema({"type": "string", "examples": ["25/s", "100/m", "2000/h"]}),
]
"""Times a second."""


def _more_than_zero(value: float) -> float:
    if not value:
        raise ValueError("must be more than zero")
    return value


SomeDuration = Annotated[Duration, AfterValidator(_more_than_zero)]
"""Of what never happens, or never stops happening, without any time."""

_LONGEST_DELAY: Final = 49 * 86400.0
"""Seconds; RabbitMQ counts a message's time to live in milliseconds, in 32 bits."""


def _that_a_broker_can_wait(delay: float) -> float:
    if delay > _LONGEST_DELAY:
        raise ValueError(f"is longer than {_LONGEST_DELAY / 86400:g}d, the longest that a broker keeps a retry waiting")
    return delay


RetryDelay = Annotated[SomeDuration, AfterValidator(_that_a_broker_can_wait)]
SomeSize = Annotated[Size, AfterValidator(_more_than_zero)]
Secret = Annotated[SecretStr, PlainSerializer(lambda _: "**********", return_type=str)]
"""Shown as stars wherever it is printed; `get_secret_value()` gives it."""


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
            if is_secret(field.annotation):
                _read_secret_file(data, name)
        return data


def is_secret(annotation: Any) -> bool:
    """Whether a field holds a secret, or may hold one (``Secret | None``)."""
    if annotation is SecretStr:
        return True
    return get_origin(annotation) in (UnionType, Union, Annotated) and any(map(is_secret, get_args(annotation)))


def _read_secret_file(table: dict[str, Any], name: str) -> None:
    """Puts what `<name>_file` holds in the place of it, if it is there. Raises ValueError."""
    if f"{name}_file" not in table:
        return
    if name in table:
        raise ValueError(f"{name}_file: is given beside {name}; keep one of the two")
    path = table.pop(f"{name}_file")
    try:
        table[name] = Path(path).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, TypeError, UnicodeDecodeError) as error:
        reasons = {TypeError: "it is not a path", UnicodeDecodeError: "it is not UTF-8"}
        reason = error.strerror if isinstance(error, OSError) else reasons[type(error)]
        raise ValueError(f"{name}_file: the secret file {path!r} cannot be read: {reason}") from None


class TlsSettings(Model):
    ca_file: Path | None = None
    """Certificates to trust instead of the system's."""
    cert_file: Path | None = None
    """Client certificate."""
    key_file: Path | None = None
    """Its private key; left out where it is in the same file."""

    @model_validator(mode="after")
    def _key_of_a_certificate(self) -> Self:
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file: is given without cert_file, the certificate that belongs to it; give both")
        return self

    @property
    def given(self) -> str | None:
        """One of the fields that are given."""
        return next((name for name, value in self if value is not None), None)


class PlainText(NamedTuple):
    """A host to which a sink's settings let everything go in plain text."""

    host: str
    key: str
    """The field that says so."""
    mend: str
    """What to write instead."""


class SinkSettings(Model):
    """What every kind of broker has. A broker's own model is a subclass, in its folder below `bridge/brokers`."""

    type: str
    """The kind of broker: one of those that are installed."""
    publish_timeout: SomeDuration = 30.0
    """How long a broker may be silent about everything published to it before its connection is given up."""
    start: Literal["now", "beginning"] | None = None
    """Where a new sink begins in the log. Left out: now, but a new bridge at the beginning."""
    pipelined: bool = True
    """Whether a key's events go together. `false`: one by one, so that even a first refusal lets none overtake."""

    most_prefetch: ClassVar[int] = 65_535
    """Most deliveries that this kind of broker lets one worker have in hand."""
    keeps_history: ClassVar[bool] = False
    """Whether the broker keeps what workers have handled, so that a new one can begin with it."""

    _name: str = PrivateAttr("")

    def model_post_init(self, context: Any) -> None:
        """Takes the sink's name from the validation's context, ``{"sink": name}``."""
        if context is not None:
            self._name = context["sink"]

    @property
    def name(self) -> str:
        """What the settings call this sink; empty when it comes from no settings file."""
        return self._name

    @property
    def plain_text(self) -> Sequence[PlainText]:
        """The hosts that are spoken to without TLS."""
        return ()

    @property
    def messaging_system(self) -> str:
        """What OpenTelemetry's conventions call this kind of broker."""
        return self.type

    @property
    def destination(self) -> str:
        """What events are published to, for the names of spans: an exchange, a stream, a topic."""
        return self._name

    def destination_of(self, topic: str) -> str:
        """Where an event of this topic goes, as OpenTelemetry's conventions write it for this kind of broker."""
        return self.destination

    def key(self, field: str) -> str:
        """The dotted key of one of its fields, for errors: ``sinks.events.url``."""
        return f"sinks.{self._name}.{field}" if self._name else field


Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]

_LONGEST_TOPIC: Final = 255
"""Bytes of an event's topic; RabbitMQ binds no longer pattern either."""


def _pattern_that_topics_match(pattern: str) -> str:
    size = len(pattern.encode())
    if size > _LONGEST_TOPIC:
        raise ValueError(f"has {size} bytes; topics and patterns have up to {_LONGEST_TOPIC}")
    for word in pattern.split("."):
        if word == ">":
            raise ValueError("> is no wildcard; write # for any number of words")
        if len(word) > 1 and ("*" in word or "#" in word):
            raise ValueError(f"{word!r}: * and # stand for whole words between dots, and not for a part of one")
    return pattern


TopicPattern = Annotated[
    str, Field(min_length=1, max_length=_LONGEST_TOPIC), AfterValidator(_pattern_that_topics_match)
]


def _port_that_exists(listen: str) -> str:
    if not 1 <= int(listen.rpartition(":")[2]) <= 65_535:
        raise ValueError("its port is not between 1 and 65535")
    return listen


Listen = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:.]+\]|[^:\s\[\]]+):\d{1,5}$"), AfterValidator(_port_that_exists)]
"""host:port; an IPv6 address is in brackets."""

_LONGEST_CHANNEL: Final = 63
"""Bytes. pg_notify() refuses longer ones, and LISTEN would cut them without a word."""


def _channel_of_postgresql(channel: str) -> str:
    size = len(channel.encode())
    if not size:
        raise ValueError("is empty")
    if size > _LONGEST_CHANNEL:
        raise ValueError(f"has {size} bytes; PostgreSQL takes channels of up to {_LONGEST_CHANNEL}")
    return channel


Channel = Annotated[str, AfterValidator(_channel_of_postgresql)]


def _require_growing_delays(retry_initial: float, retry_max: float) -> None:
    """Raises ValueError where the first delay would be longer than the longest one."""
    if retry_max < retry_initial:
        raise ValueError(f"retry_max: {retry_max:g} s is below retry_initial ({retry_initial:g} s)")


class PostgresSettings(Model):
    dsn: Secret = SecretStr("")
    """Where the database is: a libpq URI or key=value string, of one or several hosts. Empty: PGHOST, PGUSER, ..."""
    connect_timeout: SomeDuration = 10.0
    """How long one attempt to connect may take."""

    _dsn_key: str = PrivateAttr("postgres.dsn")

    def key(self, field: str) -> str:
        """The dotted key of one of its fields, for errors: ``postgres.dsn``."""
        return self._dsn_key if field == "dsn" else f"postgres.{field}"

    def for_login(self, dsn: SecretStr, key: str) -> "PostgresSettings":
        """The same with another DSN, which the settings give under `key`."""
        other = self.model_copy(update={"dsn": dsn})
        other._dsn_key = key
        return other


class OutboxSettings(Model):
    retention: Duration = 7 * 86400.0
    """How long events stay in the log behind the slowest bridge; `pgbridge replay` reaches as far back."""
    page_size: int = Field(2000, ge=1, le=50_000)
    """Most events read at once; over a slow connection up to four times as many."""
    page_bytes: SomeSize = 8_000_000
    """Most bytes of payload, key and headers read at once; one larger event is still read, alone."""
    poll_interval: SomeDuration = 1.0
    """How often the log is read although no bell rang: the longest that a lost bell can delay an event. A bridge that
    polls seldom also shows seldom that it lives, so that another one takes over later."""
    standby_interval: SomeDuration = 1.0
    """How often a standby tries to lead: the longest that a crashed leader's place stays empty."""
    heartbeat: SomeDuration = 30.0
    """How often the connection that hears the bell must hear itself."""
    prune_interval: SomeDuration = 60.0
    """How often the leader looks for events that are past the retention."""


class ChannelsSettings(Model):
    listen: list[Channel] = Field(min_length=1)
    """Channels of plain pg_notify, exactly as pg_notify() takes them: capitals and spaces matter."""
    require_prefix: str = ""
    """What each of these channels must begin with. PostgreSQL lets any role NOTIFY any channel, and its name is the
    event's topic: with a prefix such as `open_` no such event can have a topic that only `bridge.emit()` and
    `bridge.notify()` should make."""
    buffer: Literal["outbox", "memory"] = "outbox"
    """`outbox`: what is heard goes into the log first. `memory`: nothing is installed; what cannot be kept is lost."""
    buffer_events: int = Field(100_000, ge=1)
    """Most notifications held in memory; beyond them `memory` drops and counts, `outbox` stops listening."""
    heartbeat: SomeDuration = 30.0
    """How often the listener must hear itself."""
    standby_interval: SomeDuration = 1.0
    """With `memory`: how often a standby tries to take over."""

    @model_validator(mode="after")
    def _channels_with_the_prefix(self) -> Self:
        for channel in self.listen:
            if not channel.startswith(self.require_prefix):
                raise ValueError(
                    f"listen: {channel!r} does not begin with channels.require_prefix, {self.require_prefix!r}"
                )
        return self


class RelaySettings(Model):
    events_in_flight: int = Field(16_000, ge=1, le=1_000_000)
    """Most events of a sink that are read and not yet settled; how many are, follows its confirms."""
    bytes_in_flight: SomeSize = 64_000_000
    """Most bytes of a sink's events (payload, key, headers) that are read and not yet settled, held ones included."""
    held_events: int = Field(10_000, ge=1, le=1_000_000)
    """Most events of a sink that wait because its broker refused them or what precedes them, while others go on."""
    retry_initial: SomeDuration = 0.1
    """First delay before a refused message is published again."""
    retry_max: SomeDuration = 10.0
    """Longest such delay."""
    shutdown_limit: Duration = 20.0
    """How long a stop waits for what is in flight."""

    @model_validator(mode="after")
    def _delays_grow(self) -> Self:
        _require_growing_delays(self.retry_initial, self.retry_max)
        return self


class RouteSettings(Model):
    topic: TopicPattern
    """Pattern of topics: `*` is one word, `#` any number of words."""
    sink: Name
    """The sink that takes them."""


def parse_folders(value: object, info: ValidationInfo) -> object:
    """One path or a list of them, made absolute from the folder of the settings file, which is in the validation's
    context as ``folder``."""
    if isinstance(value, str | Path):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(path, str | Path) and str(path) for path in value):
        raise ValueError('is not a path or a list of paths, as in "." or ["src", "/opt/handlers"]')
    return [Path((info.context or {}).get("folder", "."), path).resolve() for path in value]


Folders = Annotated[
    list[Path],
    BeforeValidator(parse_folders),
    WithJsonSchema({"type": ["string", "array"], "items": {"type": "string"}, "examples": [".", ["src"]]}),
]


class WorkerSettings(Model):
    handler: str
    """The function: `package.module:function`."""
    path: Folders = Field(default_factory=list)
    """Folders that hold the handler and what it imports, relative to the settings file's own; Python looks into them
    first. Left out: `handler` is installed, or on PYTHONPATH."""
    subscribe: list[TopicPattern] = Field(default_factory=list)
    """Patterns of topics; empty: those that the handler was written for."""
    sink: Name | None = None
    """The sink whose broker the worker consumes from; may be left out when there is one."""
    start: Literal["now", "beginning"] = "now"
    """Where a new worker begins. `now`: with what is published once `pgbridge topology --apply` has declared its queue.
    `beginning`: with the oldest event of the stream, which only NATS has; RabbitMQ and Pub/Sub keep nothing for a queue
    that does not exist yet, so there it is an error. A queue that exists goes on where it is."""
    concurrency: int = Field(4, ge=1, le=1000)
    """Handlers that run at once."""
    prefetch: int | None = Field(None, ge=1, le=65535)
    """Deliveries in hand at once; default: twice the concurrency. At most 10000 on NATS, 1000 on Pub/Sub."""
    rate: Rate | None = None
    """Most handlers that begin in a second, a minute or an hour, over all processes of the worker: `"25/s"`, `"100/m"`,
    `"2000/h"`; left out: no limit."""
    ordered: bool = False
    """Events of one key one after the other, in the order of their commits, through failures and over all processes;
    keys side by side. An event that fails waits in the process and holds its key, and nothing else."""
    on_dead_letter: Literal["pass", "hold"] = "pass"
    """With `ordered`: what a dead letter means for its key. `pass`: the next event of the key runs. `hold`: every later
    one is moved aside to the dead letters too, unrun, until the first has been replayed and handled."""
    lanes: int = Field(1, ge=1, le=64)
    """With `ordered` on RabbitMQ: over how many queues the keys are spread. A queue is with one process at a time, so
    as many processes can work side by side; more wait to take over. NATS has one process work, Pub/Sub any number."""
    timeout: SomeDuration = 60.0
    """How long one run of the handler may take."""
    max_attempts: int = Field(8, ge=1, le=100)
    """Attempts before the event is dead-lettered."""
    retry_initial: RetryDelay = 1.0
    """Delay before the second attempt; doubles with each further one."""
    retry_max: RetryDelay = 600.0
    """Longest delay between two attempts."""
    reply: str | None = Field(None, pattern=r"^[^.]+\.[^.]+$")
    """SQL function `schema.name(event_id uuid, result jsonb)` that takes the handler's result."""
    reply_timeout: SomeDuration = 30.0
    """How long one call of `reply` may take; a longer one is cancelled, and the attempt has failed."""
    effects: bool = True
    """Whether the handler has effects outside the database, as a payment or a mail. `false` lets the inbox do with one
    write an event, with the reply: now and then a handler runs twice for one event, also at the same time, and of one
    run the result is thrown away. `effect()` raises then. An ordered worker gains nothing by it."""
    shutdown_limit: Duration = 20.0
    """How long a stop may take, the process is gone by then: three quarters of it for running handlers to finish, the
    rest for giving back those that have not."""
    listen: Listen | None = None
    """`host:port` at which this worker serves `/metrics`, `/health`, `/livez` and `/readyz`; left out: nowhere."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What the handler itself reads; see its documentation."""

    @model_validator(mode="after")
    def _delays_grow(self) -> Self:
        _require_growing_delays(self.retry_initial, self.retry_max)
        return self

    @model_validator(mode="after")
    def _lanes_of_an_ordered_worker(self) -> Self:
        if self.lanes > 1 and not self.ordered:
            raise ValueError("lanes: only an ordered worker has any; set ordered = true, or leave it out")
        return self

    @model_validator(mode="after")
    def _keys_of_an_ordered_worker(self) -> Self:
        if self.holds and not self.ordered:
            raise ValueError('on_dead_letter: only an ordered worker can hold a key; set ordered = true, or say "pass"')
        return self

    @property
    def holds(self) -> bool:
        """Whether a dead letter holds its key."""
        return self.on_dead_letter == "hold"

    @model_validator(mode="after")
    def _prefetch_feeds_every_handler(self) -> Self:
        if self.prefetch is not None and self.prefetch < self.concurrency:
            raise ValueError(
                f"prefetch: {self.prefetch} is below concurrency ({self.concurrency}), which would never be reached"
            )
        return self


class ObserveSettings(Model):
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged."""
    log_format: Literal["auto", "text", "json"] = "auto"
    """`auto`: text on a terminal, JSON otherwise."""
    listen: Listen | None = None
    """`host:port` at which the bridge serves `/metrics`, `/health`, `/livez` and `/readyz`; left out: nowhere.
    Workers have their own."""
    sample_interval: SomeDuration = 15.0
    """How often a leader asks the database for the metrics that only it knows; every 15 s in any case, when it also
    stores a sample for charts."""
    traces: bool = False
    """Whether bridge and workers record spans of the events that belong to a sampled trace, and send them to an
    OpenTelemetry collector, as OTEL_EXPORTER_OTLP_ENDPOINT and its like say. Needs the extra `otel`."""


_SHORTEST_TOKEN: Final = 20
"""Characters of a token, so that nobody guesses it."""


def _token_that_nobody_guesses(token: SecretStr | None) -> SecretStr | None:
    size = len(token.get_secret_value()) if token is not None else _SHORTEST_TOKEN
    if size < _SHORTEST_TOKEN:
        raise ValueError(
            f"has {size} characters; write {_SHORTEST_TOKEN} or more that nobody guesses: openssl rand -base64 24"
        )
    return token


Token = Annotated[Secret | None, AfterValidator(_token_that_nobody_guesses)]


def _network(text: str) -> str:
    try:
        ip_network(text)
    except ValueError:
        raise ValueError(f'{text!r} is no address, nor a network, as in "10.0.0.7" or "10.0.0.0/24"') from None
    return text


Network = Annotated[str, AfterValidator(_network)]
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,100}$")]


_ORIGIN: Final = re.compile(r"(https?://(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(?::\d{1,5})?)/?")


def _address_of_a_browser(url: str) -> str:
    found = _ORIGIN.fullmatch(url)
    if found is None:
        raise ValueError("is no address of a console; write scheme and host alone, as in https://console.example.com")
    return found[1].lower()


class ConsoleProxySettings(Model):
    addresses: list[Network] = Field(min_length=1)
    """Where the proxy's connections come from: addresses or networks. From anywhere else its headers mean nothing."""
    user_header: HeaderName = "X-Forwarded-User"
    """The header that names the person. The proxy must remove it from what browsers send."""
    groups_header: HeaderName | None = None
    """The header that names the person's groups, between commas; left out: only persons are looked at."""
    operators: list[str] = Field(default_factory=list)
    """Persons and groups that may act; everybody else whom the proxy lets through may look."""


class ConsoleSettings(Model):
    listen: Listen = "127.0.0.1:8417"
    """`host:port` of the web console. On loopback it needs no login; anywhere else it takes `token` or `proxy`."""
    url: Annotated[str, AfterValidator(_address_of_a_browser)] | None = None
    """The address that browsers use, where that is not `listen`: behind a proxy that brings TLS. With https, cookies
    are sent over TLS only."""
    token: Token = None
    """What a person who may act logs in with."""
    viewer_token: Token = None
    """What a person who may only look logs in with."""
    session: SomeDuration = 12 * 3600.0
    """How long a login lasts."""
    read_only: bool = False
    """Nobody may act, whoever it is."""
    proxy: ConsoleProxySettings | None = None
    """A proxy in front, which knows who is there."""
    interval: SomeDuration = 2.0
    """How often pages that somebody looks at are renewed, and the database is asked, however many look; less often
    where asking takes longer than a tenth of that."""

    @model_validator(mode="after")
    def _tokens_that_differ(self) -> Self:
        if self.token is not None and self.token == self.viewer_token:
            raise ValueError("viewer_token: is the same as token, so that nobody would only look; make another one")
        return self


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
    sinks: dict[Name, SinkSettings] = Field(default_factory=dict)
    """Brokers, by name."""
    routes: list[RouteSettings] = Field(default_factory=list)
    """Which topics go to which sinks; every route that matches applies."""
    unrouted: Literal["dead_letter", "drop"] = "dead_letter"
    """What becomes of an event that no route takes."""
    workers: dict[Name, WorkerSettings] = Field(default_factory=dict)
    """Worker processes, by name. `workers.dsn` is where they find the database, with a login of their own; left out:
    `postgres.dsn`."""
    workers_login: SecretStr | None = None
    observe: ObserveSettings = ObserveSettings()
    """Logs, metrics and health."""
    console: ConsoleSettings = ConsoleSettings()
    """The web console, `pgbridge console`."""

    @model_validator(mode="before")
    @classmethod
    def _take_workers_login(cls, data: Any) -> Any:
        """``[workers] dsn`` stands among the workers, and is none."""
        if not isinstance(data, dict):
            return data
        if "workers_login" in data:
            raise ValueError("workers_login: unknown key; write dsn in the table [workers]")
        workers = data.get("workers")
        if not isinstance(workers, dict):
            return data
        workers = dict(workers)
        try:
            _read_secret_file(workers, "dsn")
        except ValueError as error:
            raise ValueError(f"workers.{error}") from None
        dsn = workers.pop("dsn", None)
        if not isinstance(dsn, str | None):
            raise ValueError("workers.dsn: is a libpq connection string; a worker cannot have this name")  # noqa: TRY004
        return {**data, "workers": workers, "workers_login": dsn}

    @property
    def workers_postgres(self) -> PostgresSettings:
        """The database, as the workers reach it."""
        if self.workers_login is None:
            return self.postgres
        return self.postgres.for_login(self.workers_login, "workers.dsn")

    @property
    def reads_outbox(self) -> bool:
        """Whether the log is read; if not, the database needs no schema of ours."""
        return self.outbox is not None or self.channels is None or self.channels.buffer == "outbox"

    @property
    def outbox_or_default(self) -> OutboxSettings:
        """How the log is read."""
        return self.outbox or OutboxSettings()

    @model_validator(mode="after")
    def _names_that_refer(self) -> Self:
        known = ", ".join(sorted(self.sinks)) or "none"
        for index, route in enumerate(self.routes):
            if route.sink not in self.sinks:
                raise ValueError(f"routes.{index}.sink: there is no sink named {route.sink!r}; known: {known}")
        for name, worker in self.workers.items():
            if worker.sink is not None and worker.sink not in self.sinks:
                raise ValueError(f"workers.{name}.sink: there is no sink named {worker.sink!r}; known: {known}")
        return self

    @model_validator(mode="after")
    def _prefetch_that_brokers_give(self) -> Self:
        for name, worker in self.workers.items():
            if worker.prefetch is None or (worker.sink is None and len(self.sinks) != 1):
                continue
            sink = self.sinks[self.sink_of(name)]
            if worker.prefetch > sink.most_prefetch:
                raise ValueError(
                    f"workers.{name}.prefetch: {worker.prefetch} is above {sink.most_prefetch}, the most that a sink "
                    f"of type {sink.type} gives one worker at once"
                )
        return self

    @model_validator(mode="after")
    def _beginnings_that_exist(self) -> Self:
        for name, worker in self.workers.items():
            sinks = [worker.sink] if worker.sink is not None else list(self.sinks)
            if worker.start == "beginning" and not any(self.sinks[sink].keeps_history for sink in sinks):
                kinds = ", ".join(sorted({self.sinks[sink].type for sink in sinks})) or "no sink"
                raise ValueError(
                    f'workers.{name}.start: "beginning" needs a broker that keeps what was published before, as NATS '
                    f"does, and {kinds} does not. Leave it out, and once the worker's queue is declared let "
                    "`pgbridge replay` publish what the log still holds"
                )
        return self

    def worker(self, name: str) -> WorkerSettings:
        """The settings of the worker that a command names. Raises UsageError for an unknown name."""
        if name not in self.workers:
            known = ", ".join(sorted(self.workers)) or "none"
            raise UsageError(f"there is no worker {name!r} in the settings; known: {known}")
        return self.workers[name]

    def sink_of(self, worker: str) -> str:
        """The name of the sink that a worker consumes from. Raises SettingsError where none is named."""
        named = self.workers[worker].sink
        if named is not None:
            return named
        if len(self.sinks) == 1:
            return next(iter(self.sinks))
        raise SettingsError(f"workers.{worker}.sink: name one of the sinks {', '.join(sorted(self.sinks)) or '(none)'}")
