"""PgBouncer before a PostgreSQL server of the tests."""

import os
import pwd
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import psycopg
from psycopg.conninfo import make_conninfo

from bridge.demo.servers.process import Process
from tests.support.servers import MissingProgramError, PostgresServer, Server

PROGRAM_VARIABLE: Final = "PGBOUNCER"
"""The environment variable that names another program than Debian's, for the tests of newer versions."""

_DEBIANS: Final = "/usr/sbin/pgbouncer"


class PgBouncer(Server):
    """With its default settings but for the mode: it takes no start parameter that it does not know, and discards the
    state of a server connection (DISCARD ALL) before another client gets it, in session mode."""

    name = "pgbouncer"
    # At once, and it has nothing to lose: since 1.23 it waits for its clients after SIGTERM, and SIGQUIT is ignored in
    # what a shell started with `&`, such as a run of all tests.
    stop_signal = signal.SIGKILL

    def __init__(
        self,
        folder: Path,
        postgres: PostgresServer,
        mode: Literal["session", "transaction"],
        *,
        lines: Sequence[str] = (),
    ) -> None:
        """Every database of `postgres` is behind it; `lines` are added to its settings.

        Raises MissingProgramError where it is not installed.
        """
        super().__init__(folder / mode)
        self._program = Path(os.environ.get(PROGRAM_VARIABLE, _DEBIANS))
        if not self._program.exists():
            raise MissingProgramError(f"{self._program} is missing: apt-get install pgbouncer")
        self._postgres = postgres
        self._mode = mode
        self._lines = lines

    def before(self, dsn: str) -> str:
        """The DSN that leads to the same database through this pooler."""
        return make_conninfo(dsn, host=self.host, port=self.port)

    def _launch(self) -> Process:
        # It refuses to run as root.
        entry = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        users, settings = self.folder / "users", self.folder / "pgbouncer.ini"
        users.write_text('"postgres" ""\n')
        settings.write_text(
            "\n".join(
                (
                    f"[databases]\n* = host={self._postgres.host} port={self._postgres.port}\n[pgbouncer]",
                    f"listen_addr = {self.host}\nlisten_port = {self.port}\nunix_socket_dir =",
                    f"auth_type = trust\nauth_file = {users}\npool_mode = {self._mode}",
                    *self._lines,
                    "",
                )
            )
        )
        user = (entry.pw_uid, entry.pw_gid) if entry else None
        return Process([self._program, settings], log=self.log, user=user)

    def _answers(self) -> str | None:
        try:
            psycopg.connect(self.before(self._postgres.dsn()), connect_timeout=2).close()
        except psycopg.OperationalError as error:
            return str(error).strip()
        return None
