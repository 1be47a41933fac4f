"""A connection that only listens, and proves that it hears.

LISTEN through a transaction pooler, or a half-open connection, is silent loss. So the listener must hear a NOTIFY that
another connection sends, at the start and at every heartbeat. It must be another one: a NOTIFY of the listening
connection's own would be heard through a pooler too, and its answer would bring all that waits for the listener,
however little room there is. And it is one that the process has anyway, so that a listener needs no free connection
slot to go on. The loop over notifications only appends: psycopg's generator holds the connection's lock, and leaving it
in the middle of a batch would drop the rest.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Final

from psycopg import Notify, sql

from bridge.errors import DatabaseUnavailableError, ListenError
from bridge.postgres.connection import answered, connect, database_errors
from bridge.postgres.wire import Connection
from bridge.settings import PostgresSettings

_SLICE: Final = 0.5
"""Seconds that one run of psycopg's generator lasts; between two runs the heartbeat is looked at."""

_PROBE_TIMEOUT: Final = 5.0
"""Seconds without any notification after which the own NOTIFY counts as not heard."""


class Listener:
    """LISTENs on channels and hands every notification to `heard`, on the event loop, in order.

    While `room` is given and clear, nothing more is read from the server.
    """

    def __init__(
        self,
        settings: PostgresSettings,
        channels: Sequence[str],
        heard: Callable[[Notify], None],
        *,
        room: asyncio.Event | None = None,
        heartbeat: float = 30.0,
        application_name: str = "pgbridge listener",
        sender: Connection | None = None,
    ) -> None:
        """`heartbeat` in seconds; for `sender` see the attribute."""
        self._settings = settings
        self._channels = tuple(channels)
        self._heard = heard
        self._room = room
        self._heartbeat = heartbeat
        self._application_name = application_name
        self.sender = sender
        """A session of this process whose end ends the listener too, on which the probes are sent. While there is none,
        each probe takes a connection of its own."""
        self._probe_channel = f"pgbridge_probe_{secrets.token_hex(8)}"
        self._connection: Connection | None = None
        self._probed = asyncio.Event()
        self._last_heard = 0.0

    async def open(self) -> None:
        """Connects and listens. Raises DatabaseUnavailableError, and RefusedError on a standby."""
        self._connection = await connect(self._settings, self._application_name)
        with answered(self._connection):
            for channel in (*self._channels, self._probe_channel):
                await self._connection.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))

    async def run(self, ready: Callable[[], None]) -> None:
        """Listens until it is cancelled; calls `ready` once it has heard itself.

        Raises ListenError when it does not hear itself at the start, DatabaseUnavailableError when it stops hearing.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._prove(ready))

    async def close(self) -> None:
        """Disconnects."""
        if self._connection is not None:
            await self._connection.close()

    async def _listen(self) -> None:
        assert self._connection is not None, "open() comes first"  # noqa: S101 - a mistake of the caller
        while True:
            with database_errors():
                # One batch at a time, handed over whole: what psycopg has taken from the wire must not be lost.
                async for notification in self._connection.notifies(timeout=_SLICE, stop_after=1):
                    self._last_heard = time.monotonic()
                    if notification.channel == self._probe_channel:
                        self._probed.set()
                    else:
                        self._heard(notification)
            if self._room is not None and not self._room.is_set():
                # Not reading leaves the rest with the server, which holds it in its queue.
                await self._room.wait()
                self._last_heard = time.monotonic()

    async def _prove(self, ready: Callable[[], None]) -> None:
        """Sends a probe at the start and at every heartbeat, and waits until it is heard."""
        if not await self._heard_itself():
            raise ListenError(
                f"{self._settings.key('dsn')}: the connection that listens did not hear a NOTIFY within "
                f"{_PROBE_TIMEOUT:g} s. Is there a pooler in transaction mode (PgBouncer) between? Connect to the "
                "server itself, or to a pool in session mode"
            )
        ready()
        while True:
            await asyncio.sleep(self._heartbeat)
            if not await self._heard_itself():
                raise DatabaseUnavailableError(
                    f"{self._settings.key('dsn')}: the listening connection no longer hears; it is opened anew"
                )

    async def _heard_itself(self) -> bool:
        self._probed.clear()
        if self.sender is not None:
            await self._send_probe(self.sender)
        else:
            sender = await connect(self._settings, f"{self._application_name} probe")
            try:
                await self._send_probe(sender)
            finally:
                await sender.close()
        self._last_heard = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(_PROBE_TIMEOUT):
                    await self._probed.wait()
                return True
            except TimeoutError:
                # Behind a flood the probe comes late; only silence is a sign.
                if self._reads and time.monotonic() - self._last_heard >= _PROBE_TIMEOUT:
                    return False

    async def _send_probe(self, sender: Connection) -> None:
        with answered(sender, self._settings.key("dsn")):
            await sender.execute("select pg_notify(%s, '')", (self._probe_channel,))

    @property
    def _reads(self) -> bool:
        return self._room is None or self._room.is_set()
