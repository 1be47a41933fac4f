"""Leases of messages in hand: extended until they are settled; acknowledgements share requests."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import structlog
from google.pubsub_v1 import types

from bridge.brokers.pubsub.connection import Connection
from bridge.errors import BrokerUnavailableError, PgbridgeError
from bridge.process.batching import Batcher

log = structlog.get_logger()

IDS_IN_REQUEST: Final = 1000
"""Most ack ids in one request; the service takes half a megabyte, and an id has some two hundred bytes."""

SETTLE_LIMIT: Final = 10.0
"""Seconds within which the service must answer a request that settles messages."""

CLOSE_LIMIT: Final = 2.0
"""Seconds that giving back at a close may take."""

_Acknowledge: Final = types.AcknowledgeRequest.pb()
_Modify: Final = types.ModifyAckDeadlineRequest.pb()


class Leases:
    """The messages of one subscription that this process has in hand.

    A message stays in hand until the service has taken that it is settled: what failed to be is extended as before, and
    is given back at the close. `lost` is called when leases cannot be extended.
    """

    def __init__(
        self,
        connection: Connection,
        subscription: str,
        deadline: int,
        lost: Callable[[PgbridgeError], None],
        *,
        soonest: int = 0,
        may_lapse: bool = True,
    ) -> None:
        """`deadline`: the subscription's, in seconds; `soonest`: the shortest after which what is released may come.
        Unless it `may_lapse`, leases that ran out, as while the process stood still, are lost, and not extended."""
        self._connection = connection
        self._subscription = subscription
        self._deadline = deadline
        self._soonest = soonest
        self._may_lapse = may_lapse
        self._extended = asyncio.get_running_loop().time()
        """When what is in hand was last extended, as far as the service is known to have taken it."""
        self._lost = lost
        self._held: dict[str, None] = {}
        self._releasing: set[str] = set()
        """Of those, the ones that are on their way back, which nothing must extend."""
        self._acks = Batcher(self._acknowledge, IDS_IN_REQUEST)
        self._not_extending = asyncio.Event()
        self._not_extending.set()
        self._extending = asyncio.create_task(self._extend_for_ever())

    def hold(self, ack_id: str) -> None:
        """Keeps a message in hand until it is acknowledged or released."""
        self._held[ack_id] = None

    async def acknowledge(self, ack_id: str) -> None:
        """Returns once the service has taken it. Raises BrokerUnavailableError or RefusedError."""
        await self._acks.ask(ack_id)
        self._held.pop(ack_id, None)

    @property
    def count(self) -> int:
        """How many messages are in hand."""
        return len(self._held)

    async def release(self, ack_ids: Sequence[str], seconds: int) -> None:
        """Lets messages come again after this time, in their order. Raises as `acknowledge`."""
        self._releasing.update(ack_ids)
        try:
            await self._not_extending.wait()  # or the extension may arrive last, and count
            await self._modify(ack_ids, max(seconds, self._soonest), limit=SETTLE_LIMIT)
        finally:
            self._releasing.difference_update(ack_ids)
        for ack_id in ack_ids:
            self._held.pop(ack_id, None)

    async def extend(self, *, limit: float) -> None:
        """Makes every lease as long as the subscription's deadline, within `limit` seconds. Raises as `acknowledge`."""
        self.check()
        now = asyncio.get_running_loop().time()
        held = [ack_id for ack_id in self._held if ack_id not in self._releasing]
        self._not_extending.clear()
        try:
            await self._modify(held, self._deadline, limit=limit)
        finally:
            self._not_extending.set()
        self._extended = now

    def check(self) -> None:
        """Raises BrokerUnavailableError where leases may have run out that may not."""
        if not self._may_lapse and asyncio.get_running_loop().time() - self._extended >= self._deadline:
            raise BrokerUnavailableError(
                f"{self._connection.at()}: the leases of what was in hand ran out, since this process stood still for "
                f"{self._deadline} s or was not answered, so others may have it now"
            )

    async def close(self) -> None:
        """Gives back what is in hand, if the service answers soon."""
        self._extending.cancel()
        await asyncio.wait([self._extending])
        await self._acks.drain(CLOSE_LIMIT)
        held = list(self._held)
        self._held.clear()
        try:
            await self._modify(held, self._soonest, limit=CLOSE_LIMIT, reconnect=True)
        except PgbridgeError as error:
            log.debug("pubsub.leases_run_out", messages=len(held), seconds=self._deadline, reason=str(error))

    async def _acknowledge(self, ack_ids: Sequence[str]) -> Sequence[None]:
        request = _Acknowledge(subscription=self._subscription, ack_ids=ack_ids)
        await self._connection.call(self._connection.acknowledge, request, limit=SETTLE_LIMIT)
        return [None] * len(ack_ids)

    async def _extend_for_ever(self) -> None:
        """Three times in the length of a lease, so that a request that is answered late does no harm."""
        while True:
            await asyncio.sleep(self._deadline / 3)
            try:
                await self.extend(limit=min(self._deadline / 3, SETTLE_LIMIT))
            except PgbridgeError as error:
                self._lost(error)
                return

    async def _modify(self, ack_ids: Sequence[str], seconds: int, *, limit: float, reconnect: bool = False) -> None:
        for part in _parts(ack_ids):
            request = _Modify(subscription=self._subscription, ack_ids=part, ack_deadline_seconds=seconds)
            method = self._connection.modify_ack_deadline
            await self._connection.call(method, request, limit=limit, reconnect=reconnect)


def _parts(ack_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ack_ids), IDS_IN_REQUEST):
        yield ack_ids[start : start + IDS_IN_REQUEST]
