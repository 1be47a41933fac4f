"""One message in hand from a Pub/Sub subscription."""

import math
from typing import TYPE_CHECKING, Any

from bridge.brokers.pubsub.lease import MAX_LEASE
from bridge.event import Event, Malformed
from workers.queues import Failure

if TYPE_CHECKING:
    from bridge.brokers.pubsub.queue import PubSubQueue


class PubSubDelivery:
    """One message in hand; see `workers.queues.Delivery`."""

    def __init__(self, queue: "PubSubQueue", received: Any, event: Event | Malformed) -> None:
        self._queue = queue
        self.event = event
        self.message = received.message
        self.key: str = received.message.ordering_key
        self.ack_id: str = received.ack_id
        self.attempt: int = received.delivery_attempt or 1

    async def ack(self) -> None:
        await self._queue.ack(self)

    async def retry(self, delay: float) -> None:
        await self._queue.postpone(self, min(MAX_LEASE, math.ceil(delay)))

    async def dead_letter(self, failure: Failure) -> None:
        await self._queue.dead_letter(self, failure)

    async def give_back(self) -> None:
        await self._queue.give_back(self)
