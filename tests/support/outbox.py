"""The log as the daemon reads it: one session, one sink that takes everything."""

import asyncio
from typing import Final

from pydantic import SecretStr

from bridge.settings import OutboxSettings, PostgresSettings
from bridge.sources.doorbell import Doorbell
from bridge.sources.log import PageBytes, Reader
from bridge.sources.outbox import Outbox, OutboxSource

READERS: Final = [Reader("events", ("#",))]


async def open_outbox(
    dsn: str,
    settings: OutboxSettings | None = None,
    doorbell: Doorbell | None = None,
    page_bytes: PageBytes | None = None,
) -> Outbox:
    """The outbox of the bridge `test`, which does not lead yet. Its session is the caller's to close."""
    session = await Outbox.connect("test", PostgresSettings(dsn=SecretStr(dsn)))
    return Outbox("test", session, settings or OutboxSettings(), doorbell or Doorbell(1.0), page_bytes)


async def lead(outbox: Outbox) -> OutboxSource:
    """Waits until it leads; gives the source of its one sink."""
    async with asyncio.timeout(5):
        await outbox.standby(READERS, asyncio.Event(), lambda: None)
    return outbox.sources[0]
