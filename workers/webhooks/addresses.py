"""Which addresses a webhook may be sent to: globally routable unicast, and what the operator allows.

Whoever registers an endpoint also answers for its name, and may answer with an address of the network that we are in.
So the rule looks at addresses, when they are connected to, and through every form that carries an IPv4 address.

- An IPv4-mapped address (``::ffff:10.0.0.7``) is the IPv4 address: the kernel connects to that one.
- NAT64's well-known prefix (``64:ff9b::/96``) and ISATAP are judged by the IPv4 address as well. In a network with
  IPv6 only, the rest of the world has NAT64 addresses, so those of public addresses must pass.
- 6to4, Teredo and IPv4-compatible addresses are refused whatever they carry: they are out of use, and where they lead
  is for whoever relays them to say.
- `allow` holds for an address in any of the forms that are judged by it. A cloud's metadata service hands out
  credentials, so it is allowed only by a network of that one address: who allows 100.64.0.0/10 does not think of
  Alibaba's.
- A name with one refused address is refused, whatever its others are: it is an attack or a mistake.
"""

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class AddressRefused(Exception):  # noqa: N818 - what happened, as in Reject and Retry
    """An address that must not be connected to. `host` is what the URL has, `why` a noun: "a private address"."""

    def __init__(self, host: str, address: str, why: str) -> None:
        super().__init__(f"{address} is {why}" if host == address else f"{host} is {address}, {why}")
        self.host = host
        self.address = address
        self.why = why


class AddressRule:
    """Globally routable unicast, and the networks of `allow`."""

    def __init__(self, allow: Sequence[Network] = ()) -> None:
        for network in allow:
            if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED):
                raise ValueError(f"{network} holds IPv4-mapped addresses: give it as an IPv4 network")
        self._allow = tuple(allow)

    def check(self, host: str, answers: Iterable[str], *, only_allowed: bool = False) -> list[Address]:
        """The addresses to connect to, given what the host resolves to: IPv4-mapped ones as IPv4 addresses.

        With `only_allowed`, only those of `allow`. Raises AddressRefused for the first that may not be connected to.
        """
        checked = []
        for answer in answers:
            address = _unmapped(ip_address(answer))
            why = self._why_not(address)
            if why is None and only_allowed and not self._allows(address):
                why = "not among the addresses that are allowed, and http is for these only"
            if why is not None:
                raise AddressRefused(host, answer, why)
            checked.append(address)
        return checked

    def _allows(self, address: Address) -> bool:
        return self._names(address) or (address in _NAT64 and self._names(_last_32(address)))

    def _names(self, address: Address) -> bool:
        return any(
            address in network and (address not in _METADATA or network.num_addresses == 1) for network in self._allow
        )

    def _why_not(self, address: Address) -> str | None:
        if self._names(address):
            return None
        if address in _METADATA:
            return "the address of a cloud's metadata service"
        inner = _judged_by(address)
        if inner is not None and (why := self._why_not(inner)) is not None:
            return f"a form of {inner}, {why}"
        for network, why in _REFUSED:
            if address in network:
                return why + _carried(address)
        if isinstance(address, IPv6Address) and address not in _UNICAST and address not in _NAT64:
            return "outside of what is assigned for the internet"
        return None


def _unmapped(address: Address) -> Address:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _judged_by(address: Address) -> IPv4Address | None:
    """The IPv4 address that decides about this IPv6 address, too."""
    if isinstance(address, IPv4Address):
        return None
    isatap = (int(address) >> 32) & 0xFFFF_FFFF in _ISATAP
    return _last_32(address) if isatap or address in _NAT64 else None


def _last_32(address: Address) -> IPv4Address:
    return IPv4Address(int(address) & 0xFFFF_FFFF)


def _carried(address: Address) -> str:
    """The IPv4 addresses inside of a form that is refused anyhow, for whoever reads the message."""
    if isinstance(address, IPv4Address):
        return ""
    if address.teredo is not None:
        return " with {} and {} inside".format(*address.teredo)
    if address.sixtofour is not None:
        return f" with {address.sixtofour} inside"
    return f" with {_last_32(address)} inside" if address in _LAST_32 else ""


_UNICAST: Final = IPv6Network("2000::/3")
"""All that IANA has assigned for global unicast."""

_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_NAT64: Final = IPv6Network("64:ff9b::/96")
_LAST_32: Final = IPv6Network("::/64")
"""Where IPv4-compatible and IPv4-translated addresses are."""

_ISATAP: Final = (0x0000_5EFE, 0x0200_5EFE)
"""How the second half of an ISATAP address begins (RFC 5214)."""

_METADATA: Final = frozenset(
    ip_address(each)
    for each in (
        "169.254.169.254",  # AWS, Google, Azure, and most others
        "169.254.170.2",  # AWS, containers
        "169.254.170.23",  # AWS, pods
        "fd00:ec2::254",  # AWS
        "fd00:ec2::23",  # AWS, pods
        "fd20:ce::254",  # Google
        "168.63.129.16",  # Azure's host, at a public address
        "100.100.100.200",  # Alibaba
        "192.0.0.192",  # Oracle
    )
)

_REFUSED: Final[tuple[tuple[Network, str], ...]] = tuple(
    (ip_network(network), why)
    # IANA's special-purpose address registries for IPv4 and IPv6, and its registry of multicast addresses. Where the
    # registries have small parts of a range that are reachable (192.0.0.9, 2001:20::/28), no web server is there.
    for network, why in (
        ("0.0.0.0/8", "an address of this host"),
        ("10.0.0.0/8", "a private address"),
        ("100.64.0.0/10", "a shared address of a provider's network"),
        ("127.0.0.0/8", "a loopback address"),
        ("169.254.0.0/16", "a link-local address"),
        ("172.16.0.0/12", "a private address"),
        ("192.0.0.0/24", "an address of an IETF protocol"),
        ("192.0.2.0/24", "an address for documentation"),
        ("192.88.99.0/24", "an address of 6to4 relays"),
        ("192.168.0.0/16", "a private address"),
        ("198.18.0.0/15", "an address for benchmarks"),
        ("198.51.100.0/24", "an address for documentation"),
        ("203.0.113.0/24", "an address for documentation"),
        ("224.0.0.0/4", "a multicast address"),
        ("255.255.255.255/32", "the broadcast address"),
        ("240.0.0.0/4", "a reserved address"),
        ("::/128", "the unspecified address"),
        ("::1/128", "the loopback address"),
        ("::/96", "an IPv4-compatible address"),
        ("::ffff:0:0:0/96", "an IPv4-translated address"),
        ("64:ff9b:1::/48", "a NAT64 address for local use"),
        ("100::/64", "an address that discards everything"),
        ("100:0:0:1::/64", "a dummy address"),
        ("2001::/32", "a Teredo address"),
        ("2001:2::/48", "an address for benchmarks"),
        ("2001:db8::/32", "an address for documentation"),
        ("2001::/23", "an address of an IETF protocol"),
        ("2002::/16", "a 6to4 address"),
        ("3fff::/20", "an address for documentation"),
        ("5f00::/16", "a segment identifier"),
        ("fc00::/7", "a private address (unique local)"),
        ("fe80::/10", "a link-local address"),
        ("fec0::/10", "a private address (site-local)"),
        ("ff00::/8", "a multicast address"),
    )
)
