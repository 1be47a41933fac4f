"""A private node of an installed RabbitMQ (Debian: rabbitmq-server)."""

import os
import shutil
import socket
from pathlib import Path
from typing import Final

from bridge.demo.servers.process import LOOPBACK, MissingProgramError, Process, Server, free_port

SCRIPTS: Final = Path("/usr/lib/rabbitmq/bin")
"""Not /usr/sbin: Debian's wrappers there switch to the system's user `rabbitmq`."""


class RabbitMQServer(Server):
    """A node with its own name, Erlang port mapper, cookie, ports and data; the user is guest, the password guest."""

    name = "rabbitmq"

    def __init__(self, folder: Path) -> None:
        """Raises MissingProgramError when RabbitMQ is not installed."""
        super().__init__(folder)
        epmd = shutil.which("epmd")
        if epmd is None or not (SCRIPTS / "rabbitmq-server").exists():
            raise MissingProgramError("RabbitMQ is not installed: apt-get install rabbitmq-server")
        self._epmd_program = epmd
        self._epmd: Process | None = None
        self._epmd_port = free_port()
        self._distribution_port = free_port()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@{self.host}:{self.port}/"

    def stop(self) -> None:
        try:
            super().stop()
        finally:
            self._end_epmd()

    def kill(self) -> None:
        try:
            super().kill()
        finally:
            self._end_epmd()

    def _end_epmd(self) -> None:
        epmd, self._epmd = self._epmd, None
        if epmd is not None:
            epmd.kill()

    def _launch(self) -> Process:
        self._write_configuration()
        self._end_epmd()
        # Started by us, so that it ends with us; the node would start one that outlives it.
        self._epmd = Process(
            [self._epmd_program, "-address", LOOPBACK, "-port", str(self._epmd_port)],
            log=self.folder / "epmd.log",
            environment=self._environment(),
        )
        return Process([SCRIPTS / "rabbitmq-server"], log=self.log, environment=self._environment())

    def _write_configuration(self) -> None:
        lines = [
            f"listeners.tcp.1 = {self.host}:{self.port}",
            "log.console = true",
            "log.console.level = warning",
            "log.file = false",
            # The disk of a laptop or a CI machine may be nearly full, and RabbitMQ would block publishers.
            "disk_free_limit.absolute = 50MB",
        ]
        (self.folder / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
        (self.folder / "enabled_plugins").write_text("[].\n")

    def _environment(self) -> dict[str, str]:
        inherited = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TMPDIR") if name in os.environ}
        return {
            "LANG": "C.UTF-8",
            **inherited,
            "HOME": str(self.folder),
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": f"pgbridge{self.port}@localhost",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_NODE_IP_ADDRESS": LOOPBACK,
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "no-rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            # An Erlang VM that spins while idle takes a core from what is tested.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none "
            "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    def _answers(self) -> str | None:
        try:
            with socket.create_connection((self.host, self.port), timeout=5) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                # A method frame (type 1) on channel 0: Connection.Start.
                answer = connection.recv(7)
                return None if answer[:3] == b"\x01\x00\x00" else f"its answer is not Connection.Start: {answer!r}"
        except OSError as error:
            return str(error)
