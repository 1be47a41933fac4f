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
    RefusedError,
    SchemaError,
    SettingsError,
)
from bridge.settings import PostgresSettings

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
    """An autocommit connection. Raises DatabaseUnavailableError, PrivilegeError, SettingsError."""
    parameters = {**connection_parameters(settings, application_name), **overrides}
    with database_errors():
        return await AsyncConnection.connect(**parameters, autocommit=True)


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
            return DatabaseUnavailableError(_reachable(text))
        case _:
            return RefusedError(f"PostgreSQL refuses: {text}")


def _reachable(text: str) -> str:
    if "password authentication failed" in text or "no password supplied" in text:
        return f"PostgreSQL refuses the login: {text}. Mend postgres.dsn or the role's password"
    return f"PostgreSQL does not answer: {text}"


def _one_line(error: psycopg.Error) -> str:
    primary = error.diag.message_primary if error.diag else None
    return " ".join((primary or str(error) or type(error).__name__).split())
