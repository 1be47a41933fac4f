"""NATS JetStream as a worker's queue: a durable pull consumer, and a stream of dead letters.

``<worker>``       consumer on the sink's stream, filtered by the subscription's topics
``<worker>_dead``  stream of dead letters; the subject is ``<worker>_dead.<topic>``, ``x-pgbridge-...`` headers say why

Messages that wait for another attempt stay with JetStream, so a retry takes any delay; they count as unsettled, hence
MAX_UNSETTLED. What is in hand is reported as in progress until the queue is closed, so `ack_wait` passes only for a
process that died, and for what could not be given back because the server did not answer.

`attempt` is how often JetStream has delivered the message, so a delivery that was given back counts too (the inbox,
which decides when attempts are exhausted, does not count it). Nothing is dropped for its number of deliveries.
"""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Final

import nats.aio.subscription
from nats.aio.msg import Msg

from bridge.brokers.contract import Declaration, Failure, Subscription
from bridge.brokers.letters import letter_headers
from bridge.brokers.nats.connection import REQUEST_TIMEOUT, Connection, connect
from bridge.brokers.nats.message import dead_headers, event_of, topic_of
from bridge.brokers.nats.permissions import inspected
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.topology import dead_stream, declarations, require
from bridge.errors import BrokerUnavailableError, PgbridgeError, PrivilegeError, SettingsError
from bridge.event import matches

NANOSECONDS: Final = 1_000_000_000
"""In one second: how JetStream writes durations."""

HEARTBEAT: Final = 5.0
"""Seconds between the signs of life that the server gives while a request for messages is open."""

_REQUEST_OPEN: Final = 30.0
"""Seconds after which such a request ends; the next follows."""

_SILENCE: Final = 3 * HEARTBEAT
"""Seconds without a sign of the server, after which a request for messages counts as lost."""

_CLOSE_LIMIT: Final = 3.0
"""Seconds that a close waits for the sign of life without which nothing is given back."""


class NatsDelivery:
    """See `bridge.brokers.contract.Delivery`."""

    def __init__(self, queue: "NatsQueue", message: Msg) -> None:
        self._queue = queue
        self.message = message
        self.event = event_of(message)
        # What was given back counts, see above.
        self.attempt = int(message.metadata.num_delivered)

    async def ack(self) -> None:
        """See `contract.Delivery.ack`."""
        await self._queue.settle(self, b"+ACK")

    async def retry(self, delay: float) -> None:
        """See `contract.Delivery.retry`; after exactly `delay`."""
        await self._queue.settle(self, b'-NAK {"delay": %d}' % max(1, round(delay * NANOSECONDS)))

    async def dead_letter(self, failure: Failure) -> None:
        """See `contract.Delivery.dead_letter`. Repeated within two minutes, it is stored once."""
        await self._queue.publish_dead(self.message, failure, self.attempt)
        await self.ack()

    async def give_back(self) -> None:
        """See `contract.Delivery.give_back`; JetStream counts it all the same."""
        await self._queue.settle(self, b"-NAK")


class NatsQueue:
    """See `bridge.brokers.contract.Queue`."""

    def __init__(self, settings: NatsSettings, subscription: Subscription) -> None:
        """Raises SettingsError."""
        if subscription.lanes > 1:
            raise SettingsError(
                f"workers.{subscription.worker}.lanes: NATS gives a consumer to one process of an ordered worker at a "
                "time and knows no lanes; leave it out"
            )
        self._settings = settings
        self._subscription = subscription
        self._address = str(settings.servers)
        self._dead_stream = dead_stream(subscription.worker)
        self._next_subject = f"$JS.API.CONSUMER.MSG.NEXT.{settings.stream}.{subscription.worker}"
        self._connection: Connection | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        """Wakes `deliveries` to look at what follows."""
        self._inbox: nats.aio.subscription.Subscription | None = None
        self._heard = 0.0
        """When the request for messages last had a sign of the server, by the loop's clock."""
        self._extended = 0.0
        """Since when, by the loop's clock, the server leaves us what is in hand for `ack_wait`."""
        self._begin()

    def _begin(self) -> None:
        """Forgets what was of an earlier connection."""
        self._stopped = False
        self._lost: BaseException | None = None
        self._arrived: deque[Msg] = deque()
        """What was not handed out yet: at most the prefetch."""
        self._in_hand: set[str] = set()
        """Reply subjects of what arrived and is not settled."""
        self._passing_over = 0
        """Of these, what no pattern takes."""
        self._requested = 0
        """Messages that the server may still send for the open request; there is one at a time."""

    async def open(self) -> None:
        """See `contract.Queue.open`."""
        await self.close()
        self._begin()
        connection = await connect(self._settings, denied=self._denied)
        try:
            async with connection.asking():
                found = await declarations(connection, self._settings.stream, self._subscription, apply=False)
                require(found, self._settings)
                # The prefetch is the limit; one of nats-py's would drop messages.
                self._inbox = await connection.client.subscribe(
                    connection.client.new_inbox(), cb=self._take, pending_msgs_limit=0, pending_bytes_limit=0
                )
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        self._extended = asyncio.get_running_loop().time()
        self._watcher = asyncio.create_task(self._watch(connection))
        await self._request()

    async def _request(self) -> None:
        """Asks for as many messages as there is room for, unless a request is open. Raises nothing: a failure ends
        `deliveries`."""
        room = self._room()
        if not self._requested and room > 0:
            heartbeat = int(HEARTBEAT * NANOSECONDS)
            await self._ask({"batch": room, "expires": int(_REQUEST_OPEN * NANOSECONDS), "idle_heartbeat": heartbeat})

    def _room(self) -> int:
        """How many more messages may come."""
        return self._subscription.prefetch - len(self._in_hand)

    async def _ask(self, request: dict[str, Any]) -> None:
        """Opens a request for messages. Raises nothing, as `_request`."""
        if self._stopped or self._lost or self._connection is None or self._inbox is None:
            return
        self._requested = request["batch"]
        self._heard = asyncio.get_running_loop().time()
        try:
            async with self._connection.asking():
                await self._connection.client.publish(
                    self._next_subject, json.dumps(request).encode(), reply=self._inbox.subject
                )
        except PgbridgeError as error:
            self._lose(error)

    async def _take(self, message: Msg) -> None:
        """What arrives for the request: a message, or a status. nats-py would swallow what this raises."""
        self._heard = asyncio.get_running_loop().time()
        # What JetStream delivers has a reply subject, for its acknowledgement; an author's header may be a Status too.
        if message.reply:
            self._requested -= 1
            self._in_hand.add(message.reply)
            await self._arrive(message)
        else:
            self._end_request(message.headers or {})
        await self._request()

    async def _arrive(self, message: Msg) -> None:
        if self._subscribed(message):
            self._arrived.append(message)
            self._changed.set()
        else:
            await self._pass_over(message)

    def _subscribed(self, message: Msg) -> bool:
        """False for what only the filters take, which cannot be as narrow as the patterns."""
        topic = topic_of(message.subject)
        return any(matches(pattern, topic) for pattern in self._subscription.topics)

    async def _pass_over(self, message: Msg) -> None:
        """Acknowledges what no pattern takes, without waiting for the answer: where the acknowledgement is lost, the
        message comes again and is passed over again. The next request follows on the same connection, so no more of
        them are on their way than the prefetch."""
        self._passing_over += 1
        try:
            await self._send([message.reply], b"+ACK")
        except PgbridgeError as error:
            self._lose(error)
        else:
            self._in_hand.discard(message.reply)
            self._passing_over -= 1

    def _end_request(self, status: Mapping[str, str]) -> None:
        code = status.get("Status")
        if code in ("404", "408"):
            self._requested = 0
        elif code != "100":
            self._lose(self._unavailable(f"ended the request for messages: {status.get('Description', code)}"))

    async def _watch(self, connection: Connection) -> None:
        lost = asyncio.create_task(connection.until_lost())
        try:
            while self._connection is connection and not lost.done():
                await asyncio.wait([lost], timeout=min(HEARTBEAT, self._subscription.ack_wait / 3))
                await self._keep(connection)
                if self._requested and asyncio.get_running_loop().time() - self._heard > _SILENCE:
                    break
        finally:
            lost.cancel()
        silence = self._unavailable(f"does not answer: nothing was heard for {_SILENCE:g} s")
        self._lose(connection.ending if lost.done() else silence)

    async def _keep(self, connection: Connection) -> None:
        """Done again and again while the connection lives."""
        await self._extend(connection)

    async def _extend(self, connection: Connection) -> None:
        """Says that what is in hand is worked on, so that the server waits for another `ack_wait`."""
        now = asyncio.get_running_loop().time()
        replies = tuple(self._in_hand)
        try:
            async with connection.asking(), asyncio.timeout(REQUEST_TIMEOUT) as limit:
                for reply in replies[:-1]:
                    await connection.client.publish(reply, b"+WPI")
                    if limit.expired():
                        return  # where nothing can be written, nats-py swallows the cancellation
                for reply in replies[-1:]:
                    await connection.client.request(reply, b"+WPI", timeout=REQUEST_TIMEOUT)
        except PgbridgeError:
            return  # a lost or silent connection shows itself to the watcher
        self._extended = now

    def _denied(self, refusal: PrivilegeError, subject: str) -> None:
        self._lose(refusal)

    def _lose(self, error: BaseException) -> None:
        self._lost = self._lost or error
        self._changed.set()

    def _unavailable(self, reason: str) -> BrokerUnavailableError:
        return BrokerUnavailableError(f"{self._settings.key('url')}: NATS at {self._address} {reason}")

    async def deliveries(self) -> AsyncIterator[NatsDelivery]:
        """See `contract.Queue.deliveries`. Raises PrivilegeError when the server does not permit what it needs."""
        while True:
            if self._lost is not None:
                raise self._lost
            if self._stopped:
                return
            if (delivery := self._next()) is not None:
                yield delivery
            else:
                self._changed.clear()
                await self._changed.wait()

    def _next(self) -> NatsDelivery | None:
        """What is handed out now."""
        return NatsDelivery(self, self._arrived.popleft()) if self._arrived else None

    async def settle(self, delivery: NatsDelivery, verb: bytes) -> None:
        """Answers for a delivery; returns once the server has taken it, and makes room for the next.

        A connection that was opened since will do. Raises BrokerUnavailableError or RefusedError.
        """
        connection = self._connected()
        async with connection.asking(), asyncio.timeout(REQUEST_TIMEOUT):
            await connection.client.request(delivery.message.reply, verb, timeout=REQUEST_TIMEOUT)
        self._settled(delivery)
        await self._request()

    def _settled(self, delivery: NatsDelivery) -> None:
        self._in_hand.discard(delivery.message.reply)

    async def _send(self, replies: Iterable[str], verb: bytes) -> None:
        """Answers for messages, without waiting until the server has taken it."""
        connection = self._connected()
        async with connection.asking():
            for reply in replies:
                await connection.client.publish(reply, verb)

    def _connected(self) -> Connection:
        if self._connection is None or not self._connection.is_open:
            raise self._lost or self._unavailable("is not connected: the queue is not open")
        return self._connection

    async def publish_dead(self, message: Msg, failure: Failure, attempts: int) -> None:
        """Copies a message to the stream of dead letters, byte for byte; returns once that is confirmed.

        Raises BrokerUnavailableError, or RefusedError where JetStream does not take the letter, as one that is too
        large for the stream.
        """
        connection = self._connected()
        letter = letter_headers(self._subscription.worker, failure, attempts)
        headers = dead_headers(message, letter, connection.client.max_payload)
        subject = f"{self._dead_stream}.{message.subject.partition('.')[2]}"
        async with connection.asking(), asyncio.timeout(REQUEST_TIMEOUT):
            await connection.jetstream().publish(subject, message.data, stream=self._dead_stream, headers=headers)

    @property
    def in_hand(self) -> int:
        """See `contract.Queue.in_hand`."""
        return len(self._in_hand) - self._passing_over

    async def depth(self) -> int:
        """See `contract.Queue.depth`; with what other processes of the worker have in hand."""
        connection = self._connected()
        async with connection.asking():
            info = await connection.jetstream().consumer_info(self._settings.stream, self._subscription.worker)
        return max(0, (info.num_pending or 0) + (info.num_ack_pending or 0) - len(self._in_hand))

    async def stop(self) -> None:
        """See `contract.Queue.stop`. What has arrived and was not delivered goes back at once; where the server does
        not answer, only after `close`."""
        if self._stopped or self._connection is None:
            return
        self._stopped = True
        self._changed.set()
        async with self._connection.asking(), asyncio.timeout(REQUEST_TIMEOUT):
            await self._end_subscription(self._connection)
        waiting = self._take_back()
        await self._send(waiting, b"-NAK")
        self._in_hand.difference_update(waiting)

    def _take_back(self) -> list[str]:
        """Forgets what was not handed out; its reply subjects."""
        waiting = [message.reply for message in self._arrived]
        self._arrived.clear()
        return waiting

    async def _end_subscription(self, connection: Connection) -> None:
        """Returns once the server has answered that nothing more comes, and what was on its way has been taken."""
        inbox, self._inbox = self._inbox, None
        if inbox is None:
            await connection.round_trip()
        else:
            # A plain unsubscribe would leave what is on its way unsettled until ack_wait.
            await inbox.drain()  # type: ignore[no-untyped-call]

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """See `contract.Queue.topology`; a consumer that differs is changed too, since that loses nothing."""
        connection = await connect(self._settings)
        try:
            async with connection.asking():
                return await declarations(connection, self._settings.stream, self._subscription, apply=apply)
        finally:
            await connection.close()

    async def inspect(self) -> Sequence[str]:
        """See `contract.InspectableQueue.inspect`."""
        wanted, stream = self._subscription, self._settings.stream
        connection = await connect(self._settings)
        try:
            async with connection.asking():
                require(await declarations(connection, stream, wanted, apply=False), self._settings)
            return await inspected(
                connection,
                self._settings,
                subjects=[self._next_subject],
                topics=wanted.topics,
                below=self._dead_stream,
                answers=f"$JS.ACK.{stream}.{wanted.worker}.>",
                better={
                    f"$JS.API.CONSUMER.UNPIN.{stream}.{wanted.worker}": (
                        f"after this process stops another one begins only {wanted.ack_wait:g} s later"
                    )
                }
                if wanted.ordered
                else None,
            )
        finally:
            await connection.close()

    async def close(self) -> None:
        """See `contract.Queue.close`. What is in hand goes back at once; from a server that does not answer, after
        `ack_wait`."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        connection = self._connection
        if connection is None:
            return
        if connection.is_open:
            try:
                async with asyncio.timeout(_CLOSE_LIMIT):
                    await self._give_back(connection)
            except (PgbridgeError, TimeoutError):
                # What would still be sent might come when the server has given it to somebody else.
                connection.leave()
        self._connection, self._inbox = None, None
        self._in_hand.clear()
        self._lose(self._unavailable("is left: the queue was closed"))
        await connection.close()

    async def _give_back(self, connection: Connection) -> None:
        self._stopped = True
        # First no more may come: what goes back would come to the open request.
        async with connection.asking():
            await self._end_subscription(connection)
        if asyncio.get_running_loop().time() - self._extended < self._subscription.ack_wait:
            await self._send(tuple(self._in_hand), b"-NAK")
