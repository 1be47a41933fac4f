"""NATS JetStream as a sink.

An event goes to the subject ``<stream>.<topic>`` (`message` says how a topic becomes a subject), with its id as
``Nats-Msg-Id``: JetStream stores it once however often it is sent within two minutes, and confirms the repetition too.

Every message carries its own reply subject, ``<inbox>.<batch>.<index>``, so that one subscription takes all confirms
and a batch costs one future, not one a message. nats-py neither waits nor reconnects here: bytes are queued in the
order of the calls, and a batch waits for room by itself when the server reads too slowly.
"""

import asyncio
import json
from collections.abc import Sequence
from itertools import count
from typing import Final

import nats.errors
from nats.aio.msg import Msg

from bridge.brokers.contract import CONFIRMED, Declaration, Never, NotSent, Outcome, Refused, Unknown, Unsendable
from bridge.brokers.nats.connection import REQUEST_TIMEOUT, Client, Connection, connect
from bridge.brokers.nats.message import CONTENT_TYPE, ID_HEADER, headers_size, quote_headers, subject_of
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.topology import require, stream_declaration
from bridge.errors import PrivilegeError
from bridge.event import REPLAYED, Event, Malformed, attributes

ROOM: Final = 16_000_000
"""Bytes queued for the connection beyond which a batch waits."""

DEAD_LETTER_ROOM: Final = 4096
"""Bytes kept free below the server's limit, so that a worker can dead-letter whatever was published."""

MAX_SUBJECT: Final = 3000
"""Bytes; the server closes the connection over a protocol line beyond 4096, and ours holds a reply subject too."""

_DISCONNECTED: Final = NotSent("the connection to NATS is not open")
_BLOCKED: Final = NotSent("NATS did not take what was written before within publish_timeout")
_NO_STREAM: Final = Refused("no stream answered for the subject: it is gone, or JetStream is not ready")
_TOO_LARGE: Final = {10054, 10097}
"""JetStream's codes for a message, or its headers, beyond the stream's limit: refusals that no waiting can help."""


class _Batch:
    """The outcomes of one `publish`; `done` once each is known."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = events
        self.outcomes: list[Outcome | None] = [None] * len(events)
        self.missing = len(events)
        self.sent = 0
        """Events below this index were handed to the connection, or refused."""
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

    @property
    def is_open(self) -> bool:
        """See `contract.Sink.is_open`."""
        return self._connection is not None and self._connection.is_open

    @property
    def stalled(self) -> str | None:
        """See `contract.Sink.stalled`."""
        return None

    @property
    def pipelines(self) -> bool:
        """See `contract.Sink.pipelines`."""
        return True

    async def open(self) -> None:
        """See `contract.Sink.open`."""
        if self.is_open:
            return
        await self.close()
        connection = await connect(self._settings, denied=self._deny)
        try:
            async with connection.asking():
                require([await self._stream(connection, apply=False)], self._settings)
                self._inbox = connection.client.new_inbox()
                await connection.client.subscribe(f"{self._inbox}.*.*", cb=self._confirm)
                # The server knows the subscription once it has answered a ping behind it.
                await connection.client.flush(int(REQUEST_TIMEOUT))
        except BaseException:
            await connection.close()
            raise
        self._limit = min(self._settings.max_message_bytes, connection.client.max_payload - DEAD_LETTER_ROOM)
        self._connection = connection
        self._watcher = asyncio.create_task(self._watch(connection))

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        """See `contract.Sink.publish`. An event whose subject the server does not permit is Refused."""
        connection = self._connection
        if connection is None or not connection.is_open:
            return [_DISCONNECTED] * len(events)
        if not events:
            return []
        batch = _Batch(events)
        number = next(self._numbers)
        self._batches[number] = batch
        try:
            async with asyncio.timeout(self._settings.publish_timeout):
                async with self._turn:
                    await self._send(connection.client, number, batch, events)
                await batch.done
        except TimeoutError:
            reason = f"NATS at {self._address} sent no confirm within {self._settings.publish_timeout:g} s"
            batch.settle_rest(_BLOCKED, Unknown(reason))
        finally:
            del self._batches[number]
        return [outcome or _DISCONNECTED for outcome in batch.outcomes]

    async def _send(self, client: Client, number: int, batch: _Batch, events: Sequence[Event]) -> None:
        """Hands every event to the connection; suspends only for room."""
        prefix = f"{self._inbox}.{number}."
        for index, event in enumerate(events):
            # nats-py does not say when there is room.
            while client.pending_data_size > ROOM and client.is_connected:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            try:
                subject, headers = self._encode(event)
                batch.sent = index + 1
                await client.publish(subject, event.payload, f"{prefix}{index}", headers)
            except Unsendable as refused:
                batch.settle(index, refused.outcome)
            except (nats.errors.Error, OSError):
                batch.settle_rest(_DISCONNECTED, self._gone())
                return

    def _encode(self, event: Event) -> tuple[str, dict[str, str]]:
        try:
            subject = subject_of(self._settings.stream, event.topic)
            headers = quote_headers(attributes(event))
            if REPLAYED not in event.headers:
                # A replay within the duplicate window would be confirmed and not stored.
                headers[ID_HEADER] = event.id
            headers[CONTENT_TYPE] = event.content_type
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
        number, _, index = message.subject[len(self._inbox) + 1 :].partition(".")
        batch = self._batches.get(int(number))
        if batch is not None:
            batch.settle(int(index), _outcome_of(message))

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
        await connection.until_lost()
        self._settle_all()

    def _settle_all(self) -> None:
        for batch in self._batches.values():
            batch.settle_rest(_DISCONNECTED, self._gone())

    def _gone(self) -> Unknown:
        return Unknown(f"the connection to NATS at {self._address} ended before the confirm came")

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

    async def close(self) -> None:
        """See `contract.Sink.close`."""
        connection, self._connection = self._connection, None
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        if connection is not None:
            self._settle_all()
            await connection.close()


def _outcome_of(message: Msg) -> Outcome:
    """What an answer on the reply subject says of its message."""
    if not message.data:
        return _NO_STREAM
    try:
        answer = json.loads(message.data)
        error = answer.get("error")
        if error is None and "seq" in answer:
            return CONFIRMED
        code = error["err_code"]
        reason = f"JetStream refused the message: {error['description']} ({code})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return Unknown(f"the confirm is not one of JetStream: {message.data[:200]!r}")
    # The rest depends on the stream (full, sealed, without a leader), which may take the message later.
    return Never("too_large", reason) if code in _TOO_LARGE else Refused(reason)
