"""A worker's queue on Google Cloud Pub/Sub: the subscription ``<worker>`` of the sink's topic, read by unary pulls.

- Unary pull, since the flow control of streaming pull counts messages that wait for their next attempt, so that a
  few of them would stop a worker.
- Leases are extended while a message is in hand. A retry lets the lease run for the delay instead of sending a nack,
  which knows no delay of its own. One of an ordered key takes along what is in hand behind it, so order is kept.
- A message leaves the hand once the service has taken what settles it, so that a verb that raises changes nothing, and
  what comes behind one on its way back goes with it. A close gives back all that is in hand.
- `attempt` is what the service counts: a delivery that was given back counts too, and one that waited in hand behind
  another. The inbox, which decides when attempts are exhausted, does not count those. Of an ordered worker's messages
  the service counts nothing, so there it is always 1.
- An ordered worker's queue relies on the service: while a message of a key is leased, nobody is given another one of
  that key, and what was leased comes again before what is behind it. Its session ends where leases may have run out.
- `lease` extends what is in hand, `order` holds back what waits behind one of its key, `topology` names subscription
  and dead-letter topic, `message` reads events and marks dead letters.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import grpc
from google.pubsub_v1 import types

from bridge.brokers.contract import Declaration, Failure, Subscription
from bridge.brokers.order import MOST_HELD, InOrder
from bridge.brokers.pubsub import permissions
from bridge.brokers.pubsub.connection import Connection, connect
from bridge.brokers.pubsub.lease import Leases
from bridge.brokers.pubsub.message import FOR_WORKER, from_message, marked
from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.brokers.pubsub.topology import MAX_LEASE, Names, ack_deadline, declarations, needs
from bridge.errors import BrokerUnavailableError, PgbridgeError, SettingsError
from bridge.event import Event, Malformed, matches
from bridge.process.tasks import one_error


class PubSubDelivery:
    """See `bridge.brokers.contract.Delivery`."""

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
        """See `contract.Delivery.retry`. Rounded up to whole seconds; after 600 at most, Pub/Sub's longest lease."""
        await self._queue.release(self, min(MAX_LEASE, math.ceil(delay)))

    async def dead_letter(self, failure: Failure) -> None:
        await self._queue.dead_letter(self, failure)

    async def give_back(self) -> None:
        await self._queue.release(self, 0)


PULL_LIMIT: Final = 60.0
"""Seconds that one pull waits for messages."""

EMULATOR_POLL: Final = 0.02
"""Seconds between two looks at the emulator, which goes on giving messages to a waiting pull that was cancelled."""
EMULATOR_NACK: Final = 1
"""Seconds that what an ordered worker gives back stays away from the emulator's others: what is given back at once it
puts behind what it has of the key, and what comes since its lease has run out before that. Of the service, Google
promises that it redelivers a key in order in both cases."""
PULL_GRACE: Final = 0.25
"""Seconds that a stop gives a pull to return by itself."""

_Publish: Final = types.PublishRequest.pb()
_Pull: Final = types.PullRequest.pb()


class PubSubQueue:
    """One worker's subscription of the sink's topic. See `bridge.brokers.contract.Queue`."""

    def __init__(self, settings: PubSubSettings, subscription: Subscription) -> None:
        """Raises SettingsError."""
        _check(settings, subscription)
        self._settings = settings
        self._wanted = subscription
        self._names = Names(settings, subscription.worker)
        self._connection: Connection | None = None
        self._leases: Leases | None = None
        self._hand: InOrder[PubSubDelivery] = InOrder()
        self._changed = asyncio.Event()
        self._pulling: asyncio.Task[None] | None = None
        self._passed_over = 0
        """How many of those in hand the worker does not want: their acknowledgements are on their way."""
        self._lost: BaseException | None = None
        self._stopping = False

    async def open(self) -> None:
        """See `contract.Queue.open`. Raises as `connect` does, too, and PrivilegeError for who may not consume."""
        await self.close()
        connection = await connect(self._settings)
        try:
            deadline = await ack_deadline(connection, self._wanted, self._names)
        except BaseException:
            await connection.close()
            raise
        self._hand, self._passed_over = InOrder(), 0
        self._lost, self._stopping, self._pulling = None, False, None
        self._connection = connection
        ordered = self._wanted.ordered
        soonest = EMULATOR_NACK if ordered and connection.emulated else 0
        self._leases = Leases(
            connection, self._names.subscription, deadline, self._lose, soonest=soonest, may_lapse=not ordered
        )

    async def deliveries(self) -> AsyncIterator[PubSubDelivery]:
        """See `contract.Queue.deliveries`. Of one ordering key, the next comes once the one before is settled."""
        if self._pulling is None and not self._stopping:
            self._pulling = asyncio.create_task(self._pull(self._open_connection(), self._open_leases()))
            self._pulling.add_done_callback(self._pull_ended)
        while True:
            while not self._hand and self._lost is None and not self._stopping:
                self._changed.clear()
                await self._changed.wait()
            if self._lost is not None:
                raise self._lost
            if self._stopping:
                return
            self._open_leases().check()
            yield self._hand.hand_out()

    @property
    def in_hand(self) -> int:
        """See `contract.Queue.in_hand`."""
        return 0 if self._leases is None else self._held(self._leases)

    def _held(self, leases: Leases) -> int:
        return leases.count - self._hand.behind - self._passed_over

    async def depth(self) -> None:
        """Pub/Sub tells Cloud Monitoring alone, as `num_undelivered_messages`."""
        return

    async def stop(self) -> None:
        """See `contract.Queue.stop`; what was not handed out is given back at once."""
        self._stopping = True
        await self._end_pulling()
        await self._give_back_unseen()

    async def _give_back_unseen(self) -> None:
        if unseen := self._hand.take_back_ready():
            await self._open_leases().release([delivery.ack_id for delivery in unseen], 0)

    async def _end_pulling(self) -> None:
        self._changed.set()
        if self._pulling is None or self._leases is None:
            return
        # Under load the pull returns soon, and what it brings is given back, too. An idle one is cancelled; what
        # such a pull was given just then comes again when its lease has run out.
        await asyncio.wait([self._pulling], timeout=PULL_GRACE)
        if self._pulling.cancel():
            await asyncio.wait([self._pulling])
            # After one more answer the service has seen the cancellation, and hands what we give back to others.
            with contextlib.suppress(PgbridgeError):
                await self._leases.extend(limit=PULL_GRACE)

    def _pull_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._lose(error)

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """See `contract.Queue.topology`: topic, subscription, dead-letter topic with its subscription."""
        connection = await connect(self._settings)
        try:
            return await declarations(connection, self._settings, self._wanted, self._names, apply=apply)
        finally:
            await connection.close()

    async def inspect(self) -> Sequence[str]:
        """See `contract.InspectableQueue.inspect`."""
        connection = await connect(self._settings)
        try:
            await ack_deadline(connection, self._wanted, self._names)
            said = await permissions.require(connection, needs(self._names))
            if not self._wanted.ordered and not connection.emulated:
                said.append("what Pub/Sub's service agent may do cannot be known")
            return said
        finally:
            await connection.close()

    async def close(self) -> None:
        """See `contract.Queue.close`. What is in hand comes again at once, without an answer when its lease ends."""
        self._lose(self._closed("the queue was closed"))
        await self._end_pulling()
        connection, self._connection = self._connection, None
        leases, self._leases = self._leases, None
        try:
            if leases is not None:
                await leases.close()
        finally:
            if connection is not None:
                await connection.close()

    async def ack(self, delivery: PubSubDelivery) -> None:
        """Settles one delivery: it never comes again."""
        await self._open_leases().acknowledge(delivery.ack_id)
        self._hand.settled(delivery)
        self._changed.set()
        if self._stopping:
            try:
                await self._give_back_unseen()
            except PgbridgeError as error:
                # This one is settled all the same; the close gives back those behind it.
                self._lose(error)

    async def release(self, delivery: PubSubDelivery, seconds: int) -> None:
        """Lets a delivery, and what is in hand behind it, come again after this time."""
        leases = self._open_leases()
        released = 0
        # What comes behind it meanwhile must not overtake it, and goes back as well.
        while line := self._hand.line_of(delivery)[released:]:
            await leases.release([each.ack_id for each in line], seconds)
            released += len(line)
        self._hand.take_back(delivery)
        self._changed.set()

    async def dead_letter(self, delivery: PubSubDelivery, failure: Failure) -> None:
        """Publishes it to the dead-letter topic, then settles it. Raises RefusedError where it is not taken there."""
        connection = self._open_connection()
        message = marked(delivery.message, failure, self._wanted.worker, delivery.attempt)
        request = _Publish(topic=self._names.dead_topic, messages=[message])
        await connection.call(connection.publish, request, limit=self._settings.publish_timeout)
        await self.ack(delivery)

    async def _pull(self, connection: Connection, leases: Leases) -> None:
        """Keeps up to `prefetch` messages in hand, beside those that wait behind one of their key.

        What nobody here wants is acknowledged meanwhile, and takes none of that room.
        """
        with one_error():
            async with asyncio.TaskGroup() as passing_over:
                while self._lost is None and not self._stopping:
                    most = MOST_HELD * self._wanted.prefetch - leases.count
                    room = min(self._wanted.prefetch - self._held(leases), most)
                    if room <= 0:
                        self._changed.clear()
                        await self._changed.wait()
                        continue
                    received = await self._received(connection, room)
                    for ack_id in self._take(received, leases):
                        passing_over.create_task(self._pass_over(ack_id, leases))
                    if connection.emulated and not received:
                        await asyncio.sleep(EMULATOR_POLL)

    async def _received(self, connection: Connection, most: int) -> Sequence[Any]:
        """What one pull brings."""
        request = _Pull(
            subscription=self._names.subscription, max_messages=most, return_immediately=connection.emulated
        )
        try:
            response = await connection.pull(request, timeout=PULL_LIMIT)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                self._lose(await connection.explained(error))
            return []
        received: Sequence[Any] = response.received_messages
        return received

    def _take(self, received: Sequence[Any], leases: Leases) -> list[str]:
        """Takes all of it in hand. The ack ids of what the worker does not want."""
        unwanted = []
        for each in received:
            leases.hold(each.ack_id)
            event = from_message(each.message)
            if isinstance(event, Event) and not self._wants(event, each.message):
                unwanted.append(each.ack_id)
            else:
                self._hand.add(PubSubDelivery(self, each, event))
        self._passed_over += len(unwanted)
        self._changed.set()
        return unwanted

    async def _pass_over(self, ack_id: str, leases: Leases) -> None:
        await leases.acknowledge(ack_id)
        self._passed_over -= 1
        self._changed.set()

    def _wants(self, event: Event, message: Any) -> bool:
        """Whether the worker subscribed to it; a replay that is meant for another worker does not count.

        The subscription's filter lets pass more than the patterns take, and the emulator obeys no filter.
        """
        if message.attributes.get(FOR_WORKER, self._wanted.worker) != self._wanted.worker:
            return False
        return any(matches(pattern, event.topic) for pattern in self._wanted.topics)

    def _lose(self, error: BaseException) -> None:
        if self._lost is None:
            self._lost = error
        self._changed.set()

    @property
    def lost(self) -> bool:
        """Whether nothing can be received or settled until `open` is called again."""
        return self._lost is not None

    def _closed(self, why: str) -> BrokerUnavailableError:
        return BrokerUnavailableError(f"{self._settings.address_key}: Pub/Sub at {self._settings.address}: {why}")

    def _open_connection(self) -> Connection:
        if isinstance(self._lost, BrokerUnavailableError):
            raise self._lost
        if self._connection is None:
            raise self._closed("the queue is not open")
        return self._connection

    def _open_leases(self) -> Leases:
        if isinstance(self._lost, BrokerUnavailableError):
            raise self._lost
        if self._leases is None:
            raise self._closed("the queue is not open")
        return self._leases


def _check(settings: PubSubSettings, subscription: Subscription) -> None:
    """Raises SettingsError for what an ordered worker cannot have here."""
    worker = f"workers.{subscription.worker}"
    if subscription.lanes > 1:
        raise SettingsError(
            f"{worker}.lanes: Pub/Sub gives the keys of an ordered worker to all of its processes and knows no lanes; "
            "leave it out"
        )
    if subscription.ordered and not settings.ordering:
        raise SettingsError(
            f"{settings.key('ordering')}: an ordered worker ({worker}.ordered) needs ordering keys: set it to true"
        )
