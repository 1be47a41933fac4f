"""Certificates that sign themselves, for servers that tests start."""

import subprocess
from pathlib import Path


def self_signed(folder: Path, *, name: str = "IP:127.0.0.1") -> tuple[Path, Path]:
    """Writes ``certificate.pem`` for this subject alternative name and ``key.pem``, and gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", f"subjectAltName={name}", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key
