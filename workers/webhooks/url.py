"""URLs of endpoints: read once, so that what is checked is what is connected to."""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from workers.webhooks.addresses import Address

_PORTS: Final = {"https": 443, "http": 80}
_LONGEST_NAME: Final = 253
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
"""A last label like this makes the whole an IPv4 address for browsers, and for the C library: 0x7f.1 is 127.0.0.1."""


class UrlRefused(ValueError):  # noqa: N818 - what happened, as in AddressRefused
    """A URL that nothing is sent to. Shows no more of it than the host: the rest often holds a secret."""


@dataclass(frozen=True, slots=True)
class Url:
    """What a URL says. `host` is a name in lower case, with no full stop at its end, or an address without brackets."""

    scheme: str
    host: str
    port: int
    target: str
    """Path and query, as the request has them."""
    address: Address | None
    """The host, where it is an address."""

    @property
    def authority(self) -> str:
        """The header Host."""
        return self.bracketed if self.port == _PORTS[self.scheme] else f"{self.bracketed}:{self.port}"

    @property
    def bracketed(self) -> str:
        """The host as a URL has it."""
        return bracketed(self.host)


def bracketed(host: str) -> str:
    """A name or an address as a URL has it."""
    return f"[{host}]" if ":" in host else host


def parse(url: str) -> Url:
    """Raises UrlRefused for all but https and http URLs with a host, without a user and a fragment."""
    if not re.fullmatch(r"[!-~]+", url) or "\\" in url:
        raise UrlRefused("a URL has printable ASCII characters only, and no backslash: write others as %XX or xn--")
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    if scheme not in _PORTS:
        raise UrlRefused("the URL does not begin with https://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    target = rest[len(authority) :]
    if "@" in authority:
        raise UrlRefused("a URL with a user or password is not called")
    if "#" in target:
        raise UrlRefused("a URL with a fragment (#) is not called")
    if not target.startswith("/"):
        target = f"/{target}"
    found = re.fullmatch(r"(\[(?P<v6>[^\]]*)\]|(?P<name>[^:]*))(:(?P<port>[0-9]{1,5}))?", authority)
    if found is None:
        raise UrlRefused("the URL's host and port cannot be read")
    port = int(found["port"] or _PORTS[scheme])
    if not 0 < port < 65_536:
        raise UrlRefused(f"{port} is not a port")
    address: Address | None
    if found["v6"] is not None:
        address = _ipv6(found["v6"])
        host = str(address)
    else:
        host = found["name"].lower().removesuffix(".")
        address = _ipv4(host)
    return Url(scheme, host, port, target, address)


def _ipv6(text: str) -> IPv6Address:
    try:
        address = IPv6Address(text)
    except ValueError:
        raise UrlRefused(f"[{text}] is not an IPv6 address") from None
    if address.scope_id is not None:
        raise UrlRefused(f"[{text}] is an address of one network card only")
    return address


def _ipv4(host: str) -> IPv4Address | None:
    """The address that it is. None for a name. Raises UrlRefused for what is neither."""
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return IPv4Address(host)
        except ValueError:
            raise UrlRefused(f"{host} is not an IPv4 address of four decimal numbers") from None
    if len(host) > _LONGEST_NAME or not all(map(_LABEL.fullmatch, labels)):
        raise UrlRefused(f"{host!r} is not the name of a host")
    return None
