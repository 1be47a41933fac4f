"""Plain pg_notify written to the log, from where the outbox carries it (`buffer = "outbox"`).

What was heard is bounded in memory: while the last batch is not stored, the listener stops reading from the server.
"""

import asyncio
from collections import deque

import structlog
from psycopg import AsyncConnection, Notify
from psycopg.rows import TupleRow

from bridge.errors import PgbridgeError
from bridge.postgres.connection import answered, connect
from bridge.process.metrics import NOTIFICATIONS, NOTIFICATIONS_DROPPED
from bridge.settings import ChannelsSettings, PostgresSettings
from bridge.sources.deafness import GapWatch
from bridge.sources.listener import Listener
from bridge.supervise import background, one_error

log = structlog.get_logger()

_BATCH = 2000
"""Notifications in one INSERT."""


class Intake:
    """Writes notifications into the log, in batches, durably; from there the outbox carries them."""

    def __init__(self, name: str, postgres: PostgresSettings, channels: ChannelsSettings) -> None:
        self._name = name
        self._postgres = postgres
        self._channels = channels
        self._heard: deque[Notify] = deque()
        self._arrived = asyncio.Event()
        self._gap = GapWatch()
        self.room = asyncio.Event()
        self.room.set()

    async def session(self) -> None:
        """Listens and stores until a connection is lost; what it holds then stays for the next session.

        Raises DatabaseUnavailableError, PrivilegeError, ListenError.
        """
        listener = Listener(
            self._postgres,
            self._channels.listen,
            self.hear,
            room=self.room,
            heartbeat=self._channels.heartbeat,
            application_name=f"pgbridge {self._name} channels",
        )
        try:
            await listener.open()
            with one_error():
                async with background(self._store_for_ever()):
                    await listener.run(self._gap.restored)
        except PgbridgeError as error:
            self._gap.lost(str(error))
            raise
        except asyncio.CancelledError:
            self._gap.lost(None)
            raise
        finally:
            await listener.close()

    def hear(self, notification: Notify) -> None:
        """Takes one notification; clears `room` when the listener has to wait."""
        NOTIFICATIONS.inc()
        self._heard.append(notification)
        self._arrived.set()
        if len(self._heard) >= self._channels.buffer_events:
            self.room.clear()

    async def _store_for_ever(self) -> None:
        connection = await connect(self._postgres, f"pgbridge {self._name} intake")
        try:
            while True:
                while not self._heard:
                    self._arrived.clear()
                    await self._arrived.wait()
                await self._store(connection)
        finally:
            await connection.close()

    async def drain(self) -> None:
        """Stores what is still held, at a clean stop. Raises PgbridgeError, after saying how much is lost with it."""
        if not self._heard:
            return
        try:
            connection = await connect(self._postgres, f"pgbridge {self._name} intake")
            try:
                while self._heard:
                    await self._store(connection)
            finally:
                await connection.close()
        finally:
            if self._heard:
                NOTIFICATIONS_DROPPED.inc(len(self._heard))
                log.error("channels.dropped", events=len(self._heard))

    async def _store(self, connection: AsyncConnection[TupleRow]) -> None:
        batch = [self._heard[index] for index in range(min(_BATCH, len(self._heard)))]
        with answered(connection):
            await connection.execute(
                "select bridge.intake(%s, %s)",
                ([n.channel for n in batch], [n.payload for n in batch]),
            )
        # Only now, since a lost session must leave them here for the next one.
        for _ in batch:
            self._heard.popleft()
        self.room.set()
