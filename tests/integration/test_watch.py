"""What watch() promises over several sessions, and over a dump; everything else of it is in sql/tests/."""

import psycopg
import pytest

from tests.support import dumps
from tests.support.servers import PostgresServer

CAPTURES = r"select count(*) from pg_proc where proname like 'capture\_%'"


def test_watched_tables_go_on_after_a_dump_and_restore(
    postgres: PostgresServer, bridge_database: str, unique: str
) -> None:
    with psycopg.connect(bridge_database, autocommit=True) as connection:
        connection.execute("create table filler (); drop table filler")  # so that oids differ
        connection.execute("create table \"it's\" (id int primary key, v int); select bridge.watch('\"it''s\"')")
    copy = postgres.create_database(f"{unique}_copy")
    try:
        dumps.copy(postgres, bridge_database, copy)
        with psycopg.connect(copy, autocommit=True) as connection:
            connection.execute('insert into "it\'s" values (1, 1); update "it\'s" set v = 2; delete from "it\'s"')
            found = connection.execute("select topic, payload::json #>> '{new,v}' from bridge.outbox order by id")
            assert found.fetchall() == [
                ("public.it's.inserted", "1"),
                ("public.it's.updated", "2"),
                ("public.it's.deleted", None),
            ]
            connection.execute("select bridge.unwatch('\"it''s\"')")
            assert connection.execute(CAPTURES).fetchone() == (0,)
    finally:
        postgres.drop_database(f"{unique}_copy")


def test_who_unwatches_does_not_wait_for_whoever_cleans_up(bridge_database: str) -> None:
    with (
        psycopg.connect(bridge_database) as slow,
        psycopg.connect(bridge_database, autocommit=True) as quick,
    ):
        for table in ("gone", "one", "two"):
            quick.execute(f"create table {table} (id int primary key); select bridge.watch('{table}')")
        quick.execute("drop table gone")
        slow.execute("select bridge.unwatch('one')")  # and drops what the table that is gone has left
        quick.execute("set statement_timeout = '10s'")
        quick.execute("select bridge.unwatch('two')")
        slow.commit()
        quick.execute("select bridge.unwatch('two')")
        assert quick.execute(CAPTURES).fetchone() == (0,)


def test_a_statement_without_rows_takes_no_transaction_id(bridge_database: str) -> None:
    with psycopg.connect(bridge_database) as connection:
        connection.execute("create table watched (id int primary key, v int); select bridge.watch('watched')")
        connection.commit()
        connection.execute("insert into watched select 1, 1 where false")
        connection.execute("update watched set v = 1; delete from watched")
        assert connection.execute("select pg_current_xact_id_if_assigned()").fetchone() == (None,)


@pytest.mark.parametrize("column", ["from the beginning", "added later"])
def test_a_cast_that_is_made_later_is_seen_by_a_session_that_has_its_plan(bridge_database: str, column: str) -> None:
    with (
        psycopg.connect(bridge_database, autocommit=True) as writer,
        psycopg.connect(bridge_database, autocommit=True) as maker,
    ):
        maker.execute("create role pgbridge_test_maker superuser; set role pgbridge_test_maker")
        try:
            maker.execute("create type mood as enum ('sad'); create table watched (id serial primary key)")
            if column == "from the beginning":
                maker.execute("alter table watched add column mood mood default 'sad'")
            writer.execute("select bridge.watch('watched')")
            for _ in range(7):  # past the five executions after which PostgreSQL keeps a generic plan
                writer.execute("insert into watched default values")
            maker.execute("create function cast_mood(mood) returns json language sql return '1'::json")
            maker.execute("create cast (mood as json) with function cast_mood(mood)")
            if column == "added later":
                writer.execute("insert into watched default values")  # the table has no such type
                maker.execute("alter table watched add column mood mood default 'sad'")
            maker.execute("reset role; alter role pgbridge_test_maker nosuperuser")
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="a cast to json made by a role"):
                writer.execute("insert into watched default values")
            maker.execute("drop cast (mood as json)")
            writer.execute("insert into watched default values")
        finally:
            maker.execute("reset role; drop owned by pgbridge_test_maker; drop role pgbridge_test_maker")
