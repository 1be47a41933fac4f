"""The SQL contract: sql/tests/*.sql (pgTAP) on two versions of PostgreSQL, and what needs two sessions to be seen."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from bridge.postgres.schema import migrate, schema_sql
from tests.support.servers import PostgresServer
from tests.support.until import until

ROOT = Path(__file__).parents[2]
TESTS = sorted((ROOT / "sql" / "tests").glob("*.sql"))
PGTAP = sorted(Path("/usr/share/postgresql").glob("*/extension/pgtap--?.?.?.sql"))


@pytest.fixture(scope="module", params=["postgres", "debian_postgres"])
def pgtap_database(request: pytest.FixtureRequest) -> Iterator[str]:
    """A database with the schema, pgTAP, and one event that is committed before any test."""
    if not PGTAP:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have pgTAP: deploy/install-test-servers")
        pytest.skip("pgTAP is not installed: deploy/install-test-servers")
    server: PostgresServer = request.getfixturevalue(request.param)
    dsn = server.create_database("pgtap")
    migrate(dsn)
    with psycopg.connect(dsn) as connection:
        connection.execute(PGTAP[-1].read_text(encoding="utf-8"))
        connection.execute("select bridge.emit('committed before', 'x')")
    yield dsn
    server.drop_database("pgtap")


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_pgtap(pgtap_database: str, path: Path) -> None:
    with psycopg.connect(pgtap_database) as connection:
        lines = tap_lines(connection.execute(path.read_text(encoding="utf-8")))
        connection.rollback()
    assert not any(line.startswith("not ok") for line in lines), "\n".join(lines)
    planned = next(int(line.removeprefix("1..")) for line in lines if line.startswith("1.."))
    assert sum(line.startswith("ok ") for line in lines) == planned


def tap_lines(cursor: psycopg.Cursor[tuple[object, ...]]) -> list[str]:
    """The text that all statements of a script returned."""
    lines: list[str] = []
    while True:
        if cursor.description is not None:
            lines += [line for row in cursor.fetchall() for line in str(row[0]).splitlines()]
        if not cursor.nextset():
            return lines


def test_schema_sql_is_what_the_migrations_make() -> None:
    assert (ROOT / "sql" / "schema.sql").read_text(encoding="utf-8") == schema_sql(), (
        "run: python -m bridge.postgres.schema > sql/schema.sql"
    )


@pytest.mark.parametrize(
    "statement",
    [
        "select bridge.emit('t', 'x'), bridge.emit('t', 'y')",
        "select bridge.notify('c', 'x')",
        "select bridge.intake('{a,b}', '{1,2}')",
        "select bridge.intake(array[gen_random_uuid(), gen_random_uuid()], '{a,b}', '{1,2}')",
        "insert into watched values (1), (2)",
    ],
)
def test_the_bell_rings_once_a_transaction_and_only_while_a_bridge_sleeps(bridge_database: str, statement: str) -> None:
    with (
        psycopg.connect(bridge_database, autocommit=True) as listener,
        psycopg.connect(bridge_database, autocommit=True) as producer,
    ):
        listener.execute("listen bridge_bell")
        listener.execute("create table watched (id int primary key); select bridge.watch('watched')")

        def rung_by_a_transaction() -> int:
            with producer.transaction():
                producer.execute(statement)
                producer.execute("delete from watched")
            listener.execute("notify bridge_bell, 'end'")
            # What was committed before our own NOTIFY arrives before it.
            for heard, notification in enumerate(listener.notifies(timeout=10)):
                if notification.payload == "end":
                    return heard
            pytest.fail("the listener does not hear its own NOTIFY")

        assert rung_by_a_transaction() == 0, "there is no bridge"
        producer.execute("insert into bridge.bell values ('one', true), ('two', false)")
        assert rung_by_a_transaction() == 1
        producer.execute("update bridge.bell set asleep = false")
        assert rung_by_a_transaction() == 0


def sleepers(connection: psycopg.Connection[tuple[int, ...]]) -> tuple[int, int]:
    """How many bridges sleep: as the bell's rows say, and as emit() sees it."""
    row = connection.execute(
        "select (select count(*) from bridge.bell where asleep), coalesce(pg_sequence_last_value('bridge.sleepers'), 0)"
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def test_a_change_of_the_bell_that_is_rolled_back_changes_nothing_for_emit(bridge_database: str) -> None:
    with psycopg.connect(bridge_database, autocommit=True) as connection:
        connection.execute("insert into bridge.bell values ('one', true)")
        with connection.transaction(force_rollback=True):
            connection.execute("update bridge.bell set asleep = false")
        assert sleepers(connection) == (1, 1)
        connection.execute("delete from bridge.bell")
        assert sleepers(connection) == (0, 0)


def test_bridges_that_fall_asleep_and_wake_at_the_same_time_are_counted_right(bridge_database: str) -> None:
    def toggle(name: str) -> None:
        with psycopg.connect(bridge_database, autocommit=True) as connection:
            connection.execute("insert into bridge.bell values (%s, false)", (name,))
            for _ in range(200):
                connection.execute("select bridge.set_asleep(%s, true)", (name,))
                # Whatever the others do, somebody sleeps, and every emit() must see it.
                assert connection.execute("select bridge.somebody_sleeps()").fetchone() == (True,)
                connection.execute("select bridge.set_asleep(%s, false)", (name,))

    with ThreadPoolExecutor(4) as bridges:
        for done in [bridges.submit(toggle, f"bridge{n}") for n in range(4)]:
            done.result(timeout=60)
    with psycopg.connect(bridge_database, autocommit=True) as connection:
        assert sleepers(connection) == (0, 0)


def test_a_plan_made_for_one_row_serves_a_bulk_update(bridge_database: str) -> None:
    with psycopg.connect(bridge_database, autocommit=True) as connection:
        connection.execute("create table bulk (id int primary key, v int); select bridge.watch('bulk')")
        for row in range(7):  # past the five executions after which PostgreSQL keeps a generic plan
            connection.execute("insert into bulk values (%s, 0)", (row,))
            connection.execute("update bulk set v = 1 where id = %s", (row,))
        connection.execute("insert into bulk select i, 0 from generate_series(10, 50000) i")
        # Nested loops over 50,000 pairs would take minutes.
        connection.execute("set statement_timeout = '20s'")
        connection.execute("update bulk set v = id + 1")
        wrong = connection.execute(
            "select count(*) from bridge.outbox where topic = 'public.bulk.updated' and id > 50000"
            " and payload::json #>> '{new,id}' <> payload::json #>> '{old,id}'"
        ).fetchone()
        assert wrong == (0,)


@pytest.mark.parametrize(
    "statement",
    [
        "select bridge.emit('t', 'x')",
        "select bridge.intake('{a}', '{1}')",
        "select bridge.intake(array[gen_random_uuid()], '{a}', '{1}')",
        "insert into watched values (1)",
        "insert into bridge.outbox (topic, payload, content_type) values ('t', 'x', 'text/plain')",
    ],
    ids=["emit", "intake without ids", "intake", "watch", "default"],
)
async def test_an_id_is_taken_only_once_the_transaction_has_its_xid(bridge_database: str, statement: str) -> None:
    """The reader's rule. A session is stopped just where it takes the id, and must already count as running."""
    with (
        psycopg.connect(bridge_database) as blocker,
        psycopg.connect(bridge_database, autocommit=True) as observer,
        psycopg.connect(bridge_database) as writer,
        ThreadPoolExecutor(1) as pool,
    ):
        observer.execute("create table watched (id int primary key); select bridge.watch('watched')")
        blocker.execute("alter sequence bridge.outbox_id_seq increment 1")  # conflicts with nextval()
        waiting = pool.submit(writer.execute, statement)
        try:
            await until(lambda: _waits_for_the_sequence(observer, writer) is not None, "the writer comes to nextval()")
            assert _waits_for_the_sequence(observer, writer) != "no xid"
        finally:
            blocker.rollback()
            waiting.result(10)


def _waits_for_the_sequence(
    observer: psycopg.Connection[tuple[object, ...]], writer: psycopg.Connection[tuple[object, ...]]
) -> object | None:
    """None until it waits; then its transaction id, or 'no xid'."""
    row = observer.execute(
        "select coalesce(a.backend_xid::text, 'no xid') from pg_locks l join pg_stat_activity a using (pid)"
        " where l.pid = %s and l.relation = 'bridge.outbox_id_seq'::regclass and not l.granted",
        (writer.info.backend_pid,),
    ).fetchone()
    return None if row is None else row[0]


def test_a_transaction_that_is_to_be_prepared_can_silence_the_bell(bridge_database: str) -> None:
    with psycopg.connect(bridge_database, autocommit=True) as connection:
        connection.execute("insert into bridge.bell values ('one', true)")
        connection.execute("begin; select bridge.emit('t', 'x')")
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="NOTIFY"):
            connection.execute("prepare transaction 'loud'")
        connection.execute("begin; set local bridge.doorbell = off; select bridge.emit('t', 'x')")
        connection.execute("prepare transaction 'silent'")
        connection.execute("commit prepared 'silent'")
        assert connection.execute("select count(*) from bridge.outbox").fetchone() == (1,)
