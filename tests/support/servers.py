"""The demo's servers with what tests do to them besides: freeze them, alarm them, configure them otherwise."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, LiteralString

import psycopg
from psycopg import sql

from bridge.demo import servers
from bridge.demo.servers import MissingProgramError, free_port, guard
from bridge.demo.servers.nats import MAX_PAYLOAD
from bridge.demo.servers.rabbitmq import SCRIPTS
from bridge.errors import UnavailableError

__all__ = [
    "MAX_PAYLOAD",
    "NOT_DURABLE",
    "MissingProgramError",
    "NatsServer",
    "PostgresServer",
    "PubSubEmulator",
    "RabbitMQServer",
    "Server",
    "free_port",
]

NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
"""Faster, and enough here: only a crash of the machine could tell. A test that kills a server starts a durable one."""

PROGRAMS_VARIABLE: Final = "POSTGRES_PROGRAMS"
"""The environment variable that names the folder of another PostgreSQL's programs, for the tests of older versions."""

DEFAULT_WATERMARK = "0.4"
"""RabbitMQ's own default: the part of the memory beyond which it blocks publishers."""


class Server(servers.Server):
    """A server that can also be frozen."""

    def restart(self) -> None:
        """Stops it cleanly and starts it again."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Stops all its processes where they are (SIGSTOP): connections stay open and nothing answers."""
        guard.freeze_tree(self.pid)

    def thaw(self) -> None:
        """Lets them go on (SIGCONT)."""
        guard.send(guard.tree(self.pid), signal.SIGCONT)

    def thaw_for(self, seconds: float) -> None:
        """Lets them go on until they have used so much processor time, which other programs may keep them from for a
        while, or have had ten times as long for it; the caller freezes them again."""
        used = self._processor_seconds()
        self.thaw()
        end = time.monotonic() + 10 * seconds
        while self._processor_seconds() < used + seconds and time.monotonic() < end:
            time.sleep(0.01)

    def _processor_seconds(self) -> float:
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in guard.tree(self.pid)]
        return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        if self.running:
            self.thaw()
        super().stop()


class PostgresServer(Server, servers.PostgresServer):
    """Takes prepared transactions, and whatever settings a test gives."""

    def __init__(self, folder: Path, *, settings: Mapping[str, str] | None = None) -> None:
        """`settings` go to postgresql.conf, over the demo's, at every start."""
        super().__init__(folder)
        self.settings |= {"max_prepared_transactions": "50"} | dict(settings or {})
        if self.settings.get("fsync") == "off":
            self.initdb_options = (*self.initdb_options, "--no-sync")

    @property
    def major(self) -> int:
        """The major version of its programs."""
        printed = subprocess.run([self._bin_dir / "postgres", "--version"], capture_output=True, text=True, check=True)
        return int(printed.stdout.split()[2].partition(".")[0])

    def program(self, name: str) -> Path:
        """One of its client programs, such as pg_dump. Raises MissingProgramError where it has none."""
        path = self._bin_dir / name
        if not path.exists():
            raise MissingProgramError(f"there is no {name} beside the server's programs in {self._bin_dir}")
        return path

    def _find_programs(self) -> Path:
        chosen = os.environ.get(PROGRAMS_VARIABLE)
        return Path(chosen) if chosen else super()._find_programs()

    def copy_database(self, name: str, template: str) -> str:
        """Creates a database like another, and returns its DSN. Nobody may be connected to the other meanwhile."""
        self._execute("CREATE DATABASE {} TEMPLATE {}", name, template)
        return self.dsn(name)

    def drop_database(self, name: str) -> None:
        """Drops a database if it exists, and ends the sessions in it."""
        self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)

    def _execute(self, statement: LiteralString, *names: str) -> None:
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


class RabbitMQServer(Server, servers.RabbitMQServer):
    """Can be commanded by rabbitmqctl."""

    @property
    def environment(self) -> dict[str, str]:
        """With which rabbitmqctl reaches this node."""
        return self._environment()

    def ctl(self, *arguments: str) -> str:
        """Runs rabbitmqctl against this node and returns what it prints. Raises UnavailableError when it fails."""
        done = subprocess.run(
            [str(SCRIPTS / "rabbitmqctl"), *arguments],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise UnavailableError(f"rabbitmqctl {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def alarm(self, on: bool) -> None:
        """Raises or clears the memory alarm, which blocks every connection that publishes."""
        self.ctl("set_vm_memory_high_watermark", "0" if on else DEFAULT_WATERMARK)


class NatsServer(Server, servers.NatsServer):
    """May have logins, TLS and accounts, and may be without JetStream."""

    def __init__(self, folder: Path, *, jetstream: bool = True, lines: Sequence[str] = ()) -> None:
        """`lines` are added to the configuration; each begins with its keyword."""
        super().__init__(folder)
        self._jetstream = jetstream
        self._lines = lines

    def _configuration(self) -> dict[str, str]:
        configuration = super()._configuration()
        if not self._jetstream:
            del configuration["jetstream"]
        return configuration | {keyword: rest for keyword, _, rest in (line.partition(" ") for line in self._lines)}

    def _answers(self) -> str | None:
        if self._jetstream and not self._lines:
            return super()._answers()
        # To a stranger, or without TLS, it says no more than its greeting.
        try:
            with socket.create_connection((self.host, self.port), timeout=2) as connection:
                greeting = connection.makefile("rb").readline()
        except OSError as error:
            return str(error)
        return None if greeting.startswith(b"INFO ") else f"its greeting is not that of NATS: {greeting[:200]!r}"


class PubSubEmulator(Server, servers.PubSubEmulator):
    """Where PUBSUB_EMULATOR_HOST names a running emulator, that one is used, and it cannot be frozen."""
