"""What can be set of RabbitMQ, and where its URL says that it is."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Self
from urllib.parse import unquote, urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from bridge.settings.models import PlainText, Secret, SinkSettings, SomeDuration, SomeSize, TlsSettings

_PORTS: Final = {"amqp": 5672, "amqps": 5671}

_LONGEST_NAME: Final = 127
"""Most characters of an exchange's or a virtual host's name that an AMQP 0-9-1 method may carry."""

_LONGEST_HEARTBEAT: Final = 65_535
"""Seconds."""

_EXCHANGE: Final = re.compile(r"[a-zA-Z0-9_.:@#,/+ -]+")
"""What AMQP 0-9-1 allows in an exchange's name."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where RabbitMQ is, whether it speaks TLS there, and who we are."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    virtual_host: str
    tls: bool

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_url(url: str) -> Address:
    """Takes an ``amqp://`` or ``amqps://`` URL apart; this is the only place that does.

    Raises ValueError, whose message never shows the URL, since it holds the password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError:
        raise ValueError(
            "is not a URL, or its port is not a number; write amqp://user:password@host:5672/vhost, "
            "and % and / in user or password as %25 and %2F"
        ) from None
    if parts.scheme not in _PORTS:
        raise ValueError("begins with neither amqp:// nor amqps://")
    if not parts.hostname:
        raise ValueError("names no host; write amqp://user:password@host/vhost")
    if port == 0:
        raise ValueError("has port 0; leave the port out, or write one from 1 to 65535")
    if parts.query or parts.fragment:
        raise ValueError(
            "has a part after ? or #; heartbeat and certificates are settings of their own (heartbeat, tls), "
            "and ? and # in user or password are written %3F and %23"
        )
    if "/" in parts.path[1:]:
        raise ValueError("has more than one / in its virtual host; write %2F for a slash in a name")
    virtual_host = unquote(parts.path[1:]) or "/"
    if len(virtual_host) > _LONGEST_NAME:
        raise ValueError(f"has a virtual host of {len(virtual_host)} characters; AMQP takes {_LONGEST_NAME}")
    return Address(
        host=parts.hostname,
        port=port or _PORTS[parts.scheme],
        user=unquote(parts.username or "guest"),
        password=unquote(parts.password if parts.password is not None else "guest"),
        virtual_host=virtual_host,
        tls=parts.scheme == "amqps",
    )


class RabbitMQSettings(SinkSettings):
    url: Secret
    """amqp:// or amqps:// URL with user, password and virtual host."""
    exchange: str = Field("events", min_length=1, max_length=_LONGEST_NAME)
    """Topic exchange to publish to; the routing key is the event's topic."""
    max_message_bytes: SomeSize = 16_777_216
    """Largest payload the broker takes: `max_message_size` of RabbitMQ (16 MiB since 4.0, 128 MiB before)."""
    heartbeat: SomeDuration = 30.0
    """AMQP heartbeat; a peer silent for twice as long is dead."""
    tls: TlsSettings = TlsSettings()
    """Certificates for amqps://."""

    @field_validator("url")
    @classmethod
    def _url_can_be_parsed(cls, url: SecretStr) -> SecretStr:
        parse_url(url.get_secret_value())
        return url

    @field_validator("exchange")
    @classmethod
    def _exchange_has_a_name_of_amqp(cls, exchange: str) -> str:
        if not _EXCHANGE.fullmatch(exchange):
            raise ValueError("may hold letters, digits, spaces and -_.:@#,/+ only")
        return exchange

    @field_validator("heartbeat")
    @classmethod
    def _heartbeat_that_amqp_can_say(cls, heartbeat: float) -> float:
        if heartbeat > _LONGEST_HEARTBEAT:
            raise ValueError(f"is longer than {_LONGEST_HEARTBEAT} s, which is as far as AMQP counts")
        return heartbeat

    @model_validator(mode="after")
    def _certificates_that_are_used(self) -> Self:
        if self.tls.given is not None and not self.address.tls:
            raise ValueError(
                f"tls.{self.tls.given}: is for amqps://, and the URL begins with amqp://, which encrypts nothing; "
                "write amqps:// and the port for TLS (usually 5671), or leave the certificates out"
            )
        return self

    @cached_property
    def address(self) -> Address:
        """The URL's parts."""
        return parse_url(self.url.get_secret_value())

    @property
    def plain_text(self) -> Sequence[PlainText]:
        """See `SinkSettings.plain_text`."""
        if self.address.tls:
            return ()
        return (PlainText(self.address.host, "url", "Write amqps://, and the port for TLS (usually 5671)"),)
