"""Acknowledgements of what one channel delivered: those that end together share a frame.

AMQP answers none of them. Each returns once it is written to the connection: one that does not arrive means a
redelivery, which a worker's inbox recognises, and never a loss.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from aio_pika.abc import AbstractIncomingMessage
from aiormq.abc import AbstractChannel

from bridge.brokers.rabbitmq.client import refusals
from bridge.brokers.rabbitmq.closure import Closure
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.process.batching import Batcher

_TOGETHER: Final = 1000
"""Most acknowledgements that are sent at once."""


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

    Both methods raise BrokerUnavailableError when the channel is gone, or has not taken them for `publish_timeout`.
    """

    def __init__(
        self, channel: AbstractChannel, settings: RabbitMQSettings, lost: Callable[[], Closure | None] = lambda: None
    ) -> None:
        """`lost` gives what ended the channel, where that is known."""
        self._channel = channel
        self._settings = settings
        self._lost = lost
        self._tags = Tags()
        self._batcher = Batcher(self._ack_together, _TOGETHER)

    async def ack(self, message: AbstractIncomingMessage) -> None:
        """Settles a message, which never comes again."""
        await self._batcher.ask(_tag(message))

    async def give_back(self, message: AbstractIncomingMessage) -> None:
        """Lets a message come again at once."""
        tag = _tag(message)
        with refusals(self._settings, self._lost):
            async with asyncio.timeout(self._settings.publish_timeout):
                await self._channel.basic_nack(tag, requeue=True)
        self._tags.settle([tag])

    async def _ack_together(self, tags: Sequence[int]) -> Sequence[None]:
        below = self._tags.settle(tags)
        frames = [(tag, False) for tag in tags if tag > below]
        # RabbitMQ closes the channel for a tag that it has settled before, so the frame names one of these.
        if together := [tag for tag in tags if tag <= below]:
            frames.append((max(together), True))
        with refusals(self._settings, self._lost):
            async with asyncio.timeout(self._settings.publish_timeout):
                for number, (tag, multiple) in enumerate(frames, 1):
                    await self._channel.basic_ack(tag, multiple=multiple, wait=number == len(frames))
        return [None] * len(tags)


def _tag(message: AbstractIncomingMessage) -> int:
    if message.delivery_tag is None:
        raise RuntimeError("a message that was not delivered cannot be settled")
    return message.delivery_tag
