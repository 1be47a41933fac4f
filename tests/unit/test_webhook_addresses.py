"""The ways inside, each refused; what is outside, allowed; and `allow`."""

import asyncio
import ipaddress
import socket
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.webhooks.addresses import AddressRefused, AddressRule
from workers.webhooks.network import Lookups
from workers.webhooks.url import UrlRefused, parse

INSIDE = {
    "loopback": ("127.0.0.1", "loopback"),
    "loopback, another": ("127.8.8.8", "loopback"),
    "loopback, the last": ("127.255.255.255", "loopback"),
    "private 10": ("10.0.0.7", "private"),
    "private 172.16": ("172.16.0.1", "private"),
    "private 172.31": ("172.31.255.255", "private"),
    "private 192.168": ("192.168.1.1", "private"),
    "this host": ("0.0.0.0", "this host"),  # noqa: S104
    "this network": ("0.1.2.3", "this host"),
    "shared, carrier-grade NAT": ("100.64.0.1", "shared"),
    "shared, the last": ("100.127.255.255", "shared"),
    "link-local": ("169.254.1.1", "link-local"),
    "metadata of most clouds": ("169.254.169.254", "metadata"),
    "metadata of AWS containers": ("169.254.170.2", "metadata"),
    "metadata of AWS pods": ("169.254.170.23", "metadata"),
    "metadata of AWS in IPv6": ("fd00:ec2::254", "metadata"),
    "metadata of Google in IPv6": ("fd20:ce::254", "metadata"),
    "metadata of Alibaba": ("100.100.100.200", "metadata"),
    "metadata of Oracle": ("192.0.0.192", "metadata"),
    "Azure's host, at a public address": ("168.63.129.16", "metadata"),
    "IETF protocols": ("192.0.0.1", "IETF"),
    "IETF protocols, anycast": ("192.0.0.9", "IETF"),
    "documentation 192.0.2": ("192.0.2.1", "documentation"),
    "documentation 198.51.100": ("198.51.100.1", "documentation"),
    "documentation 203.0.113": ("203.0.113.1", "documentation"),
    "6to4 relays": ("192.88.99.1", "6to4"),
    "benchmarks": ("198.18.0.1", "benchmarks"),
    "benchmarks, the last": ("198.19.255.255", "benchmarks"),
    "multicast": ("224.0.0.1", "multicast"),
    "multicast, the last": ("239.255.255.255", "multicast"),
    "reserved": ("240.0.0.1", "reserved"),
    "broadcast": ("255.255.255.255", "broadcast"),
    "IPv6 loopback": ("::1", "loopback"),
    "IPv6 loopback, written out": ("0:0:0:0:0:0:0:1", "loopback"),
    "IPv6 unspecified": ("::", "unspecified"),
    "mapped loopback": ("::ffff:127.0.0.1", "loopback"),
    "mapped loopback in hexadecimal": ("::ffff:7f00:1", "loopback"),
    "mapped private": ("::ffff:10.0.0.7", "private"),
    "mapped metadata": ("::ffff:a9fe:a9fe", "metadata"),
    "mapped this host": ("::ffff:0.0.0.0", "this host"),
    "compatible loopback": ("::127.0.0.1", "IPv4-compatible"),
    "compatible private": ("::10.0.0.7", "IPv4-compatible"),
    "compatible public": ("::8.8.8.8", "IPv4-compatible"),
    "translated private": ("::ffff:0:10.0.0.7", "IPv4-translated"),
    "NAT64 of loopback": ("64:ff9b::127.0.0.1", "loopback"),
    "NAT64 of private": ("64:ff9b::a00:7", "private"),
    "NAT64 of metadata": ("64:ff9b::169.254.169.254", "metadata"),
    "NAT64 of multicast": ("64:ff9b::224.0.0.1", "multicast"),
    "NAT64 for local use": ("64:ff9b:1::10.0.0.7", "NAT64"),
    "NAT64 for local use, of public": ("64:ff9b:1::8.8.8.8", "NAT64"),
    "6to4 of private": ("2002:a00:7::1", "6to4"),
    "6to4 of loopback": ("2002:7f00:1::", "6to4"),
    "6to4 of public": ("2002:808:808::1", "6to4"),
    "Teredo with a private server": ("2001:0:a00:7::f7f7:f7f7", "Teredo"),
    "Teredo with a private client": ("2001:0:4136:e378:8000:63bf:f5ff:fff8", "Teredo"),
    "Teredo with public addresses": ("2001:0:808:808::f7f7:f7f7", "Teredo"),
    "ISATAP of private": ("2606:4700::5efe:10.0.0.7", "private"),
    "ISATAP of private, universal": ("2606:4700::200:5efe:10.0.0.7", "private"),
    "ISATAP of metadata": ("2606:4700::5efe:a9fe:a9fe", "metadata"),
    "ISATAP, link-local": ("fe80::5efe:8.8.8.8", "link-local"),
    "IPv6 link-local": ("fe80::1", "link-local"),
    "IPv6 link-local, zone": ("fe80::1%eth0", "link-local"),
    "IPv6 link-local, zone number": ("fe80::1%1", "link-local"),
    "IPv6 link-local, the last": ("febf:ffff::1", "link-local"),
    "IPv6 loopback, zone": ("::1%lo", "loopback"),
    "unique local": ("fd12:3456:789a::1", "unique local"),
    "unique local, not random": ("fc00::1", "unique local"),
    "site-local": ("fec0::1", "site-local"),
    "IPv6 multicast": ("ff02::1", "multicast"),
    "IPv6 multicast, global": ("ff0e::1", "multicast"),
    "IPv6 discards": ("100::1", "discards"),
    "IPv6 dummy": ("100:0:0:1::1", "dummy"),
    "IPv6 documentation": ("2001:db8::1", "documentation"),
    "IPv6 documentation, new": ("3fff::1", "documentation"),
    "IPv6 benchmarks": ("2001:2::1", "benchmarks"),
    "ORCHID": ("2001:10::1", "IETF"),
    "ORCHIDv2": ("2001:20::1", "IETF"),
    "IPv6 segments": ("5f00::1", "segment"),
    "IPv6 not assigned": ("4000::1", "outside"),
    "IPv6 not assigned, low": ("1::1", "outside"),
    "IPv6 not assigned, high": ("e000::1", "outside"),
}

OUTSIDE = {
    "public": "8.8.8.8",
    "public, first of all": "1.0.0.0",
    "before 10": "9.255.255.255",
    "after 10": "11.0.0.0",
    "before 100.64": "100.63.255.255",
    "after 100.127": "100.128.0.0",
    "before loopback": "126.255.255.255",
    "after loopback": "128.0.0.0",
    "after link-local": "169.255.0.0",
    "before 172.16": "172.15.255.255",
    "after 172.31": "172.32.0.0",
    "beside Azure's host": "168.63.129.17",
    "after 192.0.0": "192.0.1.0",
    "after 192.168": "192.169.0.0",
    "after benchmarks": "198.20.0.0",
    "before multicast": "223.255.255.255",
    "IPv6 public": "2606:4700:4700::1111",
    "IPv6 public, 2001": "2001:4860:4860::8888",
    "IPv6 public, 2a00": "2a00:1450:4001:81b::200e",
    "IPv6 after 6to4": "2003::1",
    "NAT64 of public": "64:ff9b::8.8.8.8",
    "ISATAP of public": "2606:4700::5efe:8.8.8.8",
}


def refusal(rule: AddressRule, *answers: str) -> AddressRefused:
    with pytest.raises(AddressRefused) as refused:
        rule.check("hooks.example.com", answers)
    return refused.value


@pytest.mark.parametrize(("address", "why"), INSIDE.values(), ids=INSIDE)
def test_an_address_that_leads_inside_is_refused_and_said_why(address: str, why: str) -> None:
    refused = refusal(AddressRule(), address)
    assert why in refused.why
    assert str(refused) == f"hooks.example.com is {address}, {refused.why}"


@pytest.mark.parametrize("address", OUTSIDE.values(), ids=OUTSIDE)
def test_an_address_on_the_internet_is_allowed(address: str) -> None:
    assert AddressRule().check("hooks.example.com", [address]) == [ipaddress.ip_address(address)]


def test_a_literal_is_named_once() -> None:
    with pytest.raises(AddressRefused, match=r"^10\.0\.0\.7 is a private address$"):
        AddressRule().check("10.0.0.7", ["10.0.0.7"])


def test_one_inside_among_many_refuses_the_name() -> None:
    rule = AddressRule()
    assert refusal(rule, "8.8.8.8", "2606:4700::1", "10.0.0.7").address == "10.0.0.7"
    assert refusal(rule, "::ffff:10.0.0.7", "8.8.8.8").address == "::ffff:10.0.0.7"
    assert len(rule.check("hooks.example.com", ["8.8.8.8", "2606:4700::1"])) == 2


@pytest.mark.parametrize(
    ("address", "connected"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("64:ff9b::10.1.2.3", "64:ff9b::a01:203"),
        ("fd12::1", "fd12::1"),
        ("8.8.8.8", "8.8.8.8"),
    ],
)
def test_allowed_networks_are_allowed_in_the_forms_judged_by_them(address: str, connected: str) -> None:
    rule = AddressRule([ip_network("10.1.0.0/16"), ip_network("fd12::/16")])
    assert [str(each) for each in rule.check("hooks.example.com", [address])] == [connected]


@pytest.mark.parametrize(
    "address",
    [
        *("10.2.0.1", "fd13::1", "127.0.0.1", "::ffff:10.2.0.1", "64:ff9b::10.2.0.1"),
        *("2002:a01:203::1", "::10.1.2.3", "::ffff:0:10.1.2.3", "fe80::5efe:10.1.2.3", "64:ff9b:1::10.1.2.3"),
    ],
)
def test_allowed_networks_allow_nothing_beside_them(address: str) -> None:
    refusal(AddressRule([ip_network("10.1.0.0/16"), ip_network("fd12::/16")]), address)
    refusal(AddressRule([ip_network("10.1.0.0/16"), ip_network("fd12::/16")]), "10.1.0.1", address)


def test_a_metadata_service_is_allowed_only_by_its_own_address() -> None:
    wide = AddressRule([ip_network("169.254.0.0/16"), ip_network("fd00::/8"), ip_network("100.64.0.0/10")])
    for address in ("169.254.169.254", "fd00:ec2::254", "100.100.100.200", "::ffff:169.254.169.254"):
        assert "metadata" in refusal(wide, address).why
        assert AddressRule([ip_network(address)] if "ffff" not in address else [ip_network("169.254.169.254")]).check(
            "hooks.example.com", [address]
        )
    assert wide.check("hooks.example.com", ["169.254.1.1", "fd00:ec2::1", "100.64.0.1"])


def test_with_only_allowed_the_internet_is_refused_too() -> None:
    rule = AddressRule([ip_network("10.1.0.0/16")])
    assert rule.check("h", ["10.1.0.1", "::ffff:10.1.0.1", "64:ff9b::10.1.0.1"], only_allowed=True)
    for address in ("8.8.8.8", "2606:4700::1", "64:ff9b::8.8.8.8"):
        with pytest.raises(AddressRefused, match="http is for these only"):
            rule.check("h", ["10.1.0.1", address], only_allowed=True)


def test_an_allowed_network_that_would_never_match_is_refused() -> None:
    with pytest.raises(ValueError, match="IPv4 network"):
        AddressRule([ip_network("::ffff:10.0.0.0/104")])


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6))
def test_whatever_python_knows_as_not_global_is_refused(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    inner = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    if not (inner or address).is_global or address.is_multicast or (address.is_reserved and address.version == 4):
        refusal(AddressRule(), str(address))


@given(st.ip_addresses(v=4))
def test_a_form_that_is_judged_by_its_ipv4_address_is_never_milder(address: ipaddress.IPv4Address) -> None:
    def passes(form: str) -> bool:
        try:
            return bool(AddressRule().check("h", [form]))
        except AddressRefused:
            return False

    assert passes(f"::ffff:{address}") == passes(f"64:ff9b::{address}") == passes(str(address))
    assert passes(f"2606:4700::5efe:{address}") == passes(str(address))
    for never in (f"::{address}", f"::ffff:0:{address}", f"64:ff9b:1::{address}", f"fe80::5efe:{address}"):
        assert not passes(never)


ODD = {
    "one number": "2130706433",
    "one hexadecimal number": "0x7f000001",
    "hexadecimal parts": "0x7f.1",
    "octal": "0177.0.0.1",
    "octal, one number": "017700000001",
    "two parts": "127.1",
    "three parts": "127.0.1",
    "leading zeros": "127.000.000.001",
    "zero": "0",
    "zeros": "00.0.0.0",
    "localhost": "localhost",
    "localhost in capitals": "LOCALHOST",
    "localhost, full stop": "localhost.",
    "below localhost": "a.localhost",
    "full stop": "127.0.0.1.",
    "full-width digits": "\uff11\uff12\uff17.0.0.1",
    "circled digits": "\u2460\u2461\u2466.0.0.1",
    "ideographic full stops": "127\u30020\u30020\u30021",
    "percent-encoded": "%31%32%37.0.0.1",
    "NUL": "127.0.0.1%00.example.com",
    "mapped in brackets": "[::ffff:127.0.0.1]",
    "zone in brackets": "[fe80::1%25lo]",
    "soft hyphen": "local\u00adhost",
}


@pytest.mark.parametrize("host", ODD.values(), ids=ODD)
async def test_odd_forms_of_inside_addresses_get_nowhere_by_the_real_resolver(host: str) -> None:
    """Also where the URL's own rules would let them through: the second line of defence."""
    lookups = Lookups()
    try:
        try:
            answers = await asyncio.wait_for(lookups(host.strip("[]"), 443), 20)
        except (socket.gaierror, UnicodeError):
            return  # it does not resolve
        refusal(AddressRule(), *answers)
    finally:
        lookups.close()


@pytest.mark.parametrize(
    "url",
    [
        *("https://", "https:///", "https://:443/", "//hooks.example.com/", "hooks.example.com", ""),
        *("ftp://hooks.example.com/", "file:///etc/passwd", "gopher://127.0.0.1:25/", "javascript:alert(1)"),
        *("https://user@hooks.example.com/", "https://user:secret@hooks.example.com/", "https://@hooks.example.com/"),
        *("https://8.8.8.8@127.0.0.1/", "https://127.0.0.1#@8.8.8.8/", "https://hooks.example.com/#fragment"),
        *("https://hooks.example.com\\@127.0.0.1/", "https:\\\\127.0.0.1\\", "https://hooks.example.com/a b"),
        *("https://hooks.example.com/\r\nHost: inside", "https://hooks.example.com/\n", "\thttps://hooks.example.com/"),
        *("https://hooks.example.com:0/", "https://hooks.example.com:65536/", "https://hooks.example.com:a/"),
        *("https://hooks.example.com:443:443/", "https://[::1", "https://::1/", "https://[::1]x/", "https://[]/"),
        *("https://[fe80::1%25eth0]/", "https://[fe80::1%eth0]/", "https://[127.0.0.1]/", "https://[v1.a]/"),
        *("https://127.1/", "https://0x7f.1/", "https://2130706433/", "https://0177.0.0.1/", "https://1.2.3.4.5/"),
        *("https://256.1.1.1/", "https://a.1/", "https://a.0x1/", "https://127.0.0.1../"),
        *("https://-a.example/", "https://a-.example/", "https://a..example/", "https://.example/", "https://./"),
        *(f"https://{'a' * 64}.example/", f"https://{'a.' * 127}example/", "https://a%2eexample/", "https://a,b/"),
        *("https://\uff11\uff12\uff17.0.0.1/", "https://b\u00fccher.example/", "https://hooks.example.com/\u00fc"),
    ],
)
def test_a_url_that_can_be_read_in_two_ways_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UrlRefused) as refused:
        parse(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "host", "port", "target", "authority"),
    [
        ("https://hooks.example.com", "hooks.example.com", 443, "/", "hooks.example.com"),
        ("HTTPS://Hooks.Example.COM./A?b=%20c", "hooks.example.com", 443, "/A?b=%20c", "hooks.example.com"),
        ("https://hooks.example.com?a=1", "hooks.example.com", 443, "/?a=1", "hooks.example.com"),
        ("https://hooks.example.com:443/", "hooks.example.com", 443, "/", "hooks.example.com"),
        ("https://hooks.example.com:80/", "hooks.example.com", 80, "/", "hooks.example.com:80"),
        ("http://a_b/@:x//y", "a_b", 80, "/@:x//y", "a_b"),
        ("https://8.8.8.8:22/", "8.8.8.8", 22, "/", "8.8.8.8:22"),
        ("https://8.8.8.8./", "8.8.8.8", 443, "/", "8.8.8.8"),
        ("https://[2606:4700:0::1]:8443/", "2606:4700::1", 8443, "/", "[2606:4700::1]:8443"),
        ("https://xn--bcher-kva.example/", "xn--bcher-kva.example", 443, "/", "xn--bcher-kva.example"),
        ("https://1.example/", "1.example", 443, "/", "1.example"),
    ],
)
def test_a_url_is_read_as_it_is_sent(url: str, host: str, port: int, target: str, authority: str) -> None:
    read = parse(url)
    assert (read.host, read.port, read.target, read.authority) == (host, port, target, authority)


@given(st.text() | st.from_regex(r"https?://[ -~]*", fullmatch=True))
def test_any_text_is_a_url_or_is_refused(text: str) -> None:
    try:
        read = parse(text)
    except UrlRefused:
        return
    assert read.host
    assert "@" not in read.authority
    assert read.target.startswith("/")
