"""Whether a connection has a session of PostgreSQL to itself, or a pooler lends it one for each transaction.

Locks, LISTEN, prepared statements and settings of a session are safe behind a pooler in session mode, and lost in
transaction mode. No pooler says which it is in, so this looks.
"""

import secrets
from typing import Final

from psycopg import sql

from bridge.errors import RefusedError
from bridge.postgres.connection import answered, connect, database_errors
from bridge.postgres.wire import Connection
from bridge.settings import PostgresSettings

HEARING_LIMIT: Final = 5.0
"""Seconds in which a NOTIFY must be heard."""


async def is_pooled(connection: Connection, key: str) -> bool:
    """Whether a pooler is in between: it answers the login with a backend's number of its own."""
    return await _backend(connection, key) != connection.info.backend_pid


async def require_own_session(connection: Connection, settings: PostgresSettings, application_name: str) -> None:
    """Raises RefusedError behind a pooler that lends sessions for a transaction; and what `connect` raises, since
    behind a pooler, and only there, it takes a second connection for a moment.

    Nothing must be pending on the connection that stays with the session, such as a lock.
    """
    key = settings.key("dsn")
    if not await is_pooled(connection, key):
        return
    if not await _keeps_its_session(connection, settings, application_name):
        raise RefusedError(
            f"{key}: there is a pooler in transaction mode (PgBouncer) between: it lends another session for every "
            "transaction, where locks, LISTEN and prepared statements get lost. Connect to the server itself, or to a "
            "pool in session mode"
        )


async def _keeps_its_session(connection: Connection, settings: PostgresSettings, application_name: str) -> bool:
    key = settings.key("dsn")
    channel = f"pgbridge_probe_{secrets.token_hex(8)}"
    own = await _backend(connection, key)
    sender = await connect(settings, f"{application_name} probe")
    async with sender:
        # Nearly always a pool lends the session that came back last, so LISTEN need not be left in one.
        if await _backend(sender, key) == own:
            return False
        with answered(connection, key):
            await connection.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
        with answered(sender, key):
            await sender.execute("select pg_notify(%s, '')", (channel,))
    with database_errors(key):
        heard = [each async for each in connection.notifies(timeout=HEARING_LIMIT, stop_after=1)]
    with answered(connection, key):
        await connection.execute(sql.SQL("unlisten {}").format(sql.Identifier(channel)))
    return bool(heard)


async def _backend(connection: Connection, key: str) -> int:
    with answered(connection, key):
        [(backend,)] = await (await connection.execute("select pg_backend_pid()")).fetchall()
    return int(backend)
