"""Publishes batches on one confirm channel, in the order of the calls, and answers for every event.

A batch waits for its confirms however late they are. What ends the connection is a channel that is silent altogether:
`_look` counts intervals of time in which nothing was confirmed although something was on the way.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Generic

from pamqp import commands

from bridge.brokers.contract import Never, NotSent, Outcome, Unknown
from bridge.brokers.rabbitmq.closure import Closure, Reply
from bridge.brokers.rabbitmq.confirms import Batch, M, UnconfirmedBatches
from bridge.brokers.rabbitmq.connection import Connection
from bridge.brokers.rabbitmq.frames import CHANNEL, Frames, RefusedEvent, too_large

_LOOKS: Final = 10
"""Looks without a sign of life that make up the time-out; the connection ends at the one after them.

Looks are counted, and not seconds, for a process that was stopped or busy for long: it makes one look for all that
time, and has read what came meanwhile before it makes the next.
"""

_SHOWN_AFTER: Final = 1.0
"""Seconds without a sign of life after which `stalled` says so."""

_CHUNK_MESSAGES: Final = 200
_CHUNK_BYTES: Final = 262_144
"""Most bytes that are encoded and written at once."""
_TOO_LARGE: Final = re.compile(r"message size \d+ (?:is )?larger than (?:configured )?max size (\d+)")


class Publisher(Generic[M]):
    """Owns the channel. Everything happens in callbacks of the event loop: no task, and one future a batch."""

    def __init__(
        self,
        connection: Connection,
        encode: Callable[[M], Frames],
        timeout: float,
        on_lost: Callable[[Closure], None] = lambda closure: None,
    ) -> None:
        """`encode` gives the frames that publish a message, or raises RefusedEvent; `timeout`: seconds without any
        confirm or return of what is on the way after which the connection ends; `on_lost` hears of that end."""
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._encode = encode
        self._timeout = timeout
        self._on_lost = on_lost
        self.learned_limit: int | None = None
        """The broker's size limit in bytes, when it closed the channel for a larger message."""
        self._unconfirmed: UnconfirmedBatches[M] = UnconfirmedBatches()
        self._waiting: deque[Batch[M]] = deque()
        self._alive_at = 0.0
        """When the channel last gave a sign of life, or began to have something on the way."""
        self._silent_looks = 0
        self._next_look: asyncio.TimerHandle | None = None

    @property
    def lost(self) -> Closure | None:
        """What ended the connection; None while it works."""
        return self._connection.lost

    @property
    def stalled(self) -> str | None:
        """See `contract.Sink.stalled`."""
        if self.lost is not None:
            return str(self.lost)
        if not (waiting := self._outstanding()):
            return None
        if self._connection.blocked is not None:
            return f"RabbitMQ blocks publishers ({self._connection.blocked})"
        silence = self._loop.time() - self._alive_at
        if silence <= _SHOWN_AFTER:
            return None
        return f"RabbitMQ has confirmed nothing for {silence:.0f} s; {waiting} messages wait"

    def _outstanding(self) -> int:
        """How many messages are not yet written or not yet confirmed."""
        unwritten = sum(len(batch.events) - batch.next for batch in self._waiting)
        return self._unconfirmed.outstanding() + unwritten

    async def start(self) -> None:
        """Opens the channel in confirm mode. Raises ClosedError."""
        self._connection.listen(
            confirmed=self._unconfirmed.settled,
            returned=self._returned,
            progress=self._is_alive,
            room=self._pump,
            lost=self._lost,
        )
        await self._connection.call(CHANNEL, commands.Channel.Open())
        await self._connection.call(CHANNEL, commands.Confirm.Select())

    async def publish(self, events: Sequence[M]) -> Sequence[Outcome]:
        """See `contract.Sink.publish`."""
        if self._connection.lost is not None:
            return [_disconnected(self._connection.lost)] * len(events)
        if not events:
            return []
        batch = Batch(events, self._loop.create_future())
        if not (self._waiting or self._unconfirmed.batches):
            self._is_alive()
        self._waiting.append(batch)
        if len(self._waiting) == 1:
            self._pump()
        if not batch.done.done():
            if self._next_look is None:
                self._look_later()
            try:
                await batch.done
            finally:
                if not batch.done.done() or batch.done.cancelled():
                    self._abandon(batch)
        return batch.outcomes()

    def _pump(self) -> None:
        """Writes what waits, for as long as there is room."""
        while self._waiting and self._connection.has_room:
            batch = self._waiting[0]
            self._write_chunk(batch)
            if batch.next == len(batch.events):
                self._waiting.popleft()
                self._unconfirmed.seal(batch)

    def _write_chunk(self, batch: Batch[M]) -> None:
        encode, events, start = self._encode, batch.events, batch.next
        chunk: list[bytes | memoryview] = []
        large = False
        refused: dict[int, Never] = {}
        size = 0
        index = start
        for index in range(start, min(start + _CHUNK_MESSAGES, len(events))):
            try:
                frames = encode(events[index])
            except RefusedEvent as refusal:
                refused[index] = refusal.failure
                continue
            if isinstance(frames, bytes):
                chunk.append(frames)
                size += len(frames)
            else:
                chunk += frames
                size += sum(map(len, frames))
                large = True
            if size >= _CHUNK_BYTES:
                break
        self._unconfirmed.wrote(batch, range(start, min(index + 1, len(events))), refused)
        if large:
            self._connection.write_pieces(chunk)
        elif chunk:
            self._connection.write(b"".join(chunk))

    def _abandon(self, batch: Batch[M]) -> None:
        """The call was cancelled. What it has written stays on the way, and is counted until its confirms come."""
        with suppress(ValueError):
            self._waiting.remove(batch)
        batch.give_up(Unknown("the call was cancelled"), NotSent("the call was cancelled"))
        self._unconfirmed.seal(batch)

    def _is_alive(self) -> None:
        self._alive_at = self._loop.time()
        self._silent_looks = 0

    def _look_later(self) -> None:
        self._next_look = self._loop.call_later(self._timeout / _LOOKS, self._look)

    def _look(self) -> None:
        """Ends the connection once too many looks have found it silent. Blocked, the broker says why it is."""
        self._next_look = None
        waiting = self._outstanding()
        if not waiting:
            return
        if self._connection.blocked is not None:
            self._is_alive()
        elif self._silent_looks == _LOOKS:
            # `abort` drops what is buffered, since all of this will be published again.
            silence = f"nothing for {self._timeout:g} s (publish_timeout), with {waiting} messages unconfirmed"
            self._connection.abort(Closure(f"the broker confirmed {silence}"))
            return
        else:
            self._silent_looks += 1
        self._look_later()

    def _returned(self, method: commands.Basic.Return, message_id: str) -> None:
        self._is_alive()
        topic = method.routing_key or ""
        self._unconfirmed.returned(
            message_id,
            topic,
            Never(
                "unroutable",
                f"no queue is bound to exchange {method.exchange!r} for routing key {topic!r} "
                f"({method.reply_code} {method.reply_text}): bind one, or drop the route",
            ),
        )

    def _lost(self, closure: Closure) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
        poisoned = not self._judge(closure) and closure.blames_content
        written = Unknown(f"sent, but not confirmed when it ended: {closure}", poisoned)
        unwritten = _disconnected(closure)
        waiting = list(self._waiting)
        self._waiting.clear()
        self._unconfirmed.give_up(written, unwritten)
        for batch in waiting:
            batch.give_up(written, unwritten)
        self._on_lost(closure)

    def _judge(self, closure: Closure) -> bool:
        """Answers for the events for which the broker closed the channel, where its words tell which those are: sent
        again, they would close it again. Whether it found any."""
        if closure.code == Reply.PRECONDITION_FAILED and (match := _TOO_LARGE.search(closure.said)):
            limit = self.learned_limit = int(match[1])
            return self._refuse_open(
                lambda event: too_large(len(event.payload), limit) if len(event.payload) > limit else None
            )
        if closure.code == Reply.ACCESS_REFUSED:
            refused = Never("access_refused", f"{closure.said}: grant it with rabbitmqctl set_topic_permissions")
            return self._refuse_open(lambda event: refused if f"topic '{event.topic}' in" in closure.said else None)
        return False

    def _refuse_open(self, judge: Callable[[M], Never | None]) -> bool:
        return sum(batch.refuse_open(judge) for batch in self._unconfirmed.batches) > 0


def _disconnected(closure: Closure) -> NotSent:
    return NotSent(str(closure))
