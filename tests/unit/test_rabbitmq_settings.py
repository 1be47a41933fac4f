"""RabbitMQ's settings as every process loads them: a mistake names its key and never shows the password."""

from pathlib import Path

import pytest

from bridge.brokers.rabbitmq.settings import Address, RabbitMQSettings
from bridge.brokers.tls import tls_context
from bridge.errors import SettingsError
from bridge.settings import TlsSettings, load

FILE = """
name = "shop"
[sinks.events]
type = "rabbitmq"
{lines}
[[routes]]
topic = "#"
sink = "events"
"""


def rabbitmq(folder: Path, lines: str) -> RabbitMQSettings:
    path = folder / "bridge.toml"
    path.write_text(FILE.format(lines=lines))
    settings = load(path, {}).sinks["events"]
    assert isinstance(settings, RabbitMQSettings)
    return settings


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "begins with neither amqp:// nor amqps://"),
        ("http://user:hunter2@host/", "begins with neither amqp:// nor amqps://"),
        ("amqp://user:hunter2@/vhost", "names no host"),
        ("amqp://user:hunter2@host:port/", "its port is not a number"),
        ("amqp://user:hunter2@host:99999/", "its port is not a number"),
        ("amqp://user:hunter2@host:0/", "has port 0"),
        ("amqp://user:hunter2@a..b/", "is not a URL"),
        ("amqp://user:hunter2@[::1/", "is not a URL"),
        ("amqp://user:hunt/er2@host/", "%2F"),
        ("amqp://user:hunter2@host/a/b", "write %2F for a slash"),
        ("amqp://user:hunter2@host/?heartbeat=5", "settings of their own"),
        ("amqp://user:hunter2@host/#x", "%23"),
        (f"amqp://user:hunter2@host/{'v' * 128}", "a virtual host of 128 characters"),
        ("amqp://user:hunter2@a,b:port/", "its port is not a number"),
        ("amqp://user:hunter2@a,,b/", "names no host"),
        ("amqp://user:hunter2@a:0,b/", "has port 0"),
        ("amqp://user:hunter2@a,user:hunter2@b/", "one stands before all hosts"),
        ("amqp://user:hunter2@a/,amqp://user:hunter2@b/", "more than one / in its virtual host"),
        ("amqp://host/", "has neither user nor password"),
        ("amqp://user@host/", "has a user and no password; write amqp://user:password@host"),
        ("amqp://:hunter2@host/", "has neither user nor password"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_when_the_settings_are_loaded(tmp_path: Path, url: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        rabbitmq(tmp_path, f'url = "{url}"')
    said = str(caught.value)
    assert "  sinks.events.url: " in said
    assert says in said
    assert "hunt" not in said


def test_a_url_in_a_secret_file_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("amqp://user:hunter2@host:port/\n")
    with pytest.raises(SettingsError, match=r"sinks\.events\.url: is not a URL") as caught:
        rabbitmq(tmp_path, f'url_file = "{tmp_path / "url"}"')
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("amqp://guest@mq.internal", Address("mq.internal", 5672, "guest", "guest", "/", False)),
        ("amqps://bridge:a%2Fb%40@mq.internal/", Address("mq.internal", 5671, "bridge", "a/b@", "/", True)),
        ("amqp://u:p@127.0.0.1:1234/shop%2Fone", Address("127.0.0.1", 1234, "u", "p", "shop/one", False)),
        ("amqp://u:p@[::1]/", Address("::1", 5672, "u", "p", "/", False)),
    ],
)
def test_a_url_is_taken_apart(tmp_path: Path, url: str, address: Address) -> None:
    settings = rabbitmq(tmp_path, f'url = "{url}"')
    assert settings.addresses == (address,)
    assert settings.addresses is settings.addresses
    assert address.password not in repr(address) or address.password in ("guest", "p")


def test_several_hosts_share_everything_but_their_ports(tmp_path: Path) -> None:
    settings = rabbitmq(tmp_path, 'url = "amqps://u:a%2Cb@mq1,mq2:5670,[::1]/shop"')
    assert [str(address) for address in settings.addresses] == ["mq1:5671", "mq2:5670", "[::1]:5671"]
    assert {(each.user, each.password, each.virtual_host, each.tls) for each in settings.addresses} == {
        ("u", "a,b", "shop", True)
    }


def test_an_address_is_written_with_its_port() -> None:
    assert str(Address("mq", 1, "u", "p", "/", False)) == "mq:1"
    assert str(Address("::1", 1, "u", "p", "/", False)) == "[::1]:1"


@pytest.mark.parametrize("exchange", ["", "e" * 128, "schön", "a*b", "a\\nb"])
def test_an_exchange_that_amqp_cannot_name_is_refused(tmp_path: Path, exchange: str) -> None:
    with pytest.raises(SettingsError, match=r"sinks\.events\.exchange: "):
        rabbitmq(tmp_path, f'url = "amqp://guest@host"\nexchange = "{exchange}"')


@pytest.mark.parametrize("exchange", ["events", "amq.topic", "a b-c_d.e:f@g#h,i/j+k", "e" * 127])
def test_every_name_that_amqp_allows_is_taken(tmp_path: Path, exchange: str) -> None:
    assert rabbitmq(tmp_path, f'url = "amqp://guest@host"\nexchange = "{exchange}"').exchange == exchange


def test_certificates_that_cannot_be_used_name_key_and_file(tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing.pem", tmp_path / "empty.pem"
    empty.touch()
    settings = rabbitmq(tmp_path, 'url = "amqps://u:p@host"')
    for tls, key, file in (
        (TlsSettings(ca_file=missing), "sinks.events.tls.ca_file: ", missing),
        (TlsSettings(ca_file=empty), "sinks.events.tls.ca_file: ", empty),
        (TlsSettings(cert_file=missing), "sinks.events.tls.cert_file: ", missing),
        (TlsSettings(cert_file=empty, key_file=missing), "sinks.events.tls.cert_file: ", missing),
    ):
        with pytest.raises(SettingsError) as caught:
            tls_context(tls, settings.key)
        assert str(caught.value).startswith(key)
        assert str(file) in str(caught.value)


def test_a_key_without_its_certificate_is_a_mistake_in_the_settings(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"sinks\.events\.tls\.key_file: is given without cert_file"):
        rabbitmq(tmp_path, 'url = "amqps://u:p@host"\ntls.key_file = "/key.pem"')


@pytest.mark.parametrize("lines", ['tls.ca_file = "/ca.pem"', 'tls = {cert_file = "/c.pem", key_file = "/k.pem"}'])
def test_certificates_for_a_connection_without_tls_are_a_mistake_in_the_settings(tmp_path: Path, lines: str) -> None:
    """They would protect nothing, and look as if they did."""
    said = r"sinks\.events\.tls\.(ca|cert)_file: is for amqps://.* write amqps://"
    with pytest.raises(SettingsError, match=said) as caught:
        rabbitmq(tmp_path, f'url = "amqp://user:hunter2@host"\n{lines}')
    assert "hunter2" not in str(caught.value)
    assert caught.value.exit_code == 78
    rabbitmq(tmp_path, f'url = "amqps://user:hunter2@host"\n{lines}')
