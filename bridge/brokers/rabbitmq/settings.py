"""What can be set of RabbitMQ, and where its URL says that it is."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Self
from urllib.parse import unquote, urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from bridge.settings.models import PlainText, Secret, SinkSettings, SomeDuration, SomeSize, TlsSettings

EXAMPLE: Final = "amqp://localhost/shop"
"""A place, without a login."""

_PORTS: Final = {"amqp": 5672, "amqps": 5671}

_LONGEST_NAME: Final = 127
"""Most characters of an exchange's or a virtual host's name that an AMQP 0-9-1 method may carry."""

_LONGEST_HEARTBEAT: Final = 65_535
"""Seconds."""

_GUEST: Final = "guest"

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


def parse_url(url: str) -> tuple[Address, ...]:
    """Takes an ``amqp://`` or ``amqps://`` URL apart; this is the only place that does. An address for each host, of
    which several stand between commas.

    Raises ValueError, whose message never shows the URL, since it holds the password.
    """
    # Newer Pythons refuse the brackets of an IPv6 address among several hosts, so urlsplit() sees each host alone.
    scheme, _, after = url.partition("//")
    netloc = re.split("[/?#]", after, maxsplit=1)[0]
    try:
        parts = urlsplit(f"{scheme}//host{after.removeprefix(netloc)}")
        login, _, hosts = netloc.rpartition("@")
        places = [_place(host) for host in hosts.split(",")]
        who = urlsplit(f"//{login}@host")
    except ValueError:
        raise ValueError(
            "is not a URL, or its port is not a number; write amqp://user:password@host:5672/vhost, with commas "
            "between several hosts, and % and / in user or password as %25 and %2F"
        ) from None
    if parts.scheme not in _PORTS:
        raise ValueError("begins with neither amqp:// nor amqps://")
    if "," in login.partition("@")[2]:
        raise ValueError(
            "names several users; one stands before all hosts: amqp://user:password@host1,host2/vhost, with @ and , in "
            "user or password as %40 and %2C"
        )
    if not all(host for host, _ in places):
        raise ValueError("names no host; write amqp://user:password@host/vhost")
    if any(port == 0 for _, port in places):
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
    user, password = _login(who.username, who.password)
    tls = parts.scheme == "amqps"
    return tuple(
        Address(host, _PORTS[parts.scheme] if port is None else port, user, password, virtual_host, tls)
        for host, port in places
    )


def _place(text: str) -> tuple[str, int | None]:
    """Host and port of one host of a URL. Raises ValueError."""
    parts = urlsplit(f"//{text}")
    host = parts.hostname or ""
    host.encode("idna")
    return host, parts.port


def _login(user: str | None, password: str | None) -> tuple[str, str]:
    """Raises ValueError for a login that is not said: that of the account that every new RabbitMQ has is taken only
    from its own machine, so that a forgotten one would be a refused one elsewhere, and an open door here."""
    if user == _GUEST and password is None:
        password = _GUEST
    if not user or password is None:
        missing = "neither user nor password" if not user else "a user and no password"
        raise ValueError(
            f"has {missing}; write amqp://user:password@host/vhost, or {_GUEST}@host for the account that a new "
            "RabbitMQ has for its own machine"
        )
    return unquote(user), unquote(password)


class RabbitMQSettings(SinkSettings):
    url: Secret
    """amqp:// or amqps:// URL with user, password and virtual host. Several hosts of one cluster stand between commas,
    and are tried in that order: `amqps://user:password@mq1,mq2:5671/shop`."""
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
        if self.tls.given is not None and not self.login.tls:
            raise ValueError(
                f"tls.{self.tls.given}: is for amqps://, and the URL begins with amqp://, which encrypts nothing; "
                "write amqps:// and the port for TLS (usually 5671), or leave the certificates out"
            )
        return self

    @cached_property
    def addresses(self) -> tuple[Address, ...]:
        """The URL's parts, once for each of its hosts."""
        return parse_url(self.url.get_secret_value())

    @property
    def login(self) -> Address:
        """Who we are, and where: what is the same at each of the addresses; its host and port are the first one's."""
        return self.addresses[0]

    @property
    def destination(self) -> str:
        """See `SinkSettings.destination`."""
        return self.exchange

    def destination_of(self, topic: str) -> str:
        """See `SinkSettings.destination_of`."""
        return f"{self.exchange}:{topic}"

    @property
    def plain_text(self) -> Sequence[PlainText]:
        """See `SinkSettings.plain_text`."""
        if self.login.tls:
            return ()
        mend = "Write amqps://, and the port for TLS (usually 5671)"
        return [PlainText(address.host, "url", mend) for address in self.addresses]
