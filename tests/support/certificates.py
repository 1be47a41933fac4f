"""Certificates for the servers that tests start, and for those that connect to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_AUTHORITY: Final = x509.BasicConstraints(ca=True, path_length=None)
_SIGNING: Final = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=True,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)
"""RFC 5280 wants it of every authority, and Python asks for that from 3.13 on."""


class Certificate(NamedTuple):
    """The files of a certificate and of its key."""

    file: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """Signs certificates of servers and clients. `file` is what they trust who trust it."""

    file: Path
    _certificate: x509.Certificate
    _key: RSAPrivateKey

    @classmethod
    def make(cls, folder: Path, name: str = "authority", *, says_what_for: bool = True) -> "Authority":
        """Writes ``certificate.pem``, which says that its key signs certificates, or leaves that out."""
        key, subject = _new_key(), _named(name)
        usage = [_SIGNING] if says_what_for else []
        certificate = _signed(subject, key, subject, key, [_AUTHORITY, *usage])
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "certificate.pem"
        file.write_bytes(certificate.public_bytes(Encoding.PEM))
        return cls(file, certificate, key)

    def issue(self, folder: Path, *, name: str = "IP:127.0.0.1", expired: bool = False) -> Certificate:
        """Writes ``certificate.pem``, for these subject alternative names with commas, and ``key.pem``. An expired one
        was valid until yesterday."""
        key = _new_key()
        names = x509.SubjectAlternativeName(_alternatives(name))
        made = _signed(_named("localhost"), key, self._certificate.subject, self._key, [names], expired=expired)
        return _write(folder, made, key)


def self_signed(folder: Path, *, name: str = "IP:127.0.0.1", expired: bool = False) -> Certificate:
    """Writes ``certificate.pem``, its own authority, for this subject alternative name, and ``key.pem``."""
    key, subject = _new_key(), _named("localhost")
    what_it_is = [_AUTHORITY, _SIGNING, x509.SubjectAlternativeName(_alternatives(name))]
    return _write(folder, _signed(subject, key, subject, key, what_it_is, expired=expired), key)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternatives(names: str) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for each in names.split(","):
        kind, _, value = each.partition(":")
        found.append(x509.IPAddress(ip_address(value)) if kind == "IP" else x509.DNSName(value))
    return found


def _new_key() -> RSAPrivateKey:
    return generate_private_key(public_exponent=65_537, key_size=2048)


def _signed(
    subject: x509.Name,
    key: RSAPrivateKey,
    issuer: x509.Name,
    issuers_key: RSAPrivateKey,
    extensions: Sequence[x509.ExtensionType],
    *,
    expired: bool = False,
) -> x509.Certificate:
    end = datetime.now(UTC) + timedelta(days=-1 if expired else 2)
    serial = x509.random_serial_number()
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), serial)
    builder = builder.not_valid_before(end - timedelta(days=4)).not_valid_after(end)
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    signers = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuers_key.public_key())
    for extension in (*extensions, own, signers):
        builder = builder.add_extension(
            extension, critical=isinstance(extension, x509.BasicConstraints | x509.KeyUsage)
        )
    return builder.sign(issuers_key, SHA256())


def _write(folder: Path, certificate: x509.Certificate, key: RSAPrivateKey) -> Certificate:
    folder.mkdir(parents=True, exist_ok=True)
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    made.file.write_bytes(certificate.public_bytes(Encoding.PEM))
    made.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return made
