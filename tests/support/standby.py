"""A streaming standby of a PostgresServer, which can be promoted."""

import os
from pathlib import Path

from bridge.errors import UnavailableError
from tests.support.servers import PostgresServer


class StandbyServer(PostgresServer):
    """A hot standby, made with pg_basebackup. The primary must run when it starts first."""

    name = "standby"

    def __init__(self, folder: Path, primary: PostgresServer) -> None:
        super().__init__(folder, settings=primary.settings)
        self._primary = primary

    def _initialise(self, programs: Path) -> None:
        primary = self._primary
        source = f"host={primary.host} port={primary.port} user=postgres"
        self._data.mkdir(mode=0o700)
        if self._user is not None:
            os.chown(self._data, *self._user)
        command: list[str | Path] = [programs / "pg_basebackup", "-d", source, "-D", self._data, "-R", "-c", "fast"]
        done = self._run_as_user(command)
        if done.returncode != 0:
            raise UnavailableError(f"pg_basebackup of {source} failed:\n{done.stdout}")

    def promote(self) -> None:
        """Makes it a primary; returns when it takes writes."""
        done = self._run_as_user([self._programs_for_user() / "pg_ctl", "promote", "-w", "-D", self._data])
        if done.returncode != 0:
            raise UnavailableError(f"promoting failed:\n{done.stdout}")
