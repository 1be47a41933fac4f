"""A RabbitMQ that also listens for TLS."""

from pathlib import Path

from tests.support.certificates import Certificate, self_signed
from tests.support.servers import RabbitMQServer, free_port

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
    def certificate(self) -> Certificate:
        return Certificate(self.folder / "certificate.pem", self.folder / "key.pem")

    def _write_configuration(self) -> None:
        super()._write_configuration()
        if not self.certificate.key.exists():
            self_signed(self.folder)
        with (self.folder / "rabbitmq.conf").open("a") as configuration:
            configuration.write(
                f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}\n"
                f"ssl_options.cacertfile = {self.certificate.file}\n"
                f"ssl_options.certfile = {self.certificate.file}\n"
                f"ssl_options.keyfile = {self.certificate.key}\n"
                f"ssl_options.verify = {self._verify}\n"
                f"ssl_options.fail_if_no_peer_cert = {str(self._verify == 'verify_peer').lower()}\n"
                f"max_message_size = {BROKER_LIMIT}\n"
            )
