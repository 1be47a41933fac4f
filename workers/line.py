"""One connection to PostgreSQL for what a worker does with every event: prepared statements, one at a time.

A statement is most of what an event costs a worker, and half of a statement was psycopg's cursor and pool, and a look
for a ready socket that is begun and ended each time. So this speaks through libpq (`psycopg.pq`), and its socket is
watched for as long as the connection lives. Values go and come as text.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, LiteralString

import psycopg
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn, PGresult

from bridge.errors import PgbridgeError
from bridge.postgres.connection import Connection, connect, database_errors, silence_limited, translated
from bridge.settings import PostgresSettings
from workers.pool import ANSWER_GRACE, array_text, ended_session

Value = str | int | float | bool | None | Sequence[str | float | None]
"""What a statement takes; a sequence is an array of one dimension."""

Text = str | None
"""What a statement gives, as PostgreSQL writes it."""

_DONE: Final = (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK)


class Line:
    """Connects again when its connection was lost. PostgreSQL cancels what runs longer than `limit` seconds."""

    def __init__(self, settings: PostgresSettings, application_name: str, *, limit: float) -> None:
        self.key = settings.key("dsn")
        """The setting that leads to the database, for errors."""
        self._settings = settings
        self._application_name = application_name
        self._limit = limit
        self._wire: _Wire | None = None
        self._turn = asyncio.Lock()

    async def open(self) -> None:
        """Connects. Raises what `bridge.postgres.connection.connect` raises."""
        async with self._turn:
            await self._connected()

    async def close(self) -> None:
        """Ends the session."""
        if self._wire is not None:
            await self._wire.close()
            self._wire = None

    async def rows(self, query: LiteralString, *values: Value) -> list[list[Text]]:
        """As `statement`; every error is one of ours, as `Pool.rows` raises them."""
        with database_errors(self.key):
            return await self.statement(query, *values)

    async def statement(self, query: LiteralString, *values: Value) -> list[list[Text]]:
        """The rows of a statement with the parameters $1, $2...; the types are PostgreSQL's to find.

        Raises psycopg's error where PostgreSQL refuses the statement, and DatabaseUnavailableError where it is the
        connection that is at fault, or the server takes no writes, and what `connect` raises.
        """
        texts = [_text(value) for value in values]
        async with self._turn:
            wire = await self._connected()
            try:
                with silence_limited(wire.connection, self.key, self._limit + ANSWER_GRACE):
                    return await wire.ask(query, texts)
            except psycopg.Error as error:
                if wire.is_lost or wire.connection.closed or ended_session(error):
                    await self.close()
                    raise translated(error, self.key) from error
                raise
            except (PgbridgeError, asyncio.CancelledError):
                # Its answer may still come, and is nobody's.
                await self.close()
                raise

    async def _connected(self) -> "_Wire":
        if self._wire is not None and self._wire.is_lost:
            await self.close()
        if self._wire is None:
            connection = await connect(self._settings, self._application_name)
            try:
                with database_errors(self.key):
                    await connection.execute("select set_config('statement_timeout', %s, false)", [f"{self._limit:g}s"])
            except BaseException:
                await connection.close()
                raise
            self._wire = _Wire(connection)
        return self._wire


class _Wire:
    """A connection whose socket is watched, and on which psycopg itself waits for nothing any more."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.is_lost = False
        self._pq: PGconn = connection.pgconn
        self._socket = self._pq.socket
        self._loop = asyncio.get_running_loop()
        self._answer: asyncio.Future[PGresult] | None = None
        self._result: PGresult | None = None
        self._names: dict[str, bytes] = {}
        self._loop.add_reader(self._socket, self._readable)

    async def close(self) -> None:
        """Whoever still waits for an answer gets an error."""
        self._lost(psycopg.OperationalError("the connection was closed"))
        await self.connection.close()

    async def ask(self, query: LiteralString, texts: Sequence[bytes | None]) -> list[list[Text]]:
        name = self._names.get(query)
        if name is None:
            name = b"line%d" % len(self._names)
            self._pq.send_prepare(name, query.encode())
            await self._answered()
            self._names[query] = name
        self._pq.send_query_prepared(name, texts)
        result = await self._answered()
        value, columns = result.get_value, range(result.nfields)
        return [[_read(value(row, column)) for column in columns] for row in range(result.ntuples)]

    async def _answered(self) -> PGresult:
        """What the server says to what was just sent. Raises psycopg's error where it refuses."""
        self._answer = self._loop.create_future()
        self._flush()
        try:
            result = await self._answer
        finally:
            self._answer = None
        if result.status not in _DONE:
            raise error_from_result(result)
        return result

    def _flush(self) -> None:
        """Sends, and goes on once the socket takes more."""
        try:
            if self._pq.flush():
                self._loop.add_writer(self._socket, self._flush_rest)
        except psycopg.Error as error:
            self._lost(error)

    def _flush_rest(self) -> None:
        self._loop.remove_writer(self._socket)
        self._flush()

    def _readable(self) -> None:
        self.connection.signs_of_life += 1
        try:
            self._pq.consume_input()
            while not self._pq.is_busy():
                result = self._pq.get_result()
                if result is None:
                    break
                self._result = result
            else:
                return
        except psycopg.Error as error:
            self._lost(error)
            return
        if self._answer is not None and self._result is not None and not self._answer.done():
            self._answer.set_result(self._result)
        self._result = None

    def _lost(self, error: psycopg.Error) -> None:
        if not self.is_lost:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
        self.is_lost = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


def _text(value: Value) -> bytes | None:
    match value:
        case None:
            return None
        case str():
            return value.encode()
        case bool() | int() | float():
            return repr(value).encode()
        case _:
            return array_text(value).encode()


def _read(value: bytes | None) -> Text:
    return None if value is None else value.decode()
