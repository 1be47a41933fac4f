"""One connection to PostgreSQL for what a worker does with every event: prepared statements, one at a time.

A statement is most of what an event costs a worker, and half of a statement was psycopg's cursor and pool. Values go
and come as text.
"""

import asyncio
from typing import LiteralString

import psycopg

from bridge.errors import PgbridgeError
from bridge.postgres.connection import connect, database_errors, silence_limited, translated
from bridge.postgres.wire import Connection, Value
from bridge.settings import PostgresSettings
from workers.pool import ANSWER_GRACE, ended_session


class Line:
    """Connects again when its connection was lost. PostgreSQL cancels what runs longer than `limit` seconds."""

    def __init__(self, settings: PostgresSettings, application_name: str, *, limit: float) -> None:
        self.key = settings.key("dsn")
        """The setting that leads to the database, for errors."""
        self._settings = settings
        self._application_name = application_name
        self._limit = limit
        self._connection: Connection | None = None
        self._turn = asyncio.Lock()

    async def open(self) -> None:
        """Connects. Raises what `bridge.postgres.connection.connect` raises."""
        async with self._turn:
            await self._connected()

    async def close(self) -> None:
        """Ends the session."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def rows(self, query: LiteralString, *values: Value) -> list[list[str | None]]:
        """As `statement`; every error is one of ours, as `Pool.rows` raises them."""
        with database_errors(self.key):
            return await self.statement(query, *values)

    async def statement(self, query: LiteralString, *values: Value) -> list[list[str | None]]:
        """The rows of a statement with the parameters $1, $2...; the types are PostgreSQL's to find.

        Raises psycopg's error where PostgreSQL refuses the statement, and DatabaseUnavailableError where it is the
        connection that is at fault, or the server takes no writes, and what `connect` raises.
        """
        async with self._turn:
            connection = await self._connected()
            try:
                with silence_limited(connection, self.key, self._limit + ANSWER_GRACE):
                    return await connection.texts(query, *values)
            except psycopg.Error as error:
                if connection.closed or ended_session(error):
                    await self.close()
                    raise translated(error, self.key) from error
                raise
            except PgbridgeError:
                await self.close()
                raise

    async def _connected(self) -> Connection:
        if self._connection is not None and self._connection.closed:
            await self.close()
        if self._connection is None:
            connection = await connect(self._settings, self._application_name)
            try:
                with database_errors(self.key):
                    await connection.execute("select set_config('statement_timeout', %s, false)", [f"{self._limit:g}s"])
            except BaseException:
                await connection.close()
                raise
            self._connection = connection
        return self._connection
