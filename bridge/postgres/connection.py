"""How we connect to PostgreSQL, and what its errors mean to us.

A dead peer must be noticed within seconds, on idle connections too: keepalives probe it, `tcp_user_timeout`
gives up on unacknowledged data, and a multi-host DSN goes on to the host that accepts writes. What a role, a database
or a server sets for every session in it does not reach ours where we rely on something else.
"""

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection, conninfo
from psycopg.rows import TupleRow

from bridge.errors import (
    DatabaseUnavailableError,
    LoginError,
    NoAnswerError,
    PgbridgeError,
    PrivilegeError,
    ReadOnlyServerError,
    RefusedError,
    SchemaError,
    SettingsError,
)
from bridge.postgres.certificates import find_the_systems, require_files
from bridge.postgres.refusals import connection_refused
from bridge.postgres.wire import Connection
from bridge.settings import PostgresSettings

OLDEST_POSTGRES: Final = 14
"""The oldest major version that has what we use: idle_session_timeout, multiranges, parsed SQL functions."""

ANSWER_LIMIT: Final = 30.0
"""Seconds of silence on a connection that owes an answer, after which it counts as dead. Keepalives cannot show it
where a proxy or a load balancer is in between, since that is what acknowledges them."""

_LOOKS: Final = 10
"""So often is a silent connection looked at before it is given up. Looks are counted and not seconds, since a process
that was frozen for a minute has heard nothing in it, and yet its answer may have come."""

DSN_KEY: Final = "postgres.dsn"
"""The setting that nearly every connection comes from. Errors begin with it, or with the key that a caller names."""

_DEFAULTS: Final[dict[str, str]] = {
    "keepalives": "1",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "target_session_attrs": "read-write",
}


_ENCODING: Final = "UTF8"
"""What text is sent and received as. Another one, such as a role may have, cannot carry every payload."""

_SESSION_SETTINGS: Final = """
select set_config(name, value, false)
from (values
    -- Limits of time: a statement of ours is given up when nothing comes any more, and a listener has a heartbeat.
    ('statement_timeout', '0'),
    ('transaction_timeout', '0'),
    ('lock_timeout', '0'),
    ('idle_session_timeout', '0'),
    ('idle_in_transaction_session_timeout', '0'),
    -- What is read after a lock was taken must be as new as the lock.
    ('default_transaction_isolation', 'read committed'),
    -- The forms in which psycopg can read times.
    ('DateStyle', 'ISO'),
    ('IntervalStyle', 'postgres'),
    ('TimeZone', 'UTC')
) relied_on (name, value)
where current_setting(name, true) is not null
"""
"""What sessions of ours rely on; a caller may set more. The condition leaves out what an older server does not have.
A statement and no start parameters, since PgBouncer refuses those."""


def connection_parameters(settings: PostgresSettings, application_name: str) -> dict[str, Any]:
    """libpq parameters for `psycopg.connect(**parameters)`; what the DSN says wins over our defaults.

    Raises SettingsError when the DSN cannot be parsed, or names a certificate that is not there.
    """
    dsn = settings.dsn.get_secret_value()
    key = settings.key("dsn")
    # libpq's messages repeat parts of the DSN, which may hold the password, so none of them is shown.
    if _is_cut_wrongly(dsn):
        raise SettingsError(
            f"{key}: it cannot be seen where the password ends and the host begins. "
            "In user, password and database write '@' as %40 and '/' as %2F"
        )
    try:
        given = conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        raise SettingsError(
            f"{key}: is not a libpq connection string; "
            'write "postgresql://user@host:5432/database" or "host=... dbname=... user=..."'
        ) from None
    if not re.fullmatch(r"[\d,]*", str(given.get("port", ""))):
        raise SettingsError(f"{key}: the port is not a number")
    require_files(given, key)
    find_the_systems(given)
    return {
        **_DEFAULTS,
        "connect_timeout": max(2, round(settings.connect_timeout)),
        **given,
        "application_name": application_name,
        "client_encoding": _ENCODING,
    }


def has_password(dsn: str) -> bool:
    """Whether a connection string holds one; False for what is none."""
    try:
        return "password" in conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        return False


def _is_cut_wrongly(dsn: str) -> bool:
    """Whether a URI has a character in its password that makes libpq take the rest of it for a host."""
    scheme, found, rest = dsn.partition("://")
    place = rest.partition("?")[0]
    user, at, behind = place.partition("@")
    return bool(found) and scheme in ("postgresql", "postgres") and bool(at) and ("@" in behind or "/" in user)


async def connect(settings: PostgresSettings, application_name: str) -> Connection:
    """An autocommit connection.

    Raises SettingsError for what the DSN holds, DatabaseUnavailableError, ReadOnlyServerError, LoginError,
    PrivilegeError, RefusedError for what the server says, and what `require_database` raises.
    """
    key = settings.key("dsn")
    parameters = connection_parameters(settings, application_name)
    try:
        with connecting(parameters, key):
            connection = await Connection.connect(**parameters, autocommit=True)
    except ReadOnlyServerError:
        # libpq has one text for a standby and for a read-only role; what to change differs.
        anywhere = {**parameters, "target_session_attrs": "any"}
        with connecting(anywhere, key):
            looking = await AsyncConnection.connect(**anywhere, autocommit=True)
        async with looking:
            await require_writes(looking, key)
        raise
    try:
        await prepare_session(connection, key)
    except BaseException:
        await connection.close()
        raise
    return connection


async def prepare_session(connection: Connection, key: str) -> None:
    """Gives a new connection the settings that sessions of ours rely on.

    Raises what `require_database` raises, and what `answered` does.
    """
    require_database(connection.info, key)
    with answered(connection, key):
        await connection.execute(_SESSION_SETTINGS)


def connect_blocking(settings: PostgresSettings, application_name: str) -> psycopg.Connection[TupleRow]:
    """The same for a command that does one thing at a time; not autocommit. Raises what `connect` raises."""
    key = settings.key("dsn")
    parameters = connection_parameters(settings, application_name)
    with connecting(parameters, key):
        connection = psycopg.connect(**parameters)
    try:
        require_database(connection.info, key)
        with database_errors(key):
            connection.execute(_SESSION_SETTINGS)
            connection.commit()
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def connecting(parameters: Mapping[str, Any], key: str) -> Iterator[None]:
    """Turns a failure to connect into our error, which names `key`, the setting, and the server at `parameters`."""
    try:
        yield
    except psycopg.Error as error:
        raise connection_refused(error, parameters, key) from error
    except UnicodeError as error:
        raise SettingsError(f"{key}: a host in it is not a host name") from error


def require_database(info: psycopg.ConnectionInfo, key: str) -> None:
    """Looks at what the server says of itself at the login.

    Raises SchemaError on a server that is older than what our SQL needs, and for a database without an encoding.
    """
    major = info.server_version // 10_000
    if major < OLDEST_POSTGRES:
        raise SchemaError(f"{key}: this is PostgreSQL {major}; pgbridge needs {OLDEST_POSTGRES} or newer")
    if info.parameter_status("server_encoding") == "SQL_ASCII":
        raise SchemaError(
            f"{key}: the database {info.dbname!r} has the encoding SQL_ASCII: its texts are bytes of any encoding, and "
            "events must be UTF-8. Dump it, and restore it into one made with CREATE DATABASE ... ENCODING 'UTF8' "
            "TEMPLATE template0"
        )


async def require_writes(connection: AsyncConnection[TupleRow], key: str = DSN_KEY) -> None:
    """Raises ReadOnlyServerError, which says why, where nothing may be written."""
    with database_errors(key):
        cursor = await connection.execute("select pg_is_in_recovery(), current_setting('transaction_read_only')")
        row = await cursor.fetchone()
    if row is None or row[0]:
        raise ReadOnlyServerError(
            f"{key}: {connection.info.host}:{connection.info.port} is a hot standby, which can neither LISTEN nor "
            "store the cursor. Point the DSN to the primary, or name all hosts in it"
        )
    if row[1] == "on":
        raise ReadOnlyServerError(
            f"{key}: sessions of the role {connection.info.user!r} in the database {connection.info.dbname!r} are "
            "read-only (default_transaction_read_only), so the cursor cannot be stored. "
            "ALTER ROLE ... SET default_transaction_read_only = off, or the same for the database"
        )


@contextmanager
def database_errors(key: str = DSN_KEY) -> Iterator[None]:
    """Turns the errors of statements into ours, see `translated`."""
    try:
        yield
    except psycopg.Error as error:
        raise translated(error, key) from error


class silence_limited:  # noqa: N801 - used as contextlib.suppress is
    """Gives a connection up that is silent for `limit` seconds; default: ANSWER_LIMIT. Raises NoAnswerError then, and
    leaves all other errors as they are.

    An answer may take as long as it likes to arrive: what counts is that something does, be it a part of a large page.
    It ends the socket itself: a cancelled psycopg would ask the server to cancel too, and wait for it again.

    A class, since a generator for each of two was a tenth of what a look into an empty log costs.
    """

    __slots__ = ("_connection", "_given_up", "_key", "_loop", "_seen", "_silence", "_silent_looks", "_timer")

    def __init__(self, connection: Connection, key: str = DSN_KEY, limit: float | None = None) -> None:
        self._connection = connection
        self._key = key
        self._silence = ANSWER_LIMIT if limit is None else limit
        self._silent_looks = 0
        self._given_up = False

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._seen = self._connection.signs_of_life
        self._timer = self._loop.call_later(self._silence / _LOOKS, self._look)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._given_up and isinstance(error, psycopg.Error):
            raise NoAnswerError(f"{self._key}: PostgreSQL did not answer within {self._silence:g} s") from error

    def _look(self) -> None:
        heard = self._connection.signs_of_life
        self._silent_looks = self._silent_looks + 1 if heard == self._seen else 0
        self._seen = heard
        if self._silent_looks < _LOOKS:
            self._timer = self._loop.call_later(self._silence / _LOOKS, self._look)
        elif not self._connection.closed:
            self._given_up = True
            self._connection.end_wire()


class answered(silence_limited):  # noqa: N801
    """As `silence_limited`, and turns the other errors of statements into ours, see `translated`."""

    __slots__ = ()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, psycopg.Error):
            raise translated(error, self._key) from error


def translated(error: psycopg.Error, key: str = DSN_KEY) -> PgbridgeError:
    """Our error for a statement's, by its SQLSTATE; the message is the server's, which holds no secret.

    `key` names the setting that leads to the database.
    """
    text = _one_line(error)
    match error:
        case psycopg.errors.InvalidPassword() | psycopg.errors.InvalidAuthorizationSpecification():
            return LoginError(f"{key}: PostgreSQL refuses the login: {text}")
        case psycopg.errors.InsufficientPrivilege():
            mend = error.diag.message_hint or "Grant the role that roles.sql defines for this process"
            return PrivilegeError(f"{key}: {text}. {mend}")
        case psycopg.errors.UndefinedTable() | psycopg.errors.InvalidSchemaName() | psycopg.errors.UndefinedFunction():
            return SchemaError(f"{key}: {text}. Install or upgrade the schema: pgbridge migrate")
        case psycopg.errors.ReadOnlySqlTransaction():
            return ReadOnlyServerError(f"{key}: {text}. This server is a standby or read-only; connect to the primary")
        case psycopg.errors.AdminShutdown() | psycopg.errors.CrashShutdown() | psycopg.errors.CannotConnectNow():
            return DatabaseUnavailableError(f"{key}: PostgreSQL ended the session: {text}")
        case psycopg.OperationalError() | psycopg.InterfaceError() if error.sqlstate is None:
            return DatabaseUnavailableError(f"{key}: the connection to PostgreSQL is lost: {text}")
        case psycopg.OperationalError():
            return DatabaseUnavailableError(f"{key}: PostgreSQL cannot do this now: {text}")
        case _:
            return RefusedError(f"{key}: PostgreSQL refuses: {text}")


def _one_line(error: psycopg.Error) -> str:
    primary = error.diag.message_primary if error.diag else None
    return " ".join((primary or str(error) or type(error).__name__).split())
