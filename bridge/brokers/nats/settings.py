"""What can be set of NATS, and what its URL says."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Final, Self
from urllib.parse import unquote, urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator

from bridge.brokers.nats.login import SignedLogin, credentials_login, nkey_login
from bridge.settings.models import PlainText, Secret, SinkSettings, SomeSize, TlsSettings

EXAMPLE: Final = "nats://localhost:4222"
"""A place, without a login."""

_SIGNED_LOGINS: Final = {"nkey": nkey_login, "credentials": credentials_login}
"""The settings that hold one, and how it is read."""

_PORT: Final = 4222
_FORM: Final = "write nats://user:password@host:4222, or several with commas"
_ESCAPES: Final = "write @ : / ? # % and , in a user or password as %40 %3A %2F %3F %23 %25 and %2C"


@dataclass(frozen=True, slots=True)
class Servers:
    """What a URL says: the servers of one cluster, and who we are there."""

    addresses: tuple[str, ...]
    """``host:port`` each; an IPv6 address is in brackets."""
    encrypted: bool
    """Whether one of them was given as ``tls://``."""
    user: str | None
    password: str | None = field(repr=False)
    token: str | None = field(repr=False)
    """A user without a password is a token."""

    def __str__(self) -> str:
        return ", ".join(self.addresses)


class NatsSettings(SinkSettings):
    keeps_history: ClassVar[bool] = True
    url: Secret
    """nats:// or tls:// URL, or several with commas."""
    nkey: Secret = SecretStr("")
    """Seed of a user's NKey (SU...), whose public half the server knows; `nkey_file` names a file that holds it."""
    credentials: Secret = SecretStr("")
    """A user's JWT and seed; `credentials_file` names the file that `nsc generate creds` writes."""
    stream: str = Field("events", pattern=r"^[A-Za-z0-9_-]{1,255}$")
    """JetStream stream to publish to; the subject is the event's topic."""
    max_message_bytes: SomeSize = 8_388_608
    """Largest message that the server takes (`max_payload`)."""
    tls: TlsSettings = TlsSettings()
    """Certificates. Once one is given, the server must speak TLS, as with tls://."""

    most_prefetch: ClassVar[int] = 10_000
    """What JetStream gives all processes of a worker together before they settle some of it."""

    @field_validator("url")
    @classmethod
    def _that_names_servers(cls, url: SecretStr) -> SecretStr:
        parse_url(url.get_secret_value())
        return url

    @field_validator(*_SIGNED_LOGINS)
    @classmethod
    def _that_signs(cls, secret: SecretStr, info: ValidationInfo) -> SecretStr:
        if secret.get_secret_value():
            _SIGNED_LOGINS[str(info.field_name)](secret.get_secret_value())
        return secret

    @model_validator(mode="after")
    def _one_login(self) -> Self:
        given = [name for name in _SIGNED_LOGINS if getattr(self, name).get_secret_value()]
        if self.servers.user is not None or self.servers.token is not None:
            given.append("a user in the url")
        if len(given) > 1:
            raise ValueError(f"{given[0]}: is given beside {given[1]}; a connection has one login, keep one of them")
        return self

    @property
    def signed_login(self) -> SignedLogin | None:
        """Who we are, where that is shown by a signature."""
        for name, login in _SIGNED_LOGINS.items():
            if secret := getattr(self, name).get_secret_value():
                return login(secret)
        return None

    @property
    def encrypted(self) -> bool:
        """Whether nothing may be sent in plain text: the URL says tls://, or certificates are given."""
        return self.servers.encrypted or self.tls.given is not None

    @cached_property
    def servers(self) -> Servers:
        """What the URL says, parsed."""
        return parse_url(self.url.get_secret_value())

    @property
    def destination(self) -> str:
        """See `SinkSettings.destination`."""
        return self.stream

    @property
    def plain_text(self) -> Sequence[PlainText]:
        """See `SinkSettings.plain_text`."""
        if self.encrypted:
            return ()
        mend = "Write tls://, and give the server certificates"
        return [PlainText(address.rpartition(":")[0], "url", mend) for address in self.servers.addresses]


def parse_url(url: str) -> Servers:
    """Takes a URL apart. Raises ValueError, whose words hold no part of the URL: it may be a part of the password."""
    addresses, logins, encrypted = [], set(), False
    for given in url.split(","):
        text = given.strip()
        if "//" not in text and "@" in text:
            raise ValueError(f"has a user without nats:// or tls:// before it; {_FORM}. {_ESCAPES}")
        try:
            parts = urlsplit(text if "//" in text else f"nats://{text}")
            host, port = parts.hostname, parts.port or _PORT
        except ValueError:
            raise ValueError(f"is not a URL, or its port is not a number; {_FORM}. {_ESCAPES}") from None
        if parts.scheme not in ("nats", "tls"):
            raise ValueError(f"begins with neither nats:// nor tls://; {_FORM}")
        if not host:
            raise ValueError(f"names no host; {_FORM}")
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ValueError(f"has a part behind the host and port; {_FORM}. {_ESCAPES}")
        addresses.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        encrypted = encrypted or parts.scheme == "tls"
        if parts.username is not None:
            logins.add((unquote(parts.username), None if parts.password is None else unquote(parts.password)))
    if len(logins) > 1:
        raise ValueError("has several users or passwords; the servers of one cluster all take the same")
    user, password = logins.pop() if logins else (None, None)
    token = user if password is None else None
    return Servers(tuple(addresses), encrypted, None if password is None else user, password, token)
