"""How large the tables of schema `bridge` are."""

from dataclasses import dataclass
from typing import Final

from psycopg.rows import class_row

from bridge.postgres.connection import DSN_KEY, answered
from bridge.postgres.wire import Connection

_SIZES: Final = """
select c.relname as name, pg_table_size(c.oid) as bytes, pg_indexes_size(c.oid) as index_bytes,
    case when c.reltuples >= 0 then c.reltuples::bigint end as rows
from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where n.nspname = 'bridge' and c.relkind = 'r'
order by pg_total_relation_size(c.oid) desc, c.relname
limit 40
"""


@dataclass(frozen=True, slots=True)
class TableSize:
    """One table."""

    name: str
    bytes: int
    """Of the rows, with what is stored beside them."""
    index_bytes: int
    rows: int | None
    """As the server estimated them last; None where it never has."""


async def table_sizes(connection: Connection, key: str = DSN_KEY) -> list[TableSize]:
    """The tables, the largest first. `key` is the setting that leads there.

    Raises DatabaseUnavailableError, RefusedError.
    """
    with answered(connection, key):
        async with connection.cursor(row_factory=class_row(TableSize)) as cursor:
            await cursor.execute(_SIZES)
            return await cursor.fetchall()
