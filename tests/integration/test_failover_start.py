"""A start in the middle of a failover: whatever the servers say then passes, so it ends with 69, never with 78."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from bridge.postgres.schema import migrate
from tests.support.daemons import run_command
from tests.support.servers import NOT_DURABLE, PostgresServer, free_port
from tests.support.standby import StandbyServer
from tests.support.unwrapped import unwrapped

SETTINGS = """
name = "test"
[postgres]
dsn = "{dsn}"
connect_timeout = "2s"
[sinks.events]
type = "memory"
[[routes]]
topic = "#"
sink = "events"
[workers.refuser]
handler = "tests.support.worker_handlers:refuse"
"""

COMMANDS = {
    "run": ("run",),
    "check": ("check",),
    "migrate": ("migrate",),
    "status": ("status",),
    "tail": ("tail",),
    "emit": ("emit", "a.topic", "payload"),
    "replay": ("replay", "--from", "1h"),
    "dead list": ("dead", "list"),
    "dead replay": ("dead", "replay", "--all"),
    "worker": ("run", "refuser"),
}


class UnreadyServer(PostgresServer):
    """A server whose start counts as done once it says this to whoever connects."""

    says: str

    def _answers(self) -> str | None:
        said = super()._answers() or "takes connections"
        return None if self.says in said else said


class StartingServer(UnreadyServer):
    """A server that never gets to the end of its recovery: its archive does not answer."""

    name = "postgres-starting"
    says = "the database system is starting up"

    def _initialise(self, programs: Path) -> None:
        super()._initialise(programs)
        (self._data / "recovery.signal").touch()
        self.settings |= {"restore_command": "sleep 600"}


class ColdStandbyServer(UnreadyServer, StandbyServer):
    """A standby that takes no queries before it is promoted."""

    name = "cold-standby"
    says = "the database system is not accepting connections"

    def __init__(self, folder: Path, primary: PostgresServer) -> None:
        super().__init__(folder, primary)
        self.settings |= {"hot_standby": "off"}


@pytest.fixture(scope="module")
def primary(server_folder: Path) -> Iterator[PostgresServer]:
    with PostgresServer(server_folder / "failover-start", settings=NOT_DURABLE) as server:
        migrate(server.dsn())
        yield server


@contextlib.contextmanager
def shutting_down(folder: Path) -> Iterator[PostgresServer]:
    """A server that was asked to stop as soon as its last session ends, and has one."""
    with PostgresServer(folder, settings=NOT_DURABLE) as server, psycopg.connect(server.dsn()):
        os.kill(server.pid, signal.SIGTERM)
        yield server


@pytest.fixture(scope="module", params=["refused", "starting", "cold standby", "hot standby", "all", "shutting down"])
def place(request: pytest.FixtureRequest, primary: PostgresServer, server_folder: Path) -> Iterator[tuple[str, str]]:
    """A DSN in the middle of a failover, and what must be said of it."""
    folder = server_folder / f"failover-start-{request.param.replace(' ', '-')}"
    folder.mkdir()
    down = f"127.0.0.1:{free_port()}"
    match request.param:
        case "refused":
            yield f"postgresql://postgres@{down}/postgres", f"PostgreSQL at {down} does not answer: Connection refused"
        case "starting":
            with StartingServer(folder, settings=NOT_DURABLE) as server:
                yield server.dsn(), "is starting: the database system is starting up"
        case "cold standby":
            with ColdStandbyServer(folder, primary) as cold:
                yield cold.dsn(), "is recovering and takes no connections yet: the database system is not accepting"
        case "hot standby":
            with StandbyServer(folder, primary) as standby:
                yield standby.dsn(), "is a hot standby"
        case "all":
            with StandbyServer(folder, primary) as one:
                # The old primary is gone, and nobody is promoted yet.
                hosts = f"{down},{one.host}:{one.port}"
                yield f"postgresql://postgres@{hosts}/postgres", "is a hot standby"
        case "shutting down":
            with shutting_down(folder) as server:
                yield server.dsn(), "is shutting down: the database system is shutting down"


@pytest.mark.parametrize("command", COMMANDS)
def test_what_passes_by_itself_ends_with_69(place: tuple[str, str], tmp_path: Path, command: str) -> None:
    dsn, expected = place
    path = tmp_path / "bridge.toml"
    path.write_text(SETTINGS.format(dsn=dsn))
    module = "workers.cli" if command == "worker" else "bridge.cli"
    done = run_command(*COMMANDS[command], "--config", str(path), module=module)
    said = unwrapped(done.stdout) + done.stderr
    assert expected in said
    assert "postgres.dsn: " in said
    assert "Traceback" not in said
    assert done.returncode == 69, said
