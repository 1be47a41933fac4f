"""The console's connections to the database: few, kept, and with a limit to what a statement may take."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from bridge.errors import UnavailableError, UsageError
from bridge.postgres.connection import answered, connect
from bridge.postgres.schema import check_version
from bridge.postgres.wire import Connection
from bridge.settings import Settings

_CONNECTIONS: Final = 4
"""At most, however many browsers there are."""
STATEMENT_LIMIT: Final = 5.0
"""Seconds after which PostgreSQL cancels a statement of the console, which must never be in the way."""


class Database:
    """Lends connections."""

    def __init__(self, settings: Settings) -> None:
        """Raises UsageError where the settings keep nothing in the database."""
        if not settings.reads_outbox:
            raise UsageError(
                'with channels.buffer = "memory" nothing is kept in the database that a console could show; '
                "set observe.listen and look at /health and /metrics"
            )
        self._postgres = settings.postgres
        self._name = f"pgbridge {settings.name} console"
        self._places = asyncio.Semaphore(_CONNECTIONS)
        self._idle: list[Connection] = []

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """One for the body alone, in autocommit. Raises SchemaError, and what `connect` and `answered` raise."""
        async with self._places:
            connection = await self._take()
            try:
                # A server that was stopped cancels nothing.
                with answered(connection, limit=2 * STATEMENT_LIMIT):
                    yield connection
            except BaseException as error:
                # In what state it is, is not known.
                await connection.close()
                if isinstance(error, UnavailableError):  # and so are the others
                    await self.close()
                raise
            self._idle.append(connection)

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        connection = await connect(self._postgres, self._name)
        try:
            await check_version(connection)
            with answered(connection):
                await connection.execute("select set_config('statement_timeout', %s, false)", [f"{STATEMENT_LIMIT:g}s"])
        except BaseException:
            await connection.close()
            raise
        return connection

    async def close(self) -> None:
        """Ends the sessions that nobody has."""
        for connection in self._idle:
            await connection.close()
        self._idle.clear()
