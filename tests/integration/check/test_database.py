"""What `pgbridge check` says of PostgreSQL: the server, the schema, the log, and room for sessions."""

import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Final

import psycopg
import pytest

from bridge.commands import check_database
from bridge.commands.check_database import NAME
from bridge.postgres.schema import schema_version
from tests.support.checked import HANDLER, ONLY_BRIDGE, Broken, Section, World, found_in, wrong_of
from tests.support.owner import owner_without_rights
from tests.support.until import until

NEWER: Final = (
    f"insert into bridge.migration (version, name, checksum, oldest_program) values ({schema_version() + 1}, 'newer', "
    "'c', {oldest})"
)
"""What a migration that this version does not know leaves behind."""
NO_NEWER: Final = f"delete from bridge.migration where version > {schema_version()}"


@contextmanager
def any_transaction_is_old() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_database, "OLD_TRANSACTION", 0.0)
        yield


@asynccontextmanager
async def open_transaction(world: World) -> AsyncIterator[Mapping[str, str]]:
    with any_transaction_is_old(), psycopg.connect(world.postgres.dsn("shop")) as connection:
        connection.execute("select pg_current_xact_id()")
        yield {}


@asynccontextmanager
async def without_fsync(world: World) -> AsyncIterator[Mapping[str, str]]:
    await set_fsync(world, "off")
    yield {}
    await set_fsync(world, "on")


async def set_fsync(world: World, value: str) -> None:
    world.admin(f"alter system set fsync = {value}")
    world.admin("select pg_reload_conf()")

    def is_set() -> bool:
        with psycopg.connect(world.postgres.dsn()) as connection:
            return connection.execute("show fsync").fetchone() == (value,)

    await until(is_set, f"new sessions have fsync = {value}")


@asynccontextmanager
async def narrow_owner(world: World) -> AsyncIterator[Mapping[str, str]]:
    with owner_without_rights(world.postgres.dsn("shop"), "shop_owner"):
        yield {}


@asynccontextmanager
async def nobody_else(world: World) -> AsyncIterator[Mapping[str, str]]:
    """Once the sessions of other tests have ended."""

    def alone() -> bool:
        with psycopg.connect(world.postgres.dsn(), application_name=NAME) as connection:
            query = "select from pg_stat_activity where backend_type = 'client backend' and application_name <> %s"
            return connection.execute(query, [NAME]).fetchone() is None

    await until(alone, "nobody else has a session")
    yield {}


@asynccontextmanager
async def sessions(
    world: World, names: Sequence[str], *, database: str = "shop", user: str = "postgres"
) -> AsyncIterator[None]:
    """Sessions that stand under these names in PostgreSQL, and none of anybody else."""
    async with nobody_else(world):
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(psycopg.connect(world.postgres.dsn(database, user), application_name=name))
            yield


@asynccontextmanager
async def another_bridge(world: World) -> AsyncIterator[Mapping[str, str]]:
    async with sessions(world, ["pgbridge other"]):
        yield {}


BROKEN: Final[Mapping[str, Broken]] = {
    "no server": Broken(
        "postgres",
        ["does not answer"],
        69,
        change={'[postgres]\ndsn = "': '[postgres]\ndsn = "postgresql://shop_bridge@127.0.0.1:1/shop" # "'},
    ),
    "a database that is not there": Broken(
        "postgres", ['database "gone" does not exist'], 69, change={'/shop"\n[sinks': '/gone"\n[sinks'}
    ),
    "a role whose sessions are read-only": Broken(
        "postgres",
        ["sessions of the role 'shop_bridge' in the database 'shop' are read-only"],
        69,
        sql="alter role shop_bridge set default_transaction_read_only = on",
        undo="alter role shop_bridge reset default_transaction_read_only",
    ),
    "clocks that differ": Broken(
        "clock",
        ["apart", "Let both follow NTP"],
        # The server's clock cannot be set; what the login takes for it can.
        sql="create schema slow; create function slow.clock_timestamp() returns timestamptz language sql as "
        "'select pg_catalog.clock_timestamp() - interval ''90 s'''; grant usage on schema slow to shop_bridge; "
        "alter role shop_bridge set search_path = slow, pg_catalog",
        undo="drop schema slow cascade; alter role shop_bridge reset search_path",
    ),
    "no schema": Broken(
        "schema",
        ["the schema bridge is not installed", "pgbridge migrate"],
        69,
        change={'/shop"\n[sinks': '/empty"\n[sinks'},
    ),
    "a schema that is older than this version": Broken(
        "schema",
        ["the schema bridge does not have migration", "and with it 1 in all; run: pgbridge migrate"],
        69,
        sql="create table shop.kept as select * from bridge.migration order by version desc limit 1; "
        "delete from bridge.migration where version = (select version from shop.kept)",
        undo="insert into bridge.migration select * from shop.kept; drop table shop.kept",
    ),
    "a schema that asks for a newer version": Broken(
        "schema",
        ["on which programs run that know", "Upgrade pgbridge"],
        69,
        sql=NEWER.format(oldest=schema_version() + 1),
        undo=NO_NEWER,
    ),
    "a login without its role": Broken(
        "schema",
        ["permission denied", "roles.sql"],
        69,
        sql="revoke bridge_relay from shop_bridge",
        undo="grant bridge_relay to shop_bridge",
    ),
    "a privilege that is missing": Broken(
        "privileges",
        ["the role 'shop_bridge' does not have EXECUTE on bridge.prune(", "grant bridge_relay to shop_bridge"],
        69,
        sql="revoke execute on function bridge.prune from bridge_relay",
        undo="grant execute on function bridge.prune to bridge_relay",
    ),
    "the bridge's login is a superuser": Broken(
        "privileges",
        ["postgres.dsn: 'shop_bridge' is a superuser"],
        sql="alter role shop_bridge superuser",
        undo="alter role shop_bridge nosuperuser",
    ),
    "the bridge's login owns the schema": Broken(
        "privileges",
        ["postgres.dsn: 'shop_bridge' owns the schema bridge"],
        sql="grant postgres to shop_bridge",
        undo="revoke postgres from shop_bridge",
    ),
    "the workers' login is a superuser": Broken(
        "privileges",
        ["workers.dsn: 'shop_workers' is a superuser"],
        sql="alter role shop_workers superuser",
        undo="alter role shop_workers nosuperuser",
    ),
    "commits that do not wait for the disk": Broken(
        "durability",
        ["synchronous_commit = off: a crash of the server forgets"],
        sql="alter role shop_bridge set synchronous_commit = off",
        undo="alter role shop_bridge set synchronous_commit = on",
    ),
    "fsync = off": Broken(
        "durability",
        ["fsync = off: a crash of the machine may destroy the database", "Set fsync to on"],
        around=without_fsync,
    ),
    "a sequence behind the log": Broken(
        "positions",
        ["the sequence bridge.outbox_id_seq is at 1, and the log already has the id", "select setval("],
        69,
        sql="insert into bridge.outbox (id, event_id, topic, payload, content_type) "
        "values (1000000, gen_random_uuid(), 'shop.a', '1', 'application/json')",
        undo="delete from bridge.outbox where id = 1000000",
    ),
    "a position of a sink that is gone": Broken(
        "positions",
        ["there is a position of the sink 'gone'", "pgbridge cursor forget gone"],
        69,
        sql="insert into bridge.cursor (name, sink, mark, horizon, system_identifier, patterns) "
        "values ('shop', 'gone', 0, '3', 1, '{#}')",
        undo="delete from bridge.cursor where sink = 'gone'",
    ),
    "a log whose numbers begin again below a position": Broken(
        "positions",
        ["the sink 'events' is at 5000, and bridge.outbox_id_seq at 1", "restart it"],
        sql="insert into bridge.cursor (name, sink, mark, horizon, system_identifier, patterns) "
        "values ('shop', 'events', 5000, '3', 1, '{shop.#}')",
        undo="delete from bridge.cursor where name = 'shop'",
    ),
    "events unsettled for longer than the retention": Broken(
        "log",
        ["nothing is deleted behind what 'other' has not settled", "pgbridge cursor forget"],
        sql="update bridge.outbox set created_at = now() - interval '30 days'; "
        "insert into bridge.cursor (name, sink, mark, horizon, system_identifier, patterns) "
        "values ('other', 'events', 0, '3', 1, '{#}')",
        undo="delete from bridge.cursor where name = 'other'; update bridge.outbox set created_at = now()",
    ),
    "an old transaction": Broken(
        "transactions",
        ["role postgres, database shop, idle in transaction has one open for", "vacuum removes nothing"],
        around=open_transaction,
    ),
    "an owner of the schema who sees no other sessions": Broken(
        "transactions",
        ["whether others have an old one open cannot be known", "grant pg_read_all_stats to shop_owner"],
        around=narrow_owner,
    ),
    "a server without room": Broken(
        "connections",
        ["take up to 110, and there is room for ", "raise its max_connections"],
        change={HANDLER: f"{HANDLER}\nconcurrency = 100"},
    ),
    "a role without room": Broken(
        "connections",
        ["take up to 6, and there is room for 5", "`alter role shop_bridge connection limit N`"],
        sql="alter role shop_bridge connection limit 5",
        undo="alter role shop_bridge connection limit -1",
        around=nobody_else,
    ),
    "a database without room": Broken(
        "connections",
        ["take up to 14, and there is room for 13", "`alter database shop connection limit N`"],
        sql="alter database shop connection limit 13",
        undo="alter database shop connection limit -1",
        around=nobody_else,
    ),
    "a database whose room another bridge has taken": Broken(
        "connections",
        ["take up to 14, and there is room for 13"],
        sql="alter database shop connection limit 14",
        undo="alter database shop connection limit -1",
        around=another_bridge,
    ),
}

SECTION: Final = Section("PostgreSQL", BROKEN)


@pytest.mark.parametrize("broken", BROKEN)
async def test_what_is_broken_is_named(shop_world: World, broken: str) -> None:
    await SECTION.breaks(shop_world, broken)


def test_the_page_shows_what_is_said() -> None:
    SECTION.compare_with_page()


async def text_of(world: World, subject: str) -> str:
    """What is said of it where nothing is wrong."""
    found = await found_in(world.settings())
    assert wrong_of(found) == []
    return next(finding.text for finding in found if finding.subject == subject)


async def test_a_newer_schema_that_admits_this_version_is_ok_and_says_what_to_upgrade(shop_world: World) -> None:
    shop_world.admin(NEWER.format(oldest=schema_version()))
    try:
        said = await text_of(shop_world, "schema")
    finally:
        shop_world.admin(NO_NEWER)
    known = schema_version()
    assert said == f"version {known + 1:04}; this pgbridge knows {known:04} and may run on it: upgrade it next"


async def test_an_old_prepared_transaction_is_seen_by_an_owner_who_sees_no_sessions(shop_world: World) -> None:
    with psycopg.connect(shop_world.postgres.dsn("shop"), autocommit=True) as connection:
        connection.execute("begin")
        connection.execute("select pg_current_xact_id()")
        connection.execute("prepare transaction 'forgotten'")
        try:
            async with narrow_owner(shop_world):
                with any_transaction_is_old():
                    [said] = wrong_of(await found_in(shop_world.settings()))
        finally:
            connection.execute("rollback prepared 'forgotten'")
    assert said.text.startswith("prepared transaction 'forgotten', role postgres, database shop has one open for")


@contextmanager
def limited(world: World, what: str, limit: int) -> Iterator[None]:
    """To so many sessions."""
    world.admin(f"alter {what} connection limit {limit}")
    try:
        yield
    finally:
        world.admin(f"alter {what} connection limit -1")


async def test_sessions_that_bridge_and_workers_have_already_are_not_counted_twice(shop_world: World) -> None:
    own = ["pgbridge shop", "pgbridge shop bell", "pgbridge shop prune", *["pgbridge-worker invoices"] * 3]
    async with sessions(shop_world, own):
        with limited(shop_world, "database shop", 14):
            said = await text_of(shop_world, "connections")
    assert said == "up to 14 are needed, and there is room for 14"


@pytest.mark.parametrize(
    "names",
    [["pgbridge shopper"], ["pgbridge shop"] * 7, ["pgbridge-worker deliver invoices"]],
    ids=["of a bridge with another name", "of a second process", "of another kind of process"],
)
async def test_sessions_of_others_take_room(shop_world: World, names: Sequence[str]) -> None:
    async with sessions(shop_world, names):
        with limited(shop_world, "database shop", 14):
            [said] = wrong_of(await found_in(shop_world.settings()))
    assert "take up to 14, and there is room for 13" in said.text


async def test_a_bridge_of_the_same_name_on_another_database_takes_room_too(shop_world: World) -> None:
    async with sessions(shop_world, ["pgbridge shop"], database="empty", user="shop_bridge"):
        with limited(shop_world, "role shop_bridge", 6):
            [said] = wrong_of(await found_in(shop_world.settings(), ONLY_BRIDGE))
    assert "take up to 6, and there is room for 5" in said.text


async def test_how_large_the_log_becomes_is_told_from_its_age_and_size(shop_world: World) -> None:
    shop_world.admin("update bridge.outbox set created_at = now() - interval '2 days'")
    try:
        text = await text_of(shop_world, "log")
    finally:
        shop_world.admin("update bridge.outbox set created_at = now()")
    told = re.match(
        r"([\d.]+) MB, with events of 2 d; they stay for 7 d: at ([\d.]+) MB a day about ([\d.]+) MB\.", text
    )
    assert told is not None, text
    size, a_day, in_all = map(float, told.groups())
    assert a_day == pytest.approx(size / 2, abs=0.1)
    assert in_all == pytest.approx(size * 3.5, abs=0.4)


def test_all_that_roles_sql_grants_to_the_bridge_is_asked_for(shop_world: World) -> None:
    with psycopg.connect(shop_world.postgres.dsn("shop")) as admin:
        functions = admin.execute(
            "select p.oid::regprocedure::text from pg_proc p where p.pronamespace = 'bridge'::regnamespace "
            "and has_function_privilege('bridge_relay', p.oid, 'execute')"
        ).fetchall()
        asked = admin.execute(
            "select f::regprocedure::text from unnest(%s::text[]) f", [list(check_database.FUNCTIONS)]
        ).fetchall()
        tables = admin.execute(
            "select c.oid::regclass::text, privilege from pg_class c, unnest('{select,insert,update,delete}'::text[]) "
            "as privilege where c.relnamespace = 'bridge'::regnamespace and c.relkind = 'r' "
            "and has_table_privilege('bridge_relay', c.oid, privilege)"
        ).fetchall()
    assert sorted(functions) == sorted(asked)
    assert sorted(tables) == sorted(
        (table, privilege) for table, privileges in check_database.TABLES.items() for privilege in privileges
    )
