"""A RabbitMQ that also listens for TLS."""

import subprocess
from pathlib import Path

from bridge.demo.servers import RabbitMQServer, free_port

BROKER_LIMIT = 3_000_000
"""`max_message_size` of the node, in bytes."""


class TlsRabbitMQServer(RabbitMQServer):
    """Its certificate signs itself and is for 127.0.0.1. It takes no message beyond BROKER_LIMIT."""

    name = "rabbitmq-tls"

    def __init__(self, folder: Path, *, wants_certificates: bool = False) -> None:
        """`wants_certificates`: over TLS, from every client one that is signed by `certificate`."""
        super().__init__(folder)
        self.tls_port = free_port()
        self._verify = "verify_peer" if wants_certificates else "verify_none"

    @property
    def certificate(self) -> Path:
        return self.folder / "certificate.pem"

    @property
    def key(self) -> Path:
        return self.folder / "key.pem"

    def _write_configuration(self) -> None:
        super()._write_configuration()
        if not self.key.exists():
            sign_itself(self.certificate, self.key, "subjectAltName=IP:127.0.0.1")
        with (self.folder / "rabbitmq.conf").open("a") as configuration:
            configuration.write(
                f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}\n"
                f"ssl_options.cacertfile = {self.certificate}\n"
                f"ssl_options.certfile = {self.certificate}\n"
                f"ssl_options.keyfile = {self.key}\n"
                f"ssl_options.verify = {self._verify}\n"
                f"ssl_options.fail_if_no_peer_cert = {str(self._verify == 'verify_peer').lower()}\n"
                f"max_message_size = {BROKER_LIMIT}\n"
            )


def sign_itself(certificate: Path, key: Path, extension: str = "subjectAltName=DNS:localhost") -> None:
    """Writes a certificate that is its own authority, and its key."""
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    files = ["-addext", extension, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*words, *files], check=True, capture_output=True)


def sign_client(authority: TlsRabbitMQServer, certificate: Path, key: Path) -> None:
    """Writes a client's certificate that the server's own has signed, and its key."""
    request = certificate.with_suffix(".csr")
    words = ["openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=client", "-keyout", str(key)]
    subprocess.run([*words, "-out", str(request)], check=True, capture_output=True)
    words = ["openssl", "x509", "-req", "-days", "2", "-in", str(request), "-out", str(certificate)]
    signer = ["-CA", str(authority.certificate), "-CAkey", str(authority.key), "-CAcreateserial"]
    subprocess.run([*words, *signer], check=True, capture_output=True)
