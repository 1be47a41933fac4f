"""NATS JetStream as a sink.

An event goes to the subject ``<stream>.<topic>`` (`message` says how a topic becomes a subject), with its id as
``Nats-Msg-Id``: JetStream stores it once however often it is sent within two minutes, and confirms the repetition too.

Every message carries its own reply subject, ``<inbox>.<batch>.<index>``, so that one subscription takes all confirms
and a batch costs one future, not one a message. nats-py neither waits nor reconnects here: bytes are queued in the
order of the calls, and a batch waits for room by itself when the server reads too slowly.

A confirm may come late, and is waited for. The sink ends its connection when no confirm at all has come for
`publish_timeout`; and when one stays out for as long while later ones come, since JetStream confirms in order, and so
that one is lost: between the servers of a cluster nothing is sent twice.
"""

import asyncio
import json
import re
from collections.abc import Sequence
from itertools import count
from typing import Final

import nats.errors
import structlog
from nats.aio.msg import Msg

from bridge.brokers.contract import CONFIRMED, Declaration, Never, NotSent, Outcome, Refused, Unknown, Unsendable
from bridge.brokers.nats.connection import PING_INTERVAL, Connection, connect
from bridge.brokers.nats.message import ID_HEADER, headers_of, headers_size, subject_of
from bridge.brokers.nats.permissions import inspected
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.topology import refuses_single_messages, require, stream_declaration
from bridge.brokers.silence import LOOK_INTERVAL, STALLED, Silence
from bridge.errors import PrivilegeError, RefusedError
from bridge.event import REPLAYED, Event, Malformed

log = structlog.get_logger()

ROOM: Final = 16_000_000
"""Bytes queued for the connection beyond which a batch waits."""

DEAD_LETTER_ROOM: Final = 4096
"""Bytes kept free below the server's limit, so that a worker can dead-letter whatever was published."""

MAX_SUBJECT: Final = 3000
"""Bytes; the server closes the connection over a protocol line beyond 4096, and ours holds a reply subject too."""

_DISCONNECTED: Final = NotSent("the connection to NATS is not open")
_NO_STREAM: Final = Refused("no stream answered for the subject: it is gone, or JetStream is not ready")
_STORED: Final = re.compile(rb'\{"stream":"[^"\\]*", ?"seq":\d+\}')
"""What JetStream nearly always answers; parsing it takes six times as long."""
_TOO_LARGE: Final = {10054, 10097}
"""JetStream's codes for a message, or its headers, beyond the stream's limit: refusals that no waiting can help."""

_OVER_A_MESSAGE: Final = (
    "maximum payload violation",
    "maximum control line exceeded",
    "parser error",
    "unknown protocol operation",
    "invalid publish subject",
)
"""Begin the words with which the server ends a connection over what was published on it, in lower case."""

_PONG_LIMIT: Final = 86400
"""Seconds that nats-py waits for the answer to a ping; it is judged by the silence long before."""


class _Batch:
    """The outcomes of one `publish`; `done` once each is known."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = events
        self.outcomes: list[Outcome | None] = [None] * len(events)
        self.missing = len(events)
        self.sent = 0
        """Events below this index were handed to the connection, or refused."""
        self.passed_over = 0.0
        """Seconds for which nothing of this batch has been confirmed, while a later one was."""
        self.done = asyncio.get_running_loop().create_future()

    def settle(self, index: int, outcome: Outcome) -> None:
        if self.outcomes[index] is not None:
            return
        self.outcomes[index] = outcome
        self.missing -= 1
        if not self.missing and not self.done.done():
            self.done.set_result(None)

    def settle_rest(self, unsent: Outcome, sent: Outcome) -> None:
        for index in range(len(self.outcomes)):
            self.settle(index, sent if index < self.sent else unsent)


class NatsSink:
    """Publishes to one stream. See `bridge.brokers.contract.Sink`."""

    def __init__(self, settings: NatsSettings) -> None:
        self._settings = settings
        self._address = str(settings.servers)
        self._connection: Connection | None = None
        self._inbox = ""
        self._limit = settings.max_message_bytes
        self._batches: dict[int, _Batch] = {}
        self._numbers = count()
        self._turn = asyncio.Lock()
        self._denied: dict[str, PrivilegeError] = {}
        """Subjects, in lower case, of messages that the server has just refused, and why."""
        self._watcher: asyncio.Task[None] | None = None
        self._silence = Silence()
        self._newest = -1
        """The latest batch of which something was confirmed."""
        self._pipelines = True
        self._strange_answers = 0

    @property
    def is_open(self) -> bool:
        """See `contract.Sink.is_open`."""
        return self._connection is not None and self._connection.is_open

    @property
    def stalled(self) -> str | None:
        """See `contract.Sink.stalled`."""
        if self._connection is not None and not self._connection.is_open:
            return self._connection.last_words
        if not self._batches or self._silence.seconds <= STALLED:
            return None
        return f"NATS at {self._address} has confirmed nothing for {self._silence.seconds:.0f} s"

    @property
    def pipelines(self) -> bool:
        """See `contract.Sink.pipelines`. False where the stream or the account has a limit, in a cluster, and from the
        first refusal until the sink is opened again."""
        return self._pipelines

    async def open(self) -> None:
        """See `contract.Sink.open`."""
        if self.is_open:
            return
        await self.close()
        connection = await connect(self._settings, denied=self._deny, pings=False)
        try:
            async with connection.asking():
                require([await self._stream(connection, apply=False)], self._settings)
                self._inbox = connection.client.new_inbox()
                # Without a limit, beyond which nats-py would drop confirms.
                await connection.client.subscribe(
                    f"{self._inbox}.*.*", cb=self._confirm, pending_msgs_limit=0, pending_bytes_limit=0
                )
                # So that a refusal of the subscription is heard here.
                await connection.round_trip()
            self._pipelines = not await self._limited(connection)
        except BaseException:
            await connection.close()
            raise
        self._limit = min(self._settings.max_message_bytes, connection.client.max_payload - DEAD_LETTER_ROOM)
        self._connection = connection
        self._silence.end()
        self._watcher = asyncio.create_task(self._watch(connection))

    async def _limited(self, connection: Connection) -> bool:
        jetstream = connection.jetstream()
        try:
            async with connection.asking():
                stream = await jetstream.stream_info(self._settings.stream)
                return refuses_single_messages(stream, await jetstream.account_info())
        except RefusedError:
            # Who may not ask, or reaches no more of another account's JetStream than the stream: better slow than out
            # of order.
            return True

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        """See `contract.Sink.publish`. An event whose subject the server does not permit is Refused."""
        connection = self._connection
        if connection is None or not connection.is_open:
            return [_DISCONNECTED] * len(events)
        if not events:
            return []
        batch = _Batch(events)
        number = next(self._numbers)
        if not self._batches:
            self._silence.end()
        self._batches[number] = batch
        try:
            async with self._turn:
                await self._send(connection, number, batch, events)
            await batch.done
        finally:
            del self._batches[number]
        return [outcome or _DISCONNECTED for outcome in batch.outcomes]

    async def _send(self, connection: Connection, number: int, batch: _Batch, events: Sequence[Event]) -> None:
        """Hands every event to the connection; suspends only for room."""
        client = connection.client
        prefix = f"{self._inbox}.{number}."
        for index, event in enumerate(events):
            # nats-py does not say when there is room.
            while client.pending_data_size > ROOM and connection.is_open:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            if not connection.is_open:
                return  # `_watch` settles it, once what has arrived is counted
            try:
                subject, headers = self._encode(event)
                batch.sent = index + 1
                await client.publish(subject, event.payload, f"{prefix}{index}", headers)
            except Unsendable as refused:
                batch.settle(index, refused.outcome)
            except (nats.errors.Error, OSError, UnicodeError) as error:
                if connection.is_open:
                    batch.settle(index, Never("malformed", f"event {event.id} cannot be written for NATS: {error}"))

    def _encode(self, event: Event) -> tuple[str, dict[str, str]]:
        try:
            subject = subject_of(self._settings.stream, event.topic)
            headers = headers_of(event)
            if REPLAYED not in event.headers:
                # A replay within the duplicate window would be confirmed and not stored.
                headers[ID_HEADER] = event.id
        except Malformed as error:
            raise Unsendable("malformed", str(error)) from error
        except UnicodeError as error:
            raise Unsendable(
                "malformed", f"the topic or a header of event {event.id} is not Unicode: {error}"
            ) from error
        if len(subject) > MAX_SUBJECT:
            raise Unsendable(
                "malformed", f"the subject of event {event.id} has {len(subject)} bytes; {MAX_SUBJECT} fit"
            )
        size = len(event.payload) + headers_size(headers)
        if size > self._limit:
            raise Unsendable(
                "too_large",
                f"the message has {size} bytes with its headers, and {self._limit} are allowed: the lesser of "
                f"max_message_bytes and the server's max_payload less {DEAD_LETTER_ROOM}. Send a reference instead",
            )
        return subject, headers

    async def _confirm(self, message: Msg) -> None:
        batch_number, _, index = message.subject[len(self._inbox) + 1 :].partition(".")
        number = int(batch_number)
        outcome = _outcome_of(message)
        if outcome is None:
            # Somebody else subscribes to the subject, and answers. JetStream's own answer is still to come.
            self._strange_answers += 1
            if self._strange_answers == 1:
                log.warning("nats.strange_answer", sink=self._settings.name, bytes=len(message.data))
            return
        self._silence.end()
        if outcome is CONFIRMED:
            self._newest = max(self._newest, number)
        elif isinstance(outcome, Refused):
            self._pipelines = False
        batch = self._batches.get(number)
        if batch is not None:
            batch.passed_over = 0.0
            batch.settle(int(index), outcome)

    def _deny(self, refusal: PrivilegeError, subject: str) -> None:
        """The server does not permit a subject, and will not confirm what was sent to it."""
        if not self._denied:
            # Refusals come in crowds: one walk through all that is in flight answers for them together.
            asyncio.get_running_loop().call_soon(self._settle_denied)
        self._denied[subject] = refusal

    def _settle_denied(self) -> None:
        denied, self._denied = self._denied, {}
        for batch in self._batches.values():
            for index in range(batch.sent):
                if batch.outcomes[index] is None:
                    subject = subject_of(self._settings.stream, batch.events[index].topic)
                    refusal = denied.get(subject.lower())
                    if refusal is not None:
                        batch.settle(index, Refused(str(refusal)))

    async def _watch(self, connection: Connection) -> None:
        """Notices that the connection is lost; ends it when the server confirms nothing of what waits, or not all."""
        pong: asyncio.Task[None] | None = None
        reason: str | None = None
        try:
            while connection.is_open and reason is None:
                await self._silence.look()
                if pong is not None and pong.done():
                    pong.exception()
                    pong = None
                    self._silence.end()
                if self._batches or pong is not None:
                    reason = await self._silent()
                elif self._silence.seconds >= PING_INTERVAL:
                    self._silence.end()
                    pong = asyncio.create_task(connection.client.flush(_PONG_LIMIT))
        finally:
            if pong is not None:
                pong.cancel()
        outcome = self._gone(connection) if reason is None else Unknown(reason)
        connection.leave()
        self._settle_all(outcome)

    async def _silent(self) -> str | None:
        """Why the connection must end; None while confirms may still come."""
        limit = self._settings.publish_timeout
        if await self._silence.reaches(limit):
            return f"NATS at {self._address} has confirmed nothing for {limit:g} s, so its connection was given up"
        for number, batch in self._batches.items():
            if number < self._newest:
                batch.passed_over += LOOK_INTERVAL
                if batch.passed_over >= limit:
                    return (
                        f"NATS at {self._address} left {batch.missing} events without an answer for {limit:g} s while "
                        "it confirmed later ones, so its connection was given up"
                    )
        return None

    def _settle_all(self, sent: Unknown) -> None:
        for batch in self._batches.values():
            batch.settle_rest(_DISCONNECTED, sent)

    def _gone(self, connection: Connection) -> Unknown:
        words = connection.last_words
        if words is None:
            return Unknown(f"the connection to NATS at {self._address} ended before the confirm came")
        return Unknown(
            f"NATS at {self._address} ended the connection before the confirm came, and said: {words}",
            poisoned=words.lower().startswith(_OVER_A_MESSAGE),
        )

    async def _stream(self, connection: Connection, *, apply: bool) -> Declaration:
        return await stream_declaration(connection.jetstream(), self._settings.stream, apply=apply)

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """See `contract.Sink.topology`: the stream."""
        connection = await connect(self._settings)
        try:
            async with connection.asking():
                return [await self._stream(connection, apply=apply)]
        finally:
            await connection.close()

    async def inspect(self, topics: Sequence[str]) -> Sequence[str]:
        """See `contract.InspectableSink.inspect`."""
        connection = await connect(self._settings)
        try:
            async with connection.asking():
                require([await self._stream(connection, apply=False)], self._settings)
            return await inspected(
                connection,
                self._settings,
                subjects=[],
                topics=topics,
                below=self._settings.stream,
                better={"$JS.API.INFO": "the account's limits are not seen, and a key's events go one by one"},
            )
        finally:
            await connection.close()

    async def close(self) -> None:
        """See `contract.Sink.close`."""
        connection, self._connection = self._connection, None
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        if connection is not None:
            self._settle_all(self._gone(connection))
            await connection.close()


def _outcome_of(message: Msg) -> Outcome | None:
    """What an answer on the reply subject says of its message; None when JetStream did not write it."""
    if not message.data:
        return _NO_STREAM
    if _STORED.fullmatch(message.data):
        return CONFIRMED
    try:
        answer = json.loads(message.data)
        error = answer.get("error")
        if error is None and "seq" in answer:
            return CONFIRMED
        code = error["err_code"]
        reason = f"JetStream refused the message: {error['description']} ({code})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    # The rest depends on the stream (full, sealed, without a leader), which may take the message later.
    return Never("too_large", reason) if code in _TOO_LARGE else Refused(reason)
