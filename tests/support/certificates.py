"""Certificates for the servers that tests start, and for those that connect to them."""

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key


class Certificate(NamedTuple):
    """The files of a certificate and of its key."""

    file: Path
    key: Path


def self_signed(folder: Path, *, name: str = "IP:127.0.0.1") -> Certificate:
    """Writes ``certificate.pem``, its own authority, for this subject alternative name, and ``key.pem``."""
    made = _in(folder)
    _openssl(
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
        *("-addext", f"subjectAltName={name}", "-keyout", made.key, "-out", made.file),
    )
    return made


def expired(folder: Path, *, name: str = "IP:127.0.0.1") -> Certificate:
    """The same, but it was valid until yesterday."""
    made = self_signed(folder, name=name)
    given = x509.load_pem_x509_certificate(made.file.read_bytes())
    builder = x509.CertificateBuilder(given.issuer, given.subject, given.public_key(), given.serial_number)
    for extension in given.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    now = datetime.now(UTC)
    builder = builder.not_valid_before(now - timedelta(days=2)).not_valid_after(now - timedelta(days=1))
    # OpenSSL's command makes none that has expired.
    key = load_pem_private_key(made.key.read_bytes(), None)
    again = builder.sign(key, SHA256())  # type: ignore[arg-type] # it is an RSA key
    made.file.write_bytes(again.public_bytes(Encoding.PEM))
    return made


def signed_by(authority: Certificate, folder: Path) -> Certificate:
    """Writes ``certificate.pem`` of a client, signed by the authority, and ``key.pem``."""
    made, request = _in(folder), folder / "request.pem"
    _openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=client", "-keyout", made.key, "-out", request)
    _openssl(
        *("x509", "-req", "-days", "2", "-in", request, "-out", made.file),
        *("-CA", authority.file, "-CAkey", authority.key, "-CAcreateserial"),
    )
    return made


def _in(folder: Path) -> Certificate:
    folder.mkdir(parents=True, exist_ok=True)
    return Certificate(folder / "certificate.pem", folder / "key.pem")


def _openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
