"""What a mistake gives: one message that names the key and what to do, an exit code, no stack trace."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from bridge.postgres.schema import migrate
from tests.support.daemons import run_command
from tests.support.servers import NOT_DURABLE, MissingProgramError
from tests.support.strict_postgres import PasswordServer, TlsPostgresServer
from tests.support.unwrapped import unwrapped

BASE = """
name = "test"
[postgres]
dsn = "{dsn}"
[sinks.events]
type = "memory"
[[routes]]
topic = "#"
sink = "events"
"""

Told = Callable[[str], tuple[int, str]]


@pytest.fixture
def told(tmp_path: Path) -> Told:
    """Runs the bridge with these settings; its exit code and what it said."""

    def run(settings: str) -> tuple[int, str]:
        path = tmp_path / "bridge.toml"
        path.write_text(settings)
        done = run_command("run", "--config", str(path))
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize(
    ("change", "into", "expected"),
    [
        ('type = "memory"', 'type = "memory"\nfoo = 1', "sinks.events.foo: unknown key"),
        ('name = "test"', 'name = "test"\nnmae = 1', "nmae: unknown key; did you mean name?"),
        ('name = "test"', 'name = "test"\nrelay = {events_in_flight = "x"}', "relay.events_in_flight: "),
        ('name = "test"', 'name = "test"\noutbox = {retention = "7 weeks"}', "outbox.retention: is not a duration"),
        ('dsn = "{dsn}"', 'dsn_file = "/does/not/exist"', "postgres.dsn_file: the secret file '/does/not/exist'"),
        ('dsn = "{dsn}"', 'dsn = "postgres//u:hunter2@h"', "postgres.dsn: is not a libpq connection string"),
        ('sink = "events"', 'sink = "evnts"', "routes.0.sink: there is no sink named 'evnts'; known: events"),
        ('type = "memory"', 'type = "kafka"', "sinks.events.type: there is no broker of type 'kafka'; installed: "),
        ('name = "test"', "name = ", "is not TOML"),
    ],
)
def test_wrong_settings_name_their_key_and_end_with_78(told: Told, change: str, into: str, expected: str) -> None:
    code, said = told(BASE.replace(change, into))
    assert code == 78
    assert expected in said
    assert "hunter2" not in said


def test_every_mistake_is_told_at_once(told: Told) -> None:
    code, said = told(BASE.replace('type = "memory"', 'type = "memory"\nfoo = 1') + "[outbox]\npage_size = 0\n")
    assert code == 78
    assert "sinks.events.foo" in said
    assert "outbox.page_size" in said


def test_an_unreachable_broker_ends_with_69(told: Told, bridge_database: str) -> None:
    sink = 'type = "rabbitmq"\nurl = "amqp://guest:hunter2@127.0.0.1:1/"'
    code, said = told(BASE.format(dsn=bridge_database).replace('type = "memory"', sink))
    assert code == 69
    assert "sinks.events.url: RabbitMQ at 127.0.0.1:1 does not answer" in said
    assert "hunter2" not in said


@pytest.fixture(scope="module")
def asking(server_folder: Path) -> Iterator[PasswordServer]:
    """A server that asks for passwords, with the schema in its database `postgres`."""
    with PasswordServer(server_folder, settings=NOT_DURABLE) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute("create role known login password 'right'")
            admin.execute("create database empty")
        migrate(server.dsn())
        yield server


AT = "host=127.0.0.1 port={port} dbname=postgres"
REFUSED = "PostgreSQL at 127.0.0.1:{port} refuses the login: "
MISTAKES = {
    "a wrong password": (
        f"{AT} user=known password=hunter2",
        f'{REFUSED}password authentication failed for user "known". Correct user and password in the DSN',
    ),
    "a missing database": (
        "postgresql://postgres@127.0.0.1:{port}/gone",
        'PostgreSQL at 127.0.0.1:{port} does not have this database: database "gone" does not exist. Create it, or ',
    ),
    "a server that is down": (
        "postgresql://postgres:hunter2@127.0.0.1:1/postgres",
        "PostgreSQL at 127.0.0.1:1 does not answer: Connection refused",
    ),
    "a missing schema": ("postgresql://postgres@127.0.0.1:{port}/empty", "pgbridge migrate"),
    "a missing privilege": (f"{AT} user=known password=right", "permission denied for "),
}

COMMANDS = {
    "run": ("run",),
    "check": ("check",),
    "migrate": ("migrate",),
    "migrate --dry-run": ("migrate", "--dry-run"),
    "status": ("status",),
    "tail": ("tail",),
    "emit": ("emit", "a.topic", "payload"),
    "replay": ("replay", "--from", "1h"),
    "dead list": ("dead", "list"),
    "dead show": ("dead", "show", "outbox:1"),
    "dead replay": ("dead", "replay", "--all"),
    "worker": ("run", "refuser"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("command", COMMANDS)
def test_one_mistake_has_one_answer_in_every_command(
    asking: PasswordServer, tmp_path: Path, mistake: str, command: str
) -> None:
    if command.startswith("migrate") and mistake == "a missing schema":
        pytest.skip("migrate is what installs it")
    dsn, expected = MISTAKES[mistake]
    path = tmp_path / "bridge.toml"
    handler = '[workers.refuser]\nhandler = "tests.support.worker_handlers:refuse"\n'
    path.write_text(BASE.format(dsn=dsn.format(port=asking.port)) + handler)
    module = "workers.cli" if command == "worker" else "bridge.cli"
    done = run_command(*COMMANDS[command], "--config", str(path), module=module)
    said = unwrapped(done.stdout) + done.stderr
    assert done.returncode == 69, said
    assert "Traceback" not in said
    assert "hunter2" not in said
    (line,) = [line for line in said.splitlines() if expected.format(port=asking.port) in line]
    assert "postgres.dsn: " in line


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("user=known", "PostgreSQL at 127.0.0.1:{port} asks for a password, and none is given. Put it into the DSN"),
        ("user=stranger", f"{REFUSED}pg_hba.conf rejects connection for host"),
    ],
)
def test_a_refused_login_says_why(told: Told, asking: PasswordServer, parameters: str, expected: str) -> None:
    code, said = told(BASE.format(dsn=f"{AT} {parameters}".format(port=asking.port)))
    assert code == 69
    assert f"postgres.dsn: {expected}".format(port=asking.port) in said


def test_a_missing_schema_points_to_migrate(told: Told, database: str) -> None:
    code, said = told(BASE.format(dsn=database))
    assert code == 69
    assert "postgres.dsn: the schema bridge is not installed in this database; run: pgbridge migrate" in said


def test_a_missing_privilege_points_to_the_role(told: Told, bridge_database: str, unique: str) -> None:
    with psycopg.connect(bridge_database, autocommit=True) as connection:
        connection.execute(psycopg.sql.SQL("create role {} login").format(psycopg.sql.Identifier(unique)))
    try:
        dsn = conninfo.make_conninfo(bridge_database, user=unique)
        code, said = told(BASE.format(dsn=dsn))
    finally:
        with psycopg.connect(bridge_database, autocommit=True) as connection:
            connection.execute(psycopg.sql.SQL("drop role {}").format(psycopg.sql.Identifier(unique)))
    assert code == 69
    assert "postgres.dsn: permission denied" in said
    assert "roles.sql" in said


def test_a_read_only_role_is_told_apart(told: Told, bridge_database: str) -> None:
    name = conninfo.conninfo_to_dict(bridge_database)["dbname"]
    with psycopg.connect(bridge_database, autocommit=True) as connection:
        connection.execute(
            psycopg.sql.SQL("alter database {} set default_transaction_read_only = on").format(
                psycopg.sql.Identifier(str(name))
            )
        )
    code, said = told(BASE.format(dsn=bridge_database))
    assert code == 69
    assert "postgres.dsn: sessions of the role" in said
    assert "read-only" in said


@pytest.fixture(scope="module")
def tls_server(server_folder: Path) -> Iterator[TlsPostgresServer]:
    try:
        server = TlsPostgresServer(server_folder, settings=NOT_DURABLE)
    except MissingProgramError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have every server: {error}")
        pytest.skip(str(error))
    with server:
        yield server


@pytest.mark.parametrize(
    ("parameters", "exit_code", "expected"),
    [
        ("sslmode=verify-full sslrootcert={certificate}", 69, "shows the certificate of another host"),
        ("sslmode=verify-full sslrootcert=system", 69, "shows a certificate that is not trusted"),
        ("sslmode=verify-full sslrootcert=/does/not/exist", 78, 'root certificate file "/does/not/exist" does not'),
        ("sslmode=strict", 78, 'holds a parameter that is not right: invalid sslmode value: "strict"'),
        ("sslmode=require target_session_attrs=read-only", 78, "remove target_session_attrs"),
        ("port=5432,5433", 78, "could not match 2 port numbers to 1 hosts"),
        ("options='-c nothing=1'", 78, 'unrecognized configuration parameter "nothing"'),
        ("host=a..b", 78, "a host in it is not a host name"),
        ("host=does-not-exist.invalid", 69, "PostgreSQL at does-not-exist.invalid:{port} does not answer: failed to"),
    ],
)
def test_what_is_wrong_with_a_dsn_has_its_own_words(
    told: Told, tls_server: TlsPostgresServer, parameters: str, exit_code: int, expected: str
) -> None:
    at = {"certificate": tls_server.authority.file, "port": tls_server.port}
    dsn = f"host=127.0.0.1 port={tls_server.port} user=postgres {parameters.format_map(at)}"
    code, said = told(BASE.format(dsn=dsn))
    assert expected.format_map(at) in said
    assert ": postgres.dsn: " in said
    assert code == exit_code


def test_a_server_without_tls_is_not_called_unreachable(told: Told, bridge_database: str) -> None:
    """The embedded server is built without TLS."""
    code, said = told(BASE.format(dsn=f"{bridge_database}?sslmode=require"))
    assert code == 69
    assert "offers no TLS, which sslmode in the DSN requires" in said


def test_what_speaks_another_protocol_is_not_called_unreachable(told: Told) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            wire, _ = listening.accept()
            with wire:
                wire.recv(100)
                wire.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        code, said = told(BASE.format(dsn=f"postgresql://postgres@{address}/postgres"))
        thread.join()
    assert code == 69
    assert f"postgres.dsn: what answers at {address} does not speak PostgreSQL's protocol" in said


@pytest.mark.parametrize("command", ["run", "status"])
def test_the_options_of_a_dsn_count_beside_those_of_a_command(
    bridge_database: str, tmp_path: Path, command: str
) -> None:
    path = tmp_path / "bridge.toml"
    path.write_text(BASE.format(dsn=f"{bridge_database}?options=-c%20nothing%3D1"))
    done = run_command(command, "--config", str(path))
    assert 'unrecognized configuration parameter "nothing"' in done.stderr
    assert done.returncode == 78


def test_every_host_is_named(told: Told, asking: PasswordServer) -> None:
    dsn = f"postgresql://known:hunter2@127.0.0.1:1,127.0.0.1:{asking.port}/postgres"
    code, said = told(BASE.format(dsn=dsn))
    assert code == 69
    assert f"PostgreSQL at 127.0.0.1:1, 127.0.0.1:{asking.port} refuses the login: 127.0.0.1:1 says: Connection" in said
    assert "hunter2" not in said


@pytest.mark.parametrize("password", ["hunter2@x", "hunter2/x", "@hunter2"])
def test_a_password_that_is_not_encoded_is_never_shown_as_a_host(told: Told, password: str) -> None:
    code, said = told(BASE.format(dsn=f"postgresql://u:{password}@127.0.0.1:1/x"))
    assert code == 78
    assert "postgres.dsn: " in said
    assert "%40" in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("", "x"), "the topic of an event is empty. Give dotted words, such as shop.order.placed."),
        (("t" * 256, "x"), "the topic of an event has 256 bytes; 255 are allowed"),
        (("a", "x", "--header", "ce-id=1"), 'the header name "ce-id" is reserved. Choose another'),
        (("a", "x", "--header", "CC=b"), 'the header name "CC" is reserved. Choose another'),
        (("a", "x", "--key", "k" * 1025), "has 1025 bytes; 1024 are allowed. The key names what"),
        (("a", "x", "--header", "two words=1"), "is not legal"),
        (("a", "x", "--header", "words"), "is not of the form NAME=VALUE"),
        (("a", "\udcff"), "topic, payload, key and headers must be UTF-8"),
    ],
)
def test_an_event_that_cannot_be_emitted_is_a_mistake_of_the_command_line(
    bridge_database: str, tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    path = tmp_path / "bridge.toml"
    path.write_text(BASE.format(dsn=bridge_database))
    done = run_command("emit", *arguments, "--config", str(path))
    assert expected in done.stderr
    assert "PostgreSQL" not in done.stderr
    assert done.returncode == 2
