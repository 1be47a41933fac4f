"""PostgreSQL servers that ask who comes: for a password, or with a certificate of their own."""

import os
from pathlib import Path

from tests.support.certificates import self_signed
from tests.support.postgres15 import Postgres15Server
from tests.support.servers import PostgresServer


class PasswordServer(PostgresServer):
    """Asks every role but `postgres` for its password, and has no entry for the role `stranger`."""

    name = "postgres-password"

    def _initialise(self, programs: Path) -> None:
        super()._initialise(programs)
        (self._data / "pg_hba.conf").write_text(
            "host all postgres 127.0.0.1/32 trust\n"
            "host all stranger 127.0.0.1/32 reject\n"
            "host all all 127.0.0.1/32 scram-sha-256\n"
        )


class TlsPostgresServer(Postgres15Server):
    """Speaks TLS with a certificate for `db.test` that signs itself. The embedded server is built without TLS."""

    name = "postgres-tls"

    @property
    def certificate(self) -> Path:
        return self.folder / "certificate.pem"

    def _initialise(self, programs: Path) -> None:
        super()._initialise(programs)
        _, key = self_signed(self.folder, name="DNS:db.test")
        if self._user is not None:
            os.chown(key, *self._user)
        key.chmod(0o600)
        self.settings |= {"ssl": "on", "ssl_cert_file": str(self.certificate), "ssl_key_file": str(key)}
