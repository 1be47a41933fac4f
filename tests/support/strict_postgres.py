"""PostgreSQL servers that ask who comes: for a password, or with a certificate of their own."""

import os
from collections.abc import Mapping
from pathlib import Path

from tests.support.certificates import Authority
from tests.support.debian_postgres import DebianPostgresServer
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


class TlsPostgresServer(DebianPostgresServer):
    """Speaks TLS with a certificate of `authority` for `db.test`, and wants one of the role `certified`. The embedded
    server is built without TLS."""

    name = "postgres-tls"

    def __init__(self, folder: Path, *, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(folder, settings=settings)
        self.authority = Authority.make(self.folder / "authority")
        self.issue()

    def issue(self, *, expired: bool = False) -> None:
        """Gives it a new certificate, for its next start."""
        certificate, key = self.authority.issue(self.folder, name="DNS:db.test", expired=expired)
        if self._user is not None:
            os.chown(key, *self._user)
        key.chmod(0o600)
        self.settings |= {
            "ssl": "on",
            "ssl_ca_file": str(self.authority.file),
            "ssl_cert_file": str(certificate),
            "ssl_key_file": str(key),
        }

    def _initialise(self, programs: Path) -> None:
        super()._initialise(programs)
        (self._data / "pg_hba.conf").write_text(
            "hostssl all certified 127.0.0.1/32 trust clientcert=verify-ca\nhost all all 127.0.0.1/32 trust\n"
        )
