"""A lock that many hold together, or one holds alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class SharedLock:
    """Whoever wants it alone waits for those who share it, and meanwhile nobody else comes to share it."""

    def __init__(self) -> None:
        self._sharing = 0
        self._nobody_shares = asyncio.Event()
        self._nobody_shares.set()
        self._may_share = asyncio.Event()
        self._may_share.set()
        self._excluding = asyncio.Lock()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Holds it together with others. Costs no suspension while nobody wants it alone."""
        while not self._may_share.is_set():
            await self._may_share.wait()
        self._sharing += 1
        self._nobody_shares.clear()
        try:
            yield
        finally:
            self._sharing -= 1
            if not self._sharing:
                self._nobody_shares.set()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Holds it alone."""
        async with self._excluding:
            self._may_share.clear()
            try:
                await self._nobody_shares.wait()
                yield
            finally:
                self._may_share.set()
