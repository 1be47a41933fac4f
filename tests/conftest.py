"""Servers for tests. Each starts when the first test asks for it, and serves the whole session.

A server whose program is not installed skips its tests, with the reason; in CI (CI=true) it fails them. A test that
stops or kills a server starts its own in `server_folder`.
"""

import os
import resource
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest

from bridge.brokers.rabbitmq import topology
from bridge.postgres.schema import migrate
from tests.support.debian_postgres import DebianPostgresServer
from tests.support.servers import (
    NOT_DURABLE,
    MissingProgramError,
    NatsServer,
    PostgresServer,
    PubSubEmulator,
    RabbitMQServer,
    Server,
)

S = TypeVar("S", bound=Server)

# The same examples in every run, so that a change passes or fails for its own sake; and no deadline, which would test
# the machine. `HYPOTHESIS_PROFILE=search` looks for new examples, and for longer.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", max_examples=5000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Some tests open hundreds of connections from this process, and a shell's soft limit may be 1,024 for all it has.
_, _most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(_most, 65_536), _most))


def _serve(make: Callable[[], S]) -> Iterator[S]:
    try:
        server = make()
    except MissingProgramError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have every server: {error}")
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture(scope="session")
def server_folder() -> Iterator[Path]:
    """A folder for servers' data; every user may enter it, since as root PostgreSQL runs as another user."""
    folder = Path(tempfile.mkdtemp(prefix="pgbridge-tests-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres(server_folder: Path) -> Iterator[PostgresServer]:
    """PostgreSQL 18, or the one that POSTGRES_PROGRAMS names."""
    yield from _serve(lambda: PostgresServer(server_folder, settings=NOT_DURABLE))


@pytest.fixture(scope="session")
def debian_postgres(server_folder: Path) -> Iterator[PostgresServer]:
    """Debian's PostgreSQL."""
    yield from _serve(lambda: DebianPostgresServer(server_folder, settings=NOT_DURABLE))


@pytest.fixture(scope="session")
def rabbitmq(server_folder: Path) -> Iterator[RabbitMQServer]:
    """RabbitMQ, without the management plugin."""
    yield from _serve(lambda: RabbitMQServer(server_folder))


@pytest.fixture(autouse=True)
def _no_crash_of_rabbitmq_is_waited_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was declared need not outlive a crash of the broker in the next seconds, but in tests that crash one."""
    if request.node.get_closest_marker("crashes_rabbitmq") is None:
        monkeypatch.setattr(topology, "UNNAMED", 0.0)
        monkeypatch.setattr(topology, "UNSAVED", 0.0)


@pytest.fixture(scope="session")
def nats_server(server_folder: Path) -> Iterator[NatsServer]:
    """NATS with JetStream."""
    yield from _serve(lambda: NatsServer(server_folder))


@pytest.fixture(scope="session")
def pubsub_emulator(server_folder: Path) -> Iterator[PubSubEmulator]:
    """Google's Pub/Sub emulator."""
    yield from _serve(lambda: PubSubEmulator(server_folder))


def _program(name: str) -> Path:
    found = shutil.which(name)
    if found is not None:
        return Path(found)
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must have {name}: deploy/install-test-servers installs Debian's package prometheus")
    pytest.skip(f"{name} is not installed; Debian has it in the package prometheus")


@pytest.fixture(scope="session")
def promtool() -> Path:
    """Prometheus' tool for rules and metrics."""
    return _program("promtool")


@pytest.fixture(scope="session")
def prometheus() -> Path:
    """The program of Prometheus, which its test starts."""
    return _program("prometheus")


@pytest.fixture
def unique() -> str:
    """A short name that no other test uses: of a database, a queue, a stream, a folder."""
    return f"t{secrets.token_hex(5)}"


@pytest.fixture
def database(postgres: PostgresServer, unique: str) -> Iterator[str]:
    """The DSN, as superuser, of an empty database of this test's own on `postgres`."""
    yield postgres.create_database(unique)
    postgres.drop_database(unique)


@pytest.fixture(scope="session")
def _migrated(postgres: PostgresServer) -> str:
    """The name of a database where the migrations are applied: the template of `bridge_database`."""
    migrate(postgres.create_database("migrated"))
    return "migrated"


@pytest.fixture
def bridge_database(postgres: PostgresServer, unique: str, _migrated: str) -> Iterator[str]:
    """The DSN, as superuser, of a database of this test's own with the schema `bridge`, on `postgres`."""
    yield postgres.copy_database(unique, _migrated)
    postgres.drop_database(unique)


@pytest.fixture
def debian_database(debian_postgres: PostgresServer, unique: str) -> Iterator[str]:
    """The same as `database` on Debian's PostgreSQL."""
    yield debian_postgres.create_database(unique)
    debian_postgres.drop_database(unique)
