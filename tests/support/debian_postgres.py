"""Debian's PostgreSQL (15 in Debian 12, 17 in Debian 13): another major version than the embedded one, from another
builder."""

from pathlib import Path
from typing import Final

from tests.support.servers import MissingProgramError, PostgresServer

INSTALLED: Final = Path("/usr/lib/postgresql")


def debian_programs() -> Path:
    """The folder of the newest version's programs. Raises MissingProgramError when none is installed."""
    versions = [int(path.parent.parent.name) for path in INSTALLED.glob("[0-9]*/bin/postgres")]
    if not versions:
        raise MissingProgramError("Debian's PostgreSQL is not installed: apt-get install postgresql")
    return INSTALLED / str(max(versions)) / "bin"


class DebianPostgresServer(PostgresServer):
    """PostgresServer on Debian's programs."""

    name = "debian-postgres"

    def _find_programs(self) -> Path:
        return debian_programs()
