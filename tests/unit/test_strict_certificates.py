"""What is said of certificates that are refused only because they are not as RFC 5280 wants them: Python 3.13 and newer
look at that, and older ones only when they are told to, as here."""

import ssl
from pathlib import Path

import pytest

from bridge.brokers.nats.connection import explained
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.rabbitmq.closure import connecting_failed
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from tests.support.certificates import Authority

SINK = {"sink": "mine"}


def refused(authority: Authority, folder: Path) -> ssl.SSLCertVerificationError:
    """How a client that trusts this authority takes a certificate of it, in a strict handshake without a network."""
    theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    theirs.load_cert_chain(*authority.issue(folder))
    ours = ssl.create_default_context(cafile=authority.file)
    ours.verify_flags |= ssl.VERIFY_X509_STRICT
    there, here = ssl.MemoryBIO(), ssl.MemoryBIO()
    client, server = ours.wrap_bio(here, there, server_hostname="127.0.0.1"), theirs.wrap_bio(there, here, True)
    for side in (client, server):
        with pytest.raises(ssl.SSLWantReadError):
            side.do_handshake()
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        client.do_handshake()
    return caught.value


def test_an_authority_that_does_not_say_what_it_is_for_is_told_from_an_unknown_one(tmp_path: Path) -> None:
    error = refused(Authority.make(tmp_path, says_what_for=False), tmp_path / "server")
    nats = NatsSettings.model_validate({"type": "nats", "url": "tls://127.0.0.1:1"}, context=SINK)
    rabbitmq = RabbitMQSettings.model_validate({"type": "rabbitmq", "url": "amqps://u:p@127.0.0.1:1"}, context=SINK)
    for told in (str(explained(error, nats)), str(connecting_failed(rabbitmq, error))):
        assert "tls.ca_file" in told
        assert "CA cert does not include key usage extension. " in told
        assert "keyUsage" in told
        assert "docs/versions.md" in told
        assert "Name the file" not in told
