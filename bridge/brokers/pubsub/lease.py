"""Leases of messages in hand: extended until they are settled; acknowledgements share requests."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import structlog
from google.pubsub_v1 import types

from bridge.brokers.pubsub.connection import Connection
from bridge.errors import PgbridgeError
from bridge.process.batching import Batcher

log = structlog.get_logger()

IDS_IN_REQUEST: Final = 1000
"""Most ack ids in one request; the service takes half a megabyte, and an id has some two hundred bytes."""

CLOSE_LIMIT: Final = 2.0
"""Seconds that giving back at a close may take."""

_Acknowledge: Final = types.AcknowledgeRequest.pb()
_Modify: Final = types.ModifyAckDeadlineRequest.pb()


class Leases:
    """The messages of one subscription that this process has in hand.

    `lost` is called when a lease cannot be extended.
    """

    def __init__(
        self, connection: Connection, subscription: str, deadline: int, lost: Callable[[PgbridgeError], None]
    ) -> None:
        """`deadline`: the subscription's, in seconds."""
        self._connection = connection
        self._subscription = subscription
        self._deadline = deadline
        self._lost = lost
        self._held: dict[str, None] = {}
        self._acks = Batcher(self._acknowledge, IDS_IN_REQUEST)
        self._extending = asyncio.create_task(self._extend())

    def hold(self, ack_id: str) -> None:
        """Keeps a message in hand until it is acknowledged or released."""
        self._held[ack_id] = None

    async def acknowledge(self, ack_id: str) -> None:
        """Returns once the service has taken it. Raises BrokerUnavailableError or RefusedError."""
        self._held.pop(ack_id, None)
        await self._acks.ask(ack_id)

    @property
    def count(self) -> int:
        """How many messages are in hand."""
        return len(self._held)

    async def release(self, ack_ids: Sequence[str], seconds: int) -> None:
        """Lets messages come again after this time, in their order. Raises as `acknowledge`."""
        for ack_id in ack_ids:
            self._held.pop(ack_id, None)
        await self._modify(ack_ids, seconds)

    async def extend(self, *, limit: float) -> None:
        """Makes every lease as long as the subscription's deadline, within `limit` seconds. Raises as `acknowledge`."""
        await self._modify(list(self._held), self._deadline, limit=limit)

    async def close(self) -> None:
        """Gives back what is in hand, if the service answers soon."""
        self._extending.cancel()
        await asyncio.wait([self._extending])
        held = list(self._held)
        self._held.clear()
        await self._acks.drain(CLOSE_LIMIT)
        try:
            await self._modify(held, 0, limit=CLOSE_LIMIT)
        except PgbridgeError as error:
            log.debug("pubsub.leases_run_out", messages=len(held), seconds=self._deadline, reason=str(error))

    async def _acknowledge(self, ack_ids: Sequence[str]) -> Sequence[None]:
        request = _Acknowledge(subscription=self._subscription, ack_ids=ack_ids)
        await self._connection.call(self._connection.acknowledge, request)
        return [None] * len(ack_ids)

    async def _extend(self) -> None:
        """Extends every lease three times in its length, so that one lost request does no harm."""
        while True:
            await asyncio.sleep(self._deadline / 3)
            try:
                await self.extend(limit=self._deadline / 3)
            except PgbridgeError as error:
                self._lost(error)
                return

    async def _modify(self, ack_ids: Sequence[str], seconds: int, *, limit: float = 30.0) -> None:
        for part in _parts(ack_ids):
            request = _Modify(subscription=self._subscription, ack_ids=part, ack_deadline_seconds=seconds)
            await self._connection.call(self._connection.modify_ack_deadline, request, limit=limit)


def _parts(ack_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ack_ids), IDS_IN_REQUEST):
        yield ack_ids[start : start + IDS_IN_REQUEST]
