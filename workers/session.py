"""The session with PostgreSQL that a worker process' claims live and die with.

It holds an advisory lock on a random number, the *token*, which the claims of the inbox carry. PostgreSQL releases the
lock when the session ends, however the process died, and so frees the claims. Nothing else runs on the connection.
"""

import asyncio
import secrets
from typing import Final, LiteralString

from bridge.errors import DatabaseUnavailableError, RefusedError
from bridge.postgres.connection import Connection, connect, database_errors
from bridge.settings import PostgresSettings

_SETTINGS: Final[tuple[LiteralString, ...]] = (
    # The server must notice within seconds that our machine is gone, and never end us for being idle.
    "set tcp_keepalives_idle = 10",
    "set tcp_keepalives_interval = 5",
    "set tcp_keepalives_count = 3",
    "set idle_session_timeout = 0",
)


class ClaimSession:
    """The session of one process, and its token: a new one whenever the session had to be opened anew."""

    def __init__(self, settings: PostgresSettings, application_name: str) -> None:
        self._settings = settings
        self._application_name = application_name
        self._connection: Connection | None = None
        self._renewing = asyncio.Lock()
        self.token = 0
        """0 until the first `renew`; no lock is ever held on 0."""

    async def renew(self, instead_of: int) -> None:
        """Opens a session with a new token; does nothing when another task has replaced `instead_of` already.

        Raises what `bridge.postgres.connection.connect` raises, and RefusedError behind a connection pooler, where a
        session lock stays with a server connection that outlives this process.
        """
        async with self._renewing:
            if self.token != instead_of:
                return
            await self.close()
            self._connection = connection = await connect(self._settings, self._application_name)
            token = secrets.randbits(62) + 1
            with database_errors(self._settings.key("dsn")):
                for setting in _SETTINGS:
                    await connection.execute(setting)
                rows = await (
                    await connection.execute("select pg_backend_pid(), pg_try_advisory_lock(%s)", [token])
                ).fetchall()
            [(backend, locked)] = rows
            if backend != connection.info.backend_pid:
                await self.close()
                raise RefusedError(
                    f"{self._settings.key('dsn')}: a connection pooler is between this worker and PostgreSQL, where "
                    "session locks get lost. Connect to the server's own host and port"
                )
            if not locked:
                raise DatabaseUnavailableError(
                    f"{self._settings.key('dsn')}: another process holds the same token; taking a new one"
                )
            self.token = token

    async def close(self) -> None:
        """Ends the session; its claims become free for other processes."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = None
