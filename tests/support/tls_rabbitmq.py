"""A RabbitMQ that also listens for TLS."""

import socket
from pathlib import Path

from tests.support.certificates import Authority
from tests.support.servers import RabbitMQServer, free_port

BROKER_LIMIT = 3_000_000
"""`max_message_size` of the node, in bytes."""


class TlsRabbitMQServer(RabbitMQServer):
    """Its certificate is for 127.0.0.1, and trusted by whoever trusts `authority`. It takes no message beyond
    BROKER_LIMIT."""

    name = "rabbitmq-tls"

    def __init__(self, folder: Path, *, wants_certificates: bool = False) -> None:
        """`wants_certificates`: over TLS, from every client one that is signed by the authority."""
        super().__init__(folder)
        self.tls_port = free_port()
        self.authority = Authority.make(self.folder / "authority")
        self._certificate = self.authority.issue(self.folder)
        self._verify = "verify_peer" if wants_certificates else "verify_none"

    def show(self, *, expired: bool) -> None:
        """Changes its certificate for new connections."""
        self.authority.issue(self.folder, expired=expired)
        self.ctl("eval", "ssl:clear_pem_cache().")

    def _answers(self) -> str | None:
        # RabbitMQ opens this port after the other.
        try:
            socket.create_connection((self.host, self.tls_port), timeout=5).close()
        except OSError as error:
            return f"for TLS: {error}"
        return super()._answers()

    def _write_configuration(self) -> None:
        super()._write_configuration()
        with (self.folder / "rabbitmq.conf").open("a") as configuration:
            configuration.write(
                f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}\n"
                f"ssl_options.cacertfile = {self.authority.file}\n"
                f"ssl_options.certfile = {self._certificate.file}\n"
                f"ssl_options.keyfile = {self._certificate.key}\n"
                f"ssl_options.verify = {self._verify}\n"
                f"ssl_options.fail_if_no_peer_cert = {str(self._verify == 'verify_peer').lower()}\n"
                f"max_message_size = {BROKER_LIMIT}\n"
            )
