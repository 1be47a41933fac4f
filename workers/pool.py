"""A worker process' connections to PostgreSQL, for statements of one round trip each: slow replies, effects, failures.
What every event needs has a connection of its own, see ``line.py``.

A connection keeps its cursor, and arrays are written here: with a new cursor, and psycopg writing each element, a
statement for four events took 1.4 times the processor time.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from bridge.errors import DatabaseUnavailableError, PrivilegeError
from bridge.postgres.connection import (
    connection_parameters,
    database_errors,
    prepare_session,
    silence_limited,
    translated,
)
from bridge.postgres.wire import Connection, array_text
from bridge.settings import PostgresSettings

ANSWER_GRACE: Final = 10.0
"""Seconds of silence, beyond the time that a statement may take, after which its connection counts as dead."""


class PooledConnection(Connection):
    """One that keeps its cursor."""

    @cached_property
    def its_cursor(self) -> psycopg.AsyncCursor[TupleRow]:
        """For one statement at a time, which whoever has the connection runs."""
        return self.cursor()


class Pool:
    """At most `size` connections, each of whose statements PostgreSQL cancels after `limit` seconds."""

    def __init__(self, settings: PostgresSettings, application_name: str, *, size: int, limit: float) -> None:
        self.key = settings.key("dsn")
        """The setting that leads to the database, for errors."""
        self._connect_timeout = settings.connect_timeout
        self._limit = limit
        self._pool: AsyncConnectionPool[PooledConnection] = AsyncConnectionPool(
            connection_class=PooledConnection,
            configure=self._configure,
            kwargs={**connection_parameters(settings, application_name), "autocommit": True},
            min_size=1,
            max_size=size,
            timeout=settings.connect_timeout,
            open=False,
        )

    async def _configure(self, connection: Connection) -> None:
        await prepare_session(connection, self.key)
        await connection.execute("select set_config('statement_timeout', %s, false)", [f"{self._limit:g}s"])

    async def open(self) -> None:
        """Begins to connect, and waits for nothing."""
        await self._pool.open()

    async def close(self) -> None:
        """Ends the sessions."""
        await self._pool.close()

    async def value(self, query: LiteralString, *parameters: object) -> Any:
        """The one value that it gives. Raises as `rows`."""
        [row] = await self.rows(query, *parameters)
        return row[0]

    async def rows(self, query: LiteralString, *parameters: object) -> list[TupleRow]:
        """Raises DatabaseUnavailableError, or another PgbridgeError when PostgreSQL refuses."""
        with database_errors(self.key):
            return await self.statement(query, *parameters)

    async def require(self, functions: Sequence[str]) -> None:
        """Raises PrivilegeError where the role may not call one of these, SchemaError where it does not exist; and as
        `rows`."""
        query: LiteralString = "select f from unnest(%s::text[]) as f where not has_function_privilege(f, 'execute')"
        missing = [function for (function,) in await self.rows(query, list(functions))]
        if missing:
            user = await self.value("select current_user")
            raise PrivilegeError(
                f"{self.key}: the role {user!r} may not call {', '.join(missing)}. Run: grant bridge_worker to {user}"
            )

    async def statement(self, query: LiteralString | sql.Composed, *parameters: object) -> list[TupleRow]:
        """Lists among the parameters are arrays, see `array_text`.

        Raises psycopg's error where PostgreSQL refuses the statement, and DatabaseUnavailableError where it is the
        connection that is at fault, or the server takes no writes.
        """
        values = [array_text(value) if isinstance(value, list) else value for value in parameters]
        try:
            async with self._pool.connection() as connection:
                cursor = connection.its_cursor
                try:
                    with silence_limited(connection, self.key, self._limit + ANSWER_GRACE):
                        await cursor.execute(query, values, prepare=True)
                        return await cursor.fetchall()
                except psycopg.Error as error:
                    if connection.closed or ended_session(error):
                        raise translated(error, self.key) from error
                    raise
        except PoolTimeout as error:
            raise DatabaseUnavailableError(
                f"{self.key}: PostgreSQL gave no connection within {self._connect_timeout:g} s"
            ) from error


def ended_session(error: psycopg.Error) -> bool:
    """Whether the server ended the session with it, though the end may not have been read yet; or takes no writes."""
    fatal = error.diag.severity_nonlocalized in ("FATAL", "PANIC")
    return fatal or isinstance(error, psycopg.errors.ReadOnlySqlTransaction)
