"""How we connect to PostgreSQL, and what its errors mean to us.

A dead peer must be noticed within seconds, on idle connections too: keepalives probe it, `tcp_user_timeout`
gives up on unacknowledged data, and a multi-host DSN goes on to the host that accepts writes.
"""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import AsyncConnection, conninfo
from psycopg.rows import TupleRow

from bridge.errors import (
    DatabaseUnavailableError,
    PgbridgeError,
    PrivilegeError,
    ReadOnlyServerError,
    RefusedError,
    SchemaError,
    SettingsError,
)
from bridge.settings import PostgresSettings

OLDEST_POSTGRES = 14
"""The oldest major version that has what we use: idle_session_timeout, multiranges, parsed SQL functions."""

ANSWER_LIMIT = 30.0
"""Seconds after which a statement without an answer shows a dead connection. Keepalives cannot show it where a proxy or
a load balancer stands between, since that is what acknowledges them."""

_CANCEL_LIMIT = 1.0
"""Seconds that the server has to take the request to cancel a statement."""

_DEFAULTS: dict[str, str] = {
    "keepalives": "1",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "target_session_attrs": "read-write",
}


class _Connection(AsyncConnection[TupleRow]):
    """A connection whose statement, when it is cancelled, does not wait for a server that does not answer.

    psycopg would wait 5 s for the server to take the request, and as long again for the statement to end.
    """

    async def cancel_safe(self, *, timeout: float = _CANCEL_LIMIT) -> None:  # noqa: ASYNC109 - psycopg names it so
        try:
            await super().cancel_safe(timeout=min(timeout, _CANCEL_LIMIT))
        except psycopg.Error:
            _end_wire(self)
            raise


def _end_wire(connection: AsyncConnection[TupleRow]) -> None:
    """Ends the socket, so that whoever waits for an answer gets an error at once."""
    with socket.socket(fileno=os.dup(connection.pgconn.socket)) as wire:
        wire.shutdown(socket.SHUT_RDWR)


def connection_parameters(settings: PostgresSettings, application_name: str) -> dict[str, Any]:
    """libpq parameters for `psycopg.connect(**parameters)`; what the DSN says wins over our defaults.

    Raises SettingsError when the DSN cannot be parsed.
    """
    try:
        given = conninfo.conninfo_to_dict(settings.dsn.get_secret_value())
    except psycopg.ProgrammingError:
        # libpq's message repeats parts of the DSN, which may hold the password.
        raise SettingsError(
            "postgres.dsn: is no libpq connection string; "
            'write "postgresql://user@host:5432/database" or "host=... dbname=... user=..."'
        ) from None
    return {
        **_DEFAULTS,
        "connect_timeout": max(2, round(settings.connect_timeout)),
        **given,
        "application_name": application_name,
    }


async def connect(settings: PostgresSettings, application_name: str, **overrides: str) -> AsyncConnection[TupleRow]:
    """An autocommit connection. `overrides` are libpq parameters.

    Raises DatabaseUnavailableError, ReadOnlyServerError, PrivilegeError, SettingsError, and SchemaError on a server
    that is too old.
    """
    parameters = {**connection_parameters(settings, application_name), **overrides}
    try:
        with database_errors():
            connection = await _Connection.connect(**parameters, autocommit=True)
    except ReadOnlyServerError:
        # libpq has one text for a standby and for a read-only role; what to mend differs.
        with database_errors():
            looking = await AsyncConnection.connect(**{**parameters, "target_session_attrs": "any"}, autocommit=True)
        async with looking:
            await require_writes(looking)
        raise
    major = connection.info.server_version // 10_000
    if major < OLDEST_POSTGRES:
        await connection.close()
        raise SchemaError(f"this is PostgreSQL {major}; pgbridge needs {OLDEST_POSTGRES} or newer")
    return connection


async def require_writes(connection: AsyncConnection[TupleRow]) -> None:
    """Raises ReadOnlyServerError, which says why, where nothing may be written."""
    with database_errors():
        cursor = await connection.execute("select pg_is_in_recovery(), current_setting('transaction_read_only')")
        row = await cursor.fetchone()
    if row is None or row[0]:
        raise ReadOnlyServerError(
            f"{connection.info.host}:{connection.info.port} is a hot standby, which can neither LISTEN nor store the "
            "cursor. Point postgres.dsn to the primary, or name all hosts in it"
        )
    if row[1] == "on":
        raise ReadOnlyServerError(
            f"sessions of the role {connection.info.user!r} in the database {connection.info.dbname!r} are read-only "
            "(default_transaction_read_only), so the cursor cannot be stored. "
            "ALTER ROLE ... SET default_transaction_read_only = off, or the same for the database"
        )


@contextmanager
def database_errors() -> Iterator[None]:
    """Turns psycopg's errors into ours: gone (try again), not allowed, not installed, refused."""
    try:
        yield
    except psycopg.Error as error:
        raise translated(error) from error


@contextmanager
def answered(connection: AsyncConnection[TupleRow]) -> Iterator[None]:
    """As `database_errors`, and gives a connection up that does not answer within ANSWER_LIMIT.

    It ends the socket itself: a cancelled psycopg would ask the server to cancel too, and wait for it again.
    """
    limit = ANSWER_LIMIT
    given_up = False

    def give_up() -> None:
        nonlocal given_up
        if not connection.closed:
            given_up = True
            _end_wire(connection)

    timer = asyncio.get_running_loop().call_later(limit, give_up)
    try:
        with database_errors():
            yield
    except PgbridgeError as error:
        if given_up:
            raise DatabaseUnavailableError(f"PostgreSQL did not answer within {limit:g} s") from error
        raise
    finally:
        timer.cancel()


def translated(error: psycopg.Error) -> PgbridgeError:
    """Our error for one of psycopg's; the message is the server's, which holds no secret."""
    text = _one_line(error)
    match error:
        case psycopg.errors.InvalidPassword() | psycopg.errors.InvalidAuthorizationSpecification():
            return PrivilegeError(f"PostgreSQL refuses the login: {text}")
        case psycopg.errors.InsufficientPrivilege():
            return PrivilegeError(f"{text}. Grant the role that roles.sql defines for this process")
        case psycopg.errors.UndefinedTable() | psycopg.errors.InvalidSchemaName() | psycopg.errors.UndefinedFunction():
            return SchemaError(f"{text}. Install or upgrade the schema: pgbridge migrate")
        case psycopg.errors.ReadOnlySqlTransaction():
            return ReadOnlyServerError(f"{text}. This server is a standby or read-only; connect to the primary")
        case psycopg.OperationalError() | psycopg.InterfaceError():
            return _unreachable(text)
        case _:
            return RefusedError(f"PostgreSQL refuses: {text}")


def _unreachable(text: str) -> DatabaseUnavailableError | PrivilegeError:
    # libpq reports what failed while connecting only as text, in English whatever the locale.
    if "password authentication failed" in text or "no password supplied" in text:
        return PrivilegeError(f"PostgreSQL refuses the login: {text}. Mend the DSN or the role's password")
    if "session is read-only" in text:
        return ReadOnlyServerError(
            f"{text}. It is a hot standby, or default_transaction_read_only is on for this role or database. "
            "Point the DSN to the primary, or name all hosts in it"
        )
    return DatabaseUnavailableError(f"PostgreSQL does not answer: {text}")


def _one_line(error: psycopg.Error) -> str:
    primary = error.diag.message_primary if error.diag else None
    return " ".join((primary or str(error) or type(error).__name__).split())
