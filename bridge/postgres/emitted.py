"""What a database emits, as its catalog says: watched tables, their columns' types, and registered schemas.

The catalog is everybody's to read, so this asks for no right on anybody's table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, LiteralString

import psycopg
from psycopg.rows import dict_row

from bridge.errors import RefusedError, SchemaError
from bridge.postgres.connection import DSN_KEY, answered
from bridge.postgres.wire import Connection

FIRST_OID: Final = 16384
"""Of what is no part of PostgreSQL."""

Operation = Literal["insert", "update", "delete", "read"]
"""What an event of a watched table is about; ``read`` is a row that was there: `pgbridge backfill`."""


@dataclass(frozen=True, slots=True)
class Field:
    """A column of a table, or an attribute of a composite type."""

    name: str
    type: int
    """The oid, by which `Emitted.types` has it."""
    typmod: int
    """What stands in brackets behind the type; -1 where nothing does."""
    dimensions: int
    """Of an array, as declared."""
    declared: str
    """The type in SQL: ``numeric(10,2)``."""
    nullable: bool
    comment: str | None


@dataclass(frozen=True, slots=True)
class Type:
    """A type of PostgreSQL."""

    oid: int
    name: str
    """In SQL."""
    kind: str
    """``typtype``: b base, c composite, d domain, e enum, r range, m multirange."""
    base: int
    """Of a domain: the type below it; otherwise 0."""
    typmod: int
    """Of a domain: that of its base."""
    dimensions: int
    """Of a domain over an array."""
    not_null: bool
    """Of a domain."""
    element: int
    """Of an array; otherwise 0."""
    own_json: bool
    """Whether a cast of its own makes JSON of it, whose form the catalog does not know."""
    comment: str | None
    labels: tuple[str, ...]
    """Of an enum, in its order."""
    checks: tuple[str, ...]
    """Of a domain, in SQL."""
    fields: tuple[Field, ...]
    """Of a composite type."""


@dataclass(frozen=True, slots=True)
class Table:
    """A watched table."""

    schema: str
    name: str
    comment: str | None
    fields: Mapping[str, Field]

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True, slots=True)
class Watch:
    """The events of one operation on one table."""

    table: Table
    operation: Operation
    topic: str
    keys: tuple[str, ...]
    """Columns that make the events' key."""
    columns: tuple[str, ...]
    """Columns in the payload."""


@dataclass(frozen=True, slots=True)
class RegisteredSchema:
    """What somebody said of the events of a topic that are emitted by hand."""

    topic: str
    schema: dict[str, Any]
    description: str
    content_type: str


@dataclass(frozen=True, slots=True)
class Emitted:
    """All of it."""

    watches: Sequence[Watch]
    types: Mapping[int, Type]
    registered: Sequence[RegisteredSchema]


async def look(connection: Connection) -> Emitted:
    """Reads all of it in one snapshot.

    Raises DatabaseUnavailableError, PrivilegeError, and SchemaError, which also names tables to be watched again.
    """
    try:
        with answered(connection):
            async with connection.transaction():
                await connection.execute("set transaction isolation level repeatable read, read only")
                # So that names of types have their schema, whatever this login looks into.
                await connection.execute("set local search_path = pg_catalog")
                return await _look(connection)
    except RefusedError as error:
        cause = error.__cause__
        if isinstance(cause, psycopg.errors.ObjectNotInPrerequisiteState):
            raise SchemaError(f"{error}. {cause.diag.message_hint}") from cause
        raise


async def _look(connection: Connection) -> Emitted:
    told = await _rows(connection, _WATCHES)
    _require_told(told)
    tables = await _tables(connection, sorted({row["watched"] for row in told}))
    reads = await _rows(connection, _READS, sorted(tables))
    watches = [_watch(tables[row["watched"]], row) for row in (*told, *reads)]
    types = await _types(
        connection, sorted({field.type for table in tables.values() for field in table.fields.values()})
    )
    registered = [RegisteredSchema(**row) for row in await _rows(connection, _REGISTERED)]
    return Emitted(watches, types, registered)


_REGISTERED: Final = "select topic, schema, description, content_type from bridge.event_schema order by topic"


_WATCHES: Final = """
select w.watched::oid as watched, format('%%I.%%I', n.nspname, c.relname) as named, w.operation,
    w.told is not null as known, w.told ->> 'topic' as topic, w.told -> 'keys' as keys, w.told -> 'columns' as columns
from bridge.watches() as w join pg_catalog.pg_class as c on c.oid = w.watched
join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
order by n.nspname, c.relname, array_position(array['insert', 'update', 'delete'], w.operation)
"""

_READS: Final = """
select w.watched, 'read' as operation, o.topic, to_jsonb(o.keys) as keys, to_jsonb(o.columns) as columns
from unnest(%s::oid[]) as w(watched) cross join lateral bridge.watch_of(w.watched) as o
where o.topic is not null
    and exists (select from pg_catalog.pg_index as i where i.indrelid = w.watched and i.indisprimary)
"""
"""Tables that can be backfilled, and what it emits then. Without a topic somebody has to say `--topic`."""

_TABLES: Final = """
select c.oid, n.nspname as schema, c.relname as name, obj_description(c.oid, 'pg_class') as comment
from pg_catalog.pg_class as c join pg_catalog.pg_namespace as n on n.oid = c.relnamespace where c.oid = any (%s)
"""

_FIELDS: Final = """
select a.attrelid as relation, a.attname as name, a.atttypid as type, a.atttypmod as typmod,
    a.attndims::int as dimensions, pg_catalog.format_type(a.atttypid, a.atttypmod) as declared,
    -- A constraint that is not valid says nothing of the rows that are there.
    not a.attnotnull or exists (
        select from pg_catalog.pg_constraint as k
        where k.conrelid = a.attrelid and k.contype = 'n' and not k.convalidated and k.conkey = array[a.attnum]
    ) as nullable,
    pg_catalog.col_description(a.attrelid, a.attnum) as comment
from pg_catalog.pg_attribute as a where a.attrelid = any (%s) and a.attnum > 0 and not a.attisdropped
order by a.attrelid, a.attnum
"""

_TYPES: Final = """
with recursive reached (oid) as (
    select unnest(%s::oid[])
    union
    select below.oid from reached as r join pg_catalog.pg_type as t on t.oid = r.oid cross join lateral (
        select t.typbasetype where t.typtype = 'd'
        union all
        select t.typelem where t.typsubscript = 'pg_catalog.array_subscript_handler'::regproc
        union all
        select a.atttypid from pg_catalog.pg_attribute as a
        where t.typtype = 'c' and a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped
    ) as below (oid)
)
select t.oid, pg_catalog.format_type(t.oid, null) as name, t.typtype::text as kind, t.typbasetype as base,
    t.typtypmod as typmod, t.typndims as dimensions, t.typnotnull as not_null, t.typrelid as relation,
    case when t.typsubscript = 'pg_catalog.array_subscript_handler'::regproc then t.typelem else 0 end as element,
    t.oid >= 16384 and exists (
        select from pg_catalog.pg_cast as k
        where k.castsource = t.oid and k.casttarget = 'json'::regtype and k.castfunc <> 0
    ) as own_json,
    pg_catalog.obj_description(t.oid, 'pg_type') as comment,
    array(
        select e.enumlabel::text from pg_catalog.pg_enum as e where e.enumtypid = t.oid order by e.enumsortorder
    ) as labels,
    array(
        select pg_catalog.pg_get_constraintdef(k.oid) from pg_catalog.pg_constraint as k
        where k.contypid = t.oid and k.contype = 'c' order by k.conname
    ) as checks
from reached join pg_catalog.pg_type as t using (oid)
"""
"""The types of columns, and all that they are made of. As to_jsonb() does, only types that are no part of PostgreSQL
are looked up among the casts."""


async def _rows(connection: Connection, query: LiteralString, *values: object) -> list[dict[str, Any]]:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query, values)
        return await cursor.fetchall()


def _require_told(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises SchemaError where an older version has not written down what watch() was told."""
    older = sorted({row["named"] for row in rows if not row["known"]})
    if older:
        again = "; ".join(f"select bridge.watch('{name.replace(chr(39), chr(39) * 2)}')" for name in older)
        raise SchemaError(
            f"{DSN_KEY}: {', '.join(older)}: watched by an older version, which did not write down how. Watch again, "
            f"with the topic, key and columns that are wanted: {again}"
        )


async def _fields(connection: Connection, relations: Sequence[int]) -> Mapping[int, list[Field]]:
    found: dict[int, list[Field]] = {relation: [] for relation in relations}
    for row in await _rows(connection, _FIELDS, list(relations)):
        found[row.pop("relation")].append(Field(**row))
    return found


async def _tables(connection: Connection, relations: Sequence[int]) -> Mapping[int, Table]:
    fields = await _fields(connection, relations)
    return {
        row["oid"]: Table(row["schema"], row["name"], row["comment"], {each.name: each for each in fields[row["oid"]]})
        for row in await _rows(connection, _TABLES, list(relations))
    }


async def _types(connection: Connection, wanted: Sequence[int]) -> Mapping[int, Type]:
    rows = await _rows(connection, _TYPES, list(wanted))
    fields = await _fields(connection, [row["relation"] for row in rows if row["kind"] == "c"])
    types = {}
    for row in rows:
        relation = row.pop("relation")
        labels, checks = tuple(row.pop("labels")), tuple(row.pop("checks"))
        types[row["oid"]] = Type(**row, labels=labels, checks=checks, fields=tuple(fields.get(relation, ())))
    return types


def _watch(table: Table, row: Mapping[str, Any]) -> Watch:
    """Raises SchemaError where the table has lost a column that watch() was told of."""
    columns = tuple(table.fields) if row["columns"] is None else tuple(dict.fromkeys(row["columns"]))
    if lost := [name for name in (*row["keys"], *columns) if name not in table.fields]:
        raise SchemaError(
            f"{DSN_KEY}: bridge.watch() was told of the column {lost[0]}, which {table} no longer has. Watch the table "
            "again, with the topic, key and columns that are wanted now"
        )
    return Watch(table, row["operation"], row["topic"], tuple(row["keys"]), columns)
