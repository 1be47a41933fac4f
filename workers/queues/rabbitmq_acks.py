"""Acknowledges what came over one channel, with as few frames as can be: RabbitMQ answers for each in its quorum log.

Deliveries of a channel are numbered from 1 (their tags). One frame with `multiple` settles every delivery up to its
tag, so it may name only a tag below which nothing is open.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from aio_pika.abc import AbstractIncomingMessage
from aiormq.abc import AbstractChannel

from bridge.process.batching import Gathering

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
    """The acknowledgements of one channel. Both methods raise what aio-pika raises when the channel is gone."""

    def __init__(self, channel: AbstractChannel) -> None:
        self._channel = channel
        self._tags = Tags()
        self._gathering = Gathering(self._ack_together, _TOGETHER)

    async def ack(self, message: AbstractIncomingMessage) -> None:
        """Settles a message for ever; returns when that is on its way."""
        await self._gathering(_tag(message))

    async def give_back(self, message: AbstractIncomingMessage) -> None:
        """Lets a message come again at once."""
        tag = _tag(message)
        await self._channel.basic_nack(tag, requeue=True)
        self._tags.settle([tag])

    async def _ack_together(self, tags: Sequence[int]) -> Sequence[None]:
        below = self._tags.settle(tags)
        frames = [(tag, False) for tag in tags if tag > below]
        # RabbitMQ closes the channel for a tag that it has settled before, so the frame names one of these.
        if together := [tag for tag in tags if tag <= below]:
            frames.append((max(together), True))
        for number, (tag, multiple) in enumerate(frames, 1):
            await self._channel.basic_ack(tag, multiple=multiple, wait=number == len(frames))
        return [None] * len(tags)


def _tag(message: AbstractIncomingMessage) -> int:
    if message.delivery_tag is None:
        raise RuntimeError("a message that was not delivered cannot be settled")
    return message.delivery_tag
