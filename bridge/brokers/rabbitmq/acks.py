"""Acknowledgements of what one channel delivered: those of one turn of the event loop share a frame.

AMQP answers none of them. One that does not arrive means a redelivery, which a worker's inbox recognises, and never a
loss.
"""

import asyncio
from collections.abc import Iterable
from struct import Struct
from typing import Final

from bridge.brokers.rabbitmq.closure import ClosedError, Closure
from bridge.brokers.rabbitmq.connection import Connection

_SETTLE: Final = Struct(">BHIHHQBB")
"""A frame of basic.ack or basic.nack: type, channel, size, class, method, delivery tag, flags, end."""
_BASIC, _ACK, _NACK = 60, 80, 120
_MULTIPLE, _REQUEUE = 1, 2


class Tags:
    """Which tags are settled: all up to one, and some above it."""

    def __init__(self) -> None:
        self._below = 0
        self._above: set[int] = set()

    def settle(self, tags: Iterable[int]) -> int:
        """Notes that these are settled. Gives the highest tag up to which all are; 0 for none."""
        self._above.update(tags)
        while self._below + 1 in self._above:
            self._below += 1
            self._above.discard(self._below)
        return self._below


class Acks:
    """The acknowledgements of one channel.

    `ack` and `give_back` raise ClosedError when the connection is lost, or has taken nothing for `timeout` seconds.
    """

    def __init__(self, connection: Connection, channel: int, timeout: float) -> None:
        self._connection = connection
        self._channel = channel
        self._timeout = timeout
        self._tags = Tags()
        self._due: list[int] = []
        self._room = asyncio.Event()

    async def ack(self, tag: int) -> None:
        """Settles a message, which never comes again."""
        if not self._connection.has_room:
            await self._until_room()
        self.ack_soon(tag)

    def ack_soon(self, tag: int) -> None:
        """The same for what nobody works on: it waits for no room, and raises nothing."""
        if not self._due:
            asyncio.get_running_loop().call_soon(self.flush)
        self._due.append(tag)

    async def give_back(self, tag: int) -> None:
        """Lets a message come again at once."""
        if not self._connection.has_room:
            await self._until_room()
        self._tags.settle([tag])
        self._connection.write(self._frame(_NACK, tag, _REQUEUE))

    def has_room(self) -> None:
        """The connection takes more again."""
        self._room.set()

    async def _until_room(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                while not self._connection.has_room:
                    if self._connection.lost is not None:
                        raise ClosedError(self._connection.lost)
                    self._room.clear()
                    await self._room.wait()
        except TimeoutError:
            raise ClosedError(Closure(f"it took no acknowledgement for {self._timeout:g} s")) from None

    def flush(self) -> None:
        """Writes what is due."""
        due, self._due = self._due, []
        if not due or self._connection.lost is not None:
            return
        below = self._tags.settle(due)
        frames = [self._frame(_ACK, tag, 0) for tag in due if tag > below]
        # RabbitMQ closes the channel for a tag that it has settled before, so the frame names one of these.
        if together := [tag for tag in due if tag <= below]:
            frames.append(self._frame(_ACK, max(together), _MULTIPLE))
        self._connection.write(b"".join(frames))

    def _frame(self, method: int, tag: int, flags: int) -> bytes:
        return _SETTLE.pack(1, self._channel, 13, _BASIC, method, tag, flags, 0xCE)
