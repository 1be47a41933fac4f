"""Debian's PostgreSQL 15: an older major version than the embedded one, from another builder."""

from pathlib import Path

from tests.support.servers import MissingProgramError, PostgresServer

BIN_DIR = Path("/usr/lib/postgresql/15/bin")


class Postgres15Server(PostgresServer):
    """PostgresServer on Debian's programs."""

    name = "postgres15"

    def _find_programs(self) -> Path:
        """Raises MissingProgramError when the Debian package is not installed."""
        if not BIN_DIR.exists():
            raise MissingProgramError("PostgreSQL 15 is not installed: apt-get install postgresql-15 (Debian 12)")
        return BIN_DIR
