"""How we connect to PostgreSQL, and what its errors mean to us.

A dead peer must be noticed within seconds, on idle connections too: keepalives probe it, `tcp_user_timeout`
gives up on unacknowledged data, and a multi-host DSN goes on to the host that accepts writes.
"""

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

_DEFAULTS: dict[str, str] = {
    "keepalives": "1",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "target_session_attrs": "read-write",
}


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
    with database_errors():
        connection = await AsyncConnection.connect(**parameters, autocommit=True)
    major = connection.info.server_version // 10_000
    if major < OLDEST_POSTGRES:
        await connection.close()
        raise SchemaError(f"this is PostgreSQL {major}; pgbridge needs {OLDEST_POSTGRES} or newer")
    return connection


@contextmanager
def database_errors() -> Iterator[None]:
    """Turns psycopg's errors into ours: gone (try again), not allowed, not installed, refused."""
    try:
        yield
    except psycopg.Error as error:
        raise translated(error) from error


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
            return RefusedError(f"{text}. This server is a standby or read-only; connect to the primary")
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
