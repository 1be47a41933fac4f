"""The session with PostgreSQL that a worker process' claims live and die with.

It holds an advisory lock on a random number, the *token*, which the claims of the inbox carry. PostgreSQL releases the
lock when the session ends, however the process died, and so frees the claims. A process that stands still says nothing
here, and PostgreSQL ends its session. Nothing but that sign of life runs on the connection.
"""

import asyncio
import secrets
from collections import deque
from typing import Final

import structlog

from bridge.errors import DatabaseUnavailableError
from bridge.postgres.connection import answered, connect
from bridge.postgres.pooler import require_own_session
from bridge.postgres.wire import Connection
from bridge.settings import PostgresSettings

log = structlog.get_logger()

HEARTBEAT: Final = 10.0
"""Seconds between two signs of life, and for the answer to one."""

_SETTINGS: Final = (
    # The server must notice within seconds that our machine is gone,
    "set tcp_keepalives_idle = 10",
    "set tcp_keepalives_interval = 5",
    "set tcp_keepalives_count = 3",
    # and that our process stands still, which the kernel goes on to answer for. It is given three signs of life.
    f"set idle_session_timeout = '{3 * HEARTBEAT:g}s'",
)

_FORMER: Final = 16
"""Tokens that are remembered after their sessions: claims under them were asked for shortly before a session ended."""


class ClaimSession:
    """The session of one process, and its token: a new one whenever the session had to be opened anew."""

    def __init__(self, settings: PostgresSettings, application_name: str) -> None:
        self._settings = settings
        self._key = settings.key("dsn")
        self._application_name = application_name
        self._connection: Connection | None = None
        self._using = asyncio.Lock()
        self.token = 0
        """0 until the first `renew`; no lock is ever held on 0."""
        self.former: deque[int] = deque(maxlen=_FORMER)
        """Tokens of this process whose sessions have ended."""

    async def renew(self, instead_of: int) -> None:
        """Opens a session with a new token; does nothing when another task has replaced `instead_of` already.

        Raises what `bridge.postgres.connection.connect` raises, and RefusedError behind a pooler in transaction mode,
        where a session lock stays with a server connection that outlives this process.
        """
        async with self._using:
            if self.token != instead_of:
                return
            await self.close()
            self._connection = connection = await connect(self._settings, self._application_name)
            try:
                await require_own_session(connection, self._settings, self._application_name)
            except BaseException:
                await self.close()
                raise
            token = secrets.randbits(62) + 1
            with answered(connection, self._key, HEARTBEAT):
                await connection.execute("; ".join(_SETTINGS).encode())
                [(locked,)] = await (await connection.execute("select pg_try_advisory_lock(%s)", [token])).fetchall()
            if not locked:
                raise DatabaseUnavailableError(f"{self._key}: another process holds the same token; taking a new one")
            if self.token:
                log.warning("inbox.token_renewed", session=self._application_name)
                self.former.append(self.token)
            self.token = token

    async def beat(self) -> None:
        """Gives a sign of life, and waits for one of PostgreSQL. Raises DatabaseUnavailableError where none comes, and
        where the session has ended."""
        async with self._using:
            if self._connection is None:
                raise DatabaseUnavailableError(f"{self._key}: the session of the worker's claims is not open")
            with answered(self._connection, self._key, HEARTBEAT):
                await self._connection.execute("select")

    async def close(self) -> None:
        """Ends the session; its claims become free for other processes."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = None
