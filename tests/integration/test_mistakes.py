"""What a person gets who made a mistake: one message that names the key and the mend, an exit code, no stack trace."""

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from tests.support.daemons import run_command

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
        ('name = "test"', 'name = "test"\nrelay = {pages_in_flight = "x"}', "relay.pages_in_flight: "),
        ('name = "test"', 'name = "test"\noutbox = {retention = "7 weeks"}', "outbox.retention: is no duration"),
        ('dsn = "{dsn}"', 'dsn_file = "/does/not/exist"', "postgres.dsn_file: the secret file '/does/not/exist'"),
        ('dsn = "{dsn}"', 'dsn = "postgres//u:hunter2@h"', "postgres.dsn: is no libpq connection string"),
        ('sink = "events"', 'sink = "evnts"', "routes.0.sink: there is no sink named 'evnts'; known: events"),
        ('type = "memory"', 'type = "kafka"', "sinks.events.type: there is no broker of type 'kafka'; installed: "),
        ('name = "test"', "name = ", "is no TOML"),
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


def test_an_unreachable_database_ends_with_69(told: Told) -> None:
    code, said = told(BASE.format(dsn="postgresql://u:hunter2@127.0.0.1:1/x"))
    assert code == 69
    assert "postgres.dsn: PostgreSQL does not answer" in said
    assert "hunter2" not in said


def test_an_unreachable_broker_ends_with_69(told: Told, bridge_database: str) -> None:
    sink = 'type = "rabbitmq"\nurl = "amqp://guest:hunter2@127.0.0.1:1/"'
    code, said = told(BASE.format(dsn=bridge_database).replace('type = "memory"', sink))
    assert code == 69
    assert "sinks.events.url: RabbitMQ at 127.0.0.1:1 does not answer" in said
    assert "hunter2" not in said


def test_a_missing_schema_points_to_migrate(told: Told, database: str) -> None:
    code, said = told(BASE.format(dsn=database))
    assert code == 78
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
    assert code == 78
    assert "permission denied" in said
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
    assert code == 78
    assert "read-only" in said
