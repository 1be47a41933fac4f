"""What arrives on a connection while no statement waits for it."""

import asyncio

from psycopg import AsyncConnection

from bridge.postgres.wire import Connection


class Hearing(Connection):
    """Tells when it has read something that no statement waited for."""

    has_heard: asyncio.Event

    def _hear(self) -> None:
        super()._hear()
        self.has_heard.set()


async def test_a_notification_that_comes_while_nobody_waits_is_not_forgotten(database: str) -> None:
    async with (
        await Hearing.connect(database, autocommit=True) as listening,
        await AsyncConnection.connect(database, autocommit=True) as sender,
    ):
        listening.has_heard = asyncio.Event()
        await listening.execute("listen news")
        await sender.execute("notify news, 'one'")
        await listening.has_heard.wait()
        heard = [each.payload async for each in listening.notifies(timeout=0.1, stop_after=1)]
    assert heard == ["one"]
