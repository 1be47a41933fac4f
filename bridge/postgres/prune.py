"""Deleting what is settled and older than the retention: in small chunks, on a connection of its own."""

import asyncio
import time
from datetime import timedelta
from typing import Final

import structlog

from bridge.errors import PgbridgeError
from bridge.postgres.connection import connect, database_errors
from bridge.postgres.wire import Connection
from bridge.process.metrics import EVENTS_PRUNED
from bridge.process.outage import Outage
from bridge.settings import Settings

log = structlog.get_logger()

CHUNK: Final = 2000
"""Rows in one DELETE: a few milliseconds."""


async def prune_for_ever(settings: Settings, outage: Outage) -> None:
    """Prunes in rounds until it is cancelled. A failure is told by `outage`, and the next round tries again."""
    outbox = settings.outbox_or_default
    after = 0
    try:
        while True:
            try:
                connection = await connect(settings.postgres, f"pgbridge {settings.name} prune")
                async with connection:
                    # Rows that a crash brings back are deleted by a later round: the commit need not wait for the disk.
                    with database_errors():
                        await connection.execute("set synchronous_commit = off")
                    deleted, after = await prune(connection, outbox.retention, after)
                if deleted:
                    log.info("outbox.pruned", events=deleted)
            except PgbridgeError as error:
                outage.lost(error)
            else:
                outage.restored()
            await asyncio.sleep(outbox.prune_interval)
    finally:
        outage.dismiss()


async def prune(connection: Connection, retention: float, after: int = 0, chunk: int = CHUNK) -> tuple[int, int]:
    """One round: deletes until nothing is due. Returns how many, and where the next round may begin.

    `retention` in seconds; `after`: an id below which the last round left nothing. Rests after each chunk for as long
    as it took, so that at most half of the time goes into deleting. Raises DatabaseUnavailableError, PrivilegeError,
    SchemaError.
    """
    total = 0
    while True:
        began = time.monotonic()
        with database_errors():
            cursor = await connection.execute(
                "select deleted, next_after from bridge.prune(clock_timestamp() - %s, %s, %s)",
                (timedelta(seconds=retention), chunk, after),
            )
            [(deleted, after)] = await cursor.fetchall()
        total += deleted
        EVENTS_PRUNED.inc(deleted)
        if not deleted:
            return total, after
        await asyncio.sleep(time.monotonic() - began)
