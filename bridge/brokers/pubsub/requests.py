"""Messages on their way to Pub/Sub: a queue for each key, one ordering key a request, one request in flight per key.

Many keys travel side by side, up to a limit of requests; while it is reached, waiting messages gather and share
requests. A request that fails takes along what waits behind it with the same key, and the key takes nothing more
until every `publish` call that had a part in it has been answered: only then does the relay know what to send first.

An answer may come late, and is waited for while the service answers other requests. `watch` gives everything up when
no request at all has been answered for `publish_timeout`; or when a single one has not for four times as long, which
may be in trouble of its own while the service is well, but must not hold back its key for good.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import grpc

from bridge.brokers.contract import CONFIRMED, Never, NotSent, Outcome, Refused, Unknown
from bridge.brokers.pubsub.connection import Connection, said_by
from bridge.brokers.pubsub.message import topic_field
from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.brokers.silence import LOOK_INTERVAL, STALLED, Silence, read_what_arrived
from bridge.process.tasks import is_cancelled


class Call:
    """One call of `publish`: its outcomes, and the keys that it has news about which the relay must hear first."""

    def __init__(self, count: int) -> None:
        self.outcomes: list[Outcome | None] = [None] * count
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed: set[KeyQueue] = set()
        self.returned = False
        self._open = count
        if not count:
            self.done.set_result(None)

    def settle(self, index: int, outcome: Outcome) -> None:
        self.outcomes[index] = outcome
        self._open -= 1
        if not self._open and not self.done.done():
            self.done.set_result(None)


Waiting = tuple[bytes, Call, int]
"""A message as a field of a request, and where its outcome goes."""


class KeyQueue:
    """What waits to be published with one key; that without a key needs no order, so it has many requests in flight."""

    __slots__ = ("in_flight", "key", "ready", "timer", "unanswered", "waiting")

    def __init__(self, key: str) -> None:
        self.key = key
        self.waiting: deque[Waiting] = deque()
        self.ready = False
        self.in_flight = 0
        self.unanswered = 0
        """Calls in which a message of this key failed, and whose outcomes the relay does not know yet."""
        self.timer: asyncio.TimerHandle | None = None


_NOTHING_GOES: Final = {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}
"""Every request would be refused until a person acts."""
_NOT_ANSWERED: Final = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
"""The connection or the service went before there was an answer."""
_REFUSED_WHOLE: Final = {
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.FAILED_PRECONDITION,
}
"""The service took nothing of this request and may take it later: a quota, or a key's 1 MB a second."""

_MOST_SUSPECTS: Final = 10_000

REQUEST_LIMIT: Final = 4
"""Times `publish_timeout`, after which one request is given up although others are answered. Google's own client waits
for a minute; a request that slow is not worth the repetition of the 63 others."""


class Requests:
    """Publishes over one connection until a failure that concerns every key, or `close`."""

    def __init__(self, settings: PubSubSettings, connection: Connection, topic: str) -> None:
        self._settings = settings
        self._connection = connection
        self._topic = topic
        self._topic_field = topic_field(topic)
        self._queues: dict[str, KeyQueue] = {}
        self._ready: deque[KeyQueue] = deque()
        self._in_flight = 0
        self._finishing: set[asyncio.Task[None]] = set()
        self._silence = Silence()
        self._looks = 0
        self._asked: dict[Any, int] = {}
        """Requests without an answer, oldest first, and the look at which each was made."""
        self._suspects: set[int] = set()
        """Hashes of messages without a key over which the service failed. They travel alone: one of them is to blame,
        and the others must not wait with it."""
        self.broken: str | None = None
        """Why nothing can be published any more; None while it can."""

    @property
    def stalled(self) -> str | None:
        """See `contract.Sink.stalled`."""
        if self.broken is not None:
            return self.broken
        if not self._asked or self._silence.seconds <= STALLED:
            return None
        return f"Pub/Sub at {self._connection.address} has answered nothing for {self._silence.seconds:.0f} s"

    async def watch(self) -> None:
        """Gives up when the service answers nothing, or a single request never."""
        limit = self._settings.publish_timeout
        while self.broken is None or self._asked:
            await self._silence.look()
            self._looks += 1
            if not self._asked:
                self._silence.end()
            elif await self._silence.reaches(limit):
                self._leave(f"Pub/Sub at {self._connection.address} has answered nothing for {limit:g} s")
            else:
                await self._look_at_the_oldest(limit * REQUEST_LIMIT)

    async def _look_at_the_oldest(self, limit: float) -> None:
        for request, asked in tuple(self._asked.items())[:1]:
            if (self._looks - asked) * LOOK_INTERVAL >= limit:
                await read_what_arrived()
                if request in self._asked:
                    address = self._connection.address
                    self._leave(f"Pub/Sub at {address} has left a request without an answer for {limit:g} s")

    def _leave(self, reason: str) -> None:
        """Gives up, and waits for no answer either."""
        self.give_up(reason)
        for request in self._asked:
            request.cancel()

    @contextmanager
    def call(self, count: int) -> Iterator[Call]:
        """A call for that many messages; the end of the block is the moment in which the relay knows its outcomes."""
        call = Call(count)
        try:
            yield call
        finally:
            call.returned = True
            for queue in call.failed:
                queue.unanswered -= 1
                self._forget_if_idle(queue)

    def put(self, key: str, message: bytes, call: Call, index: int) -> None:
        """Queues a message under its ordering key, empty for none; `start` follows."""
        if self.broken is not None:
            call.settle(index, NotSent(self.broken))
            return
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = KeyQueue(key)
        if queue.unanswered:
            self._fail(queue, [(message, call, index)], _behind(key))
        else:
            queue.waiting.append((message, call, index))
            self._offer(queue)

    def start(self) -> None:
        """Sends what may go now. The calls are made before this returns."""
        while self._ready and self._in_flight < self._settings.requests_in_flight and self.broken is None:
            queue = self._ready.popleft()
            queue.ready = False
            batch = self._take(queue)
            if queue.waiting and not queue.key:
                self._make_ready(queue)
            self._in_flight += 1
            queue.in_flight += 1
            response = self._send(batch)
            task = asyncio.create_task(self._finish(queue, batch, response))
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)

    def give_up(self, reason: str) -> None:
        """Fails what waits and takes no more; requests in flight still report."""
        if self.broken is not None:
            return
        self.broken = reason
        self._ready.clear()
        for queue in list(self._queues.values()):
            queue.ready = False
            self._fail(queue, queue.waiting, NotSent(reason))
            queue.waiting.clear()

    async def close(self) -> None:
        """Ends the connection; what is in flight becomes Unknown."""
        self.give_up("the sink was closed")
        await self._connection.close()
        if self._finishing:
            await asyncio.wait(self._finishing)

    def _offer(self, queue: KeyQueue) -> None:
        """Lets a queue send, at once or after the delay in which others may join; a full request waits for none."""
        if queue.ready or (queue.key and queue.in_flight):
            return
        if not self._settings.batch_delay or len(queue.waiting) >= self._settings.batch_messages:
            self._make_ready(queue)
        elif queue.timer is None:
            delay = self._settings.batch_delay
            queue.timer = asyncio.get_running_loop().call_later(delay, self._delay_is_over, queue)

    def _delay_is_over(self, queue: KeyQueue) -> None:
        queue.timer = None
        if queue.waiting and not queue.ready and not (queue.key and queue.in_flight):
            self._make_ready(queue)
            self.start()

    def _make_ready(self, queue: KeyQueue) -> None:
        if queue.timer is not None:
            queue.timer.cancel()
            queue.timer = None
        queue.ready = True
        self._ready.append(queue)

    def _take(self, queue: KeyQueue) -> list[Waiting]:
        batch = [queue.waiting.popleft()]
        if self._travels_alone(queue, batch[0]):
            return batch
        size = len(batch[0][0])
        while queue.waiting and len(batch) < self._settings.batch_messages:
            size += len(queue.waiting[0][0])
            if size > self._settings.batch_bytes or self._travels_alone(queue, queue.waiting[0]):
                break
            batch.append(queue.waiting.popleft())
        return batch

    def _travels_alone(self, queue: KeyQueue, waiting: Waiting) -> bool:
        return bool(self._suspects) and not queue.key and hash(waiting[0]) in self._suspects

    def _send(self, batch: Sequence[Waiting]) -> Any:
        """Without a deadline of gRPC's, which would pass while this process stands still: `watch` keeps the time."""
        if not self._asked:
            self._silence.end()
        request = self._connection.publish_encoded(b"".join([self._topic_field, *[message for message, _, _ in batch]]))
        self._asked[request] = self._looks
        return request

    async def _finish(self, queue: KeyQueue, batch: Sequence[Waiting], response: Any) -> None:
        try:
            if not await self._answered(queue, batch, response) and queue.key:
                self._fail(queue, queue.waiting, _behind(queue.key))
                queue.waiting.clear()
        finally:
            self._in_flight -= 1
            queue.in_flight -= 1
        if queue.waiting:
            self._offer(queue)
        self._forget_if_idle(queue)
        self.start()

    async def _answered(self, queue: KeyQueue, batch: Sequence[Waiting], response: Any) -> bool:
        """Waits for the response and settles the batch. Whether what waits behind it may go."""
        try:
            await response
        except grpc.aio.AioRpcError as error:
            self._asked.pop(response)
            if error.code() not in _NOT_ANSWERED:
                self._silence.end()
            return await self._refused(queue, batch, error)
        except asyncio.CancelledError:
            self._fail(queue, batch, Unknown(self.broken or "the connection was closed before the confirm came"))
            if is_cancelled():
                raise
            return False
        finally:
            self._asked.pop(response, None)
        self._silence.end()
        for message, call, index in batch:
            call.settle(index, CONFIRMED)
            if self._suspects:
                self._suspects.discard(hash(message))
        return True

    async def _refused(self, queue: KeyQueue, batch: Sequence[Waiting], error: grpc.aio.AioRpcError) -> bool:
        said = f"Pub/Sub at {self._connection.address} says {said_by(error)}"
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            return await self._single_out(queue, batch, said)
        if error.code() in _NOTHING_GOES:
            self.give_up(f"{said} (topic {self._topic})")
            self._fail(queue, batch, NotSent(f"{said} (topic {self._topic})"))
        elif error.code() in _NOT_ANSWERED:
            self.give_up(said)
            self._fail(queue, batch, Unknown(said))
        elif queue.key or error.code() in _REFUSED_WHOLE:
            first, behind = batch[:1], batch[1:]
            self._fail(queue, first, Refused(said, in_order=True))
            # The request was refused whole: nothing behind the first can have overtaken it.
            self._fail(queue, behind, _behind(queue.key) if queue.key else NotSent(said))
        else:
            # INTERNAL, UNKNOWN and their like are answers: the service failed over this request, perhaps over one of
            # its messages, or it fails over everything for now. Which one cannot be known, so nothing is called poison.
            self._suspect(batch)
            self._fail(queue, batch, Refused(said))
        return False

    def _suspect(self, batch: Sequence[Waiting]) -> None:
        if len(self._suspects) > _MOST_SUSPECTS:
            self._suspects.clear()
        self._suspects.update(hash(message) for message, _, _ in batch)

    async def _single_out(self, queue: KeyQueue, batch: Sequence[Waiting], said: str) -> bool:
        """Finds, by halves and in order, the messages for which the service refuses a whole request."""
        if len(batch) == 1:
            _, call, index = batch[0]
            call.settle(index, Never("refused", said))
            return True
        middle = len(batch) // 2
        for start, part in ((0, batch[:middle]), (middle, batch[middle:])):
            if self.broken is not None:
                self._fail(queue, batch[start:], NotSent(self.broken))
                return False
            if not await self._answered(queue, part, self._send(part)):
                self._fail(queue, batch[start + len(part) :], NotSent(said))
                return False
        return True

    def _fail(self, queue: KeyQueue, batch: Iterable[Waiting], outcome: Outcome) -> None:
        for _, call, index in batch:
            call.settle(index, outcome)
            if queue.key and queue not in call.failed and not call.returned:
                call.failed.add(queue)
                queue.unanswered += 1

    def _forget_if_idle(self, queue: KeyQueue) -> None:
        if not (queue.waiting or queue.in_flight or queue.unanswered) and self._queues.get(queue.key) is queue:
            del self._queues[queue.key]


def _behind(key: str) -> NotSent:
    return NotSent(f"an earlier event with the key {key[:80]!r} failed, and must be published first")
