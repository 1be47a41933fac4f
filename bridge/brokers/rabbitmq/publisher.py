"""Publishes batches on one confirm channel, in the order of the calls, and answers for every event."""

import asyncio
import re
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from pamqp import commands

from bridge.brokers.contract import Never, NotSent, Outcome, Unknown
from bridge.brokers.rabbitmq.closure import Closure, Reply
from bridge.brokers.rabbitmq.confirms import Batch, UnconfirmedBatches
from bridge.brokers.rabbitmq.connection import Connection
from bridge.brokers.rabbitmq.frames import CHANNEL, Encoder, RefusedEvent, too_large
from bridge.event import Event

UNCONFIRMED_LIMIT: Final = 200_000
"""Messages whose time ran out and whose confirms may still come. Beyond them the connection is dropped, since a broker
that takes messages and confirms none would fill both memories with retries."""

_CHUNK_MESSAGES: Final = 200
_CHUNK_BYTES: Final = 262_144
"""Most bytes that are encoded and written at once."""
_TOO_LARGE: Final = re.compile(r"message size \d+ (?:is )?larger than (?:configured )?max size (\d+)")


class Publisher:
    """Owns the channel. Everything happens in callbacks of the event loop: no task, and one future a batch."""

    def __init__(self, connection: Connection, encoder: Encoder, timeout: float) -> None:
        """`timeout`: seconds after which a batch is answered, whatever is known by then."""
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._encoder = encoder
        self._timeout = timeout
        self._unconfirmed = UnconfirmedBatches()
        self._waiting: deque[Batch] = deque()

    @property
    def lost(self) -> Closure | None:
        """What ended the connection; None while it works."""
        return self._connection.lost

    @property
    def learned_limit(self) -> int | None:
        """The broker's size limit in bytes, when it closed the channel for a larger message."""
        lost = self.lost
        return self._encoder.max_message_bytes if lost is not None and lost.code == Reply.PRECONDITION_FAILED else None

    async def start(self) -> None:
        """Opens the channel in confirm mode. Raises ClosedError."""
        self._connection.listen(
            confirmed=self._unconfirmed.settled, returned=self._returned, room=self._pump, lost=self._lost
        )
        await self._connection.call(CHANNEL, commands.Channel.Open())
        await self._connection.call(CHANNEL, commands.Confirm.Select())

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        """See `contract.Sink.publish`."""
        if self._connection.lost is not None:
            return [_disconnected(self._connection.lost)] * len(events)
        if not events:
            return []
        batch = Batch(events, self._loop.create_future())
        self._waiting.append(batch)
        if len(self._waiting) == 1:
            self._pump()
        if not batch.done.done():
            timer = self._loop.call_later(self._timeout, self._expire, batch)
            try:
                await batch.done
            finally:
                timer.cancel()
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

    def _write_chunk(self, batch: Batch) -> None:
        encode, events, start = self._encoder.encode, batch.events, batch.next
        chunk: list[bytes] = []
        refused: dict[int, Never] = {}
        size = 0
        index = start
        for index in range(start, min(start + _CHUNK_MESSAGES, len(events))):
            try:
                frames = encode(events[index])
            except RefusedEvent as refusal:
                refused[index] = refusal.failure
                continue
            chunk.append(frames)
            size += len(frames)
            if size >= _CHUNK_BYTES:
                break
        self._unconfirmed.wrote(batch, range(start, min(index + 1, len(events))), refused)
        if chunk:
            self._connection.write(b"".join(chunk))

    def _expire(self, batch: Batch) -> None:
        blocked = self._connection.blocked
        cause = f"RabbitMQ blocks publishers ({blocked})" if blocked else "the connection takes no more"
        self._abandon(
            batch,
            Unknown(f"no confirm came within {self._timeout:g} s"),
            NotSent(f"not sent within {self._timeout:g} s: {cause}"),
        )
        if self._unconfirmed.overdue() > UNCONFIRMED_LIMIT:
            self._connection.lose(Closure(f"more than {UNCONFIRMED_LIMIT} messages were never confirmed"))

    def _abandon(
        self,
        batch: Batch,
        written: Unknown = Unknown("the call was cancelled"),  # noqa: B008 - immutable
        unwritten: NotSent = NotSent("the call was cancelled"),  # noqa: B008 - immutable
    ) -> None:
        with suppress(ValueError):
            self._waiting.remove(batch)
        batch.give_up(written, unwritten)

    def _returned(self, method: commands.Basic.Return, message_id: str) -> None:
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
        self._judge(closure)
        written, unwritten = Unknown(f"sent, but not confirmed when it ended: {closure}"), _disconnected(closure)
        waiting = list(self._waiting)
        self._waiting.clear()
        self._unconfirmed.give_up(written, unwritten)
        for batch in waiting:
            batch.give_up(written, unwritten)

    def _judge(self, closure: Closure) -> None:
        """Answers for the events for which the broker closed the channel: sent again, they would close it again."""
        if closure.code == Reply.PRECONDITION_FAILED and (match := _TOO_LARGE.search(closure.said)):
            limit = self._encoder.max_message_bytes = int(match[1])
            for batch in self._unconfirmed.batches:
                batch.refuse_open(
                    lambda event: too_large(len(event.payload), limit) if len(event.payload) > limit else None
                )
        elif closure.code == Reply.ACCESS_REFUSED:
            refused = Never("access_refused", f"{closure.said}: grant it with rabbitmqctl set_topic_permissions")
            for batch in self._unconfirmed.batches:
                batch.refuse_open(lambda event: refused if f"topic '{event.topic}' in" in closure.said else None)


def _disconnected(closure: Closure) -> NotSent:
    return NotSent(str(closure))
