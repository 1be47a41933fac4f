"""NATS JetStream as a sink.

An event goes to the subject ``<stream>.<topic>`` (bridge/nats/wire.py says how a topic becomes a subject), with its
id as ``Nats-Msg-Id``: JetStream stores it once however often it is sent within two minutes, and confirms the
repetition too.

Every message carries its own reply subject, ``<inbox>.<batch>.<index>``, so that one subscription takes all confirms
and a batch costs one future, not one a message. nats-py neither waits nor reconnects here: bytes are queued in the
order of the calls, and a batch waits for room by itself when the server reads too slowly.
"""

import asyncio
import json
from collections.abc import Sequence
from itertools import count

import nats.errors
from nats.aio.msg import Msg

from bridge.brokers.contract import CONFIRMED, Declaration, Never, NotSent, Outcome, Refused, Unknown
from bridge.brokers.nats.connection import REQUEST_TIMEOUT, Client, address_of, asking, connect, disconnect, until_lost
from bridge.brokers.nats.message import CONTENT_TYPE, ID_HEADER, headers_size, quote_headers, subject_of
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.topology import require, stream
from bridge.event import REPLAYED, Event, Malformed, attributes

ROOM = 16_000_000
"""Bytes queued for the connection beyond which a batch waits."""

DEAD_LETTER_ROOM = 4096
"""Bytes kept free below the server's limit, so that a worker can dead-letter whatever was published."""

MAX_SUBJECT = 3000
"""Bytes; the server closes the connection over a protocol line beyond 4096, and ours holds a reply subject too."""

_DISCONNECTED = NotSent("the connection to NATS is not open")
_BLOCKED = NotSent("NATS did not take what was written before within publish_timeout")
_NO_STREAM = Refused("no stream answered for the subject: it is gone, or JetStream is not ready")
_TOO_LARGE = {10054, 10097}
"""JetStream's codes for a message, or its headers, beyond the stream's limit: refusals that no wait can help."""


class _Unsendable(Exception):  # noqa: N818 - an outcome on its way
    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.failure = Never(code, reason)


class _Batch:
    """The outcomes of one `publish`; `done` once each is known."""

    def __init__(self, size: int) -> None:
        self.outcomes: list[Outcome | None] = [None] * size
        self.missing = size
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
        """Raises SettingsError when the URL is none."""
        self._settings = settings
        self._address = address_of(settings)
        self._client: Client | None = None
        self._inbox = ""
        self._limit = settings.max_message_bytes
        self._batches: dict[int, _Batch] = {}
        self._numbers = count()
        self._turn = asyncio.Lock()
        self._complaint = ""
        """What the server last complained of; it refuses a subject that we may not publish to without a confirm."""
        self._watcher: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """As `Sink.is_open`."""
        return self._client is not None and self._client.is_connected

    async def open(self) -> None:
        """As `Sink.open`."""
        if self.is_open:
            return
        await self.close()
        self._complaint = ""
        client = await connect(self._settings, told=self._told)
        try:
            async with asking(self._address):
                require([await self._stream(client, apply=False)], self._address)
                self._inbox = client.new_inbox()
                await client.subscribe(f"{self._inbox}.*.*", cb=self._confirm)
                # The server knows the subscription once it has answered a ping behind it.
                await client.flush(int(REQUEST_TIMEOUT))
        except BaseException:
            await disconnect(client)
            raise
        self._limit = min(self._settings.max_message_bytes, client.max_payload - DEAD_LETTER_ROOM)
        self._client = client
        self._watcher = asyncio.create_task(self._watch(client))

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        """As `Sink.publish`."""
        client = self._client
        if client is None or not client.is_connected:
            return [_DISCONNECTED] * len(events)
        if not events:
            return []
        batch = _Batch(len(events))
        number = next(self._numbers)
        self._batches[number] = batch
        try:
            async with asyncio.timeout(self._settings.publish_timeout):
                async with self._turn:
                    await self._send(client, number, batch, events)
                await batch.done
        except TimeoutError:
            reason = f"NATS at {self._address} sent no confirm within {self._settings.publish_timeout:g} s"
            batch.settle_rest(_BLOCKED, Unknown(f"{reason}. {self._complaint}" if self._complaint else reason))
        finally:
            del self._batches[number]
        return [outcome or _DISCONNECTED for outcome in batch.outcomes]

    async def _send(self, client: Client, number: int, batch: _Batch, events: Sequence[Event]) -> None:
        """Hands every event to the connection; suspends only for room."""
        prefix = f"{self._inbox}.{number}."
        for index, event in enumerate(events):
            # nats-py tells nobody when there is room.
            while client.pending_data_size > ROOM and client.is_connected:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            try:
                subject, headers = self._encode(event)
                batch.sent = index + 1
                await client.publish(subject, event.payload, f"{prefix}{index}", headers)
            except _Unsendable as refused:
                batch.settle(index, refused.failure)
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
            raise _Unsendable("malformed", str(error)) from error
        except UnicodeError as error:
            raise _Unsendable(
                "malformed", f"the topic or a header of event {event.id} is no Unicode: {error}"
            ) from error
        if len(subject) > MAX_SUBJECT:
            raise _Unsendable(
                "malformed", f"the subject of event {event.id} has {len(subject)} bytes; {MAX_SUBJECT} fit"
            )
        size = len(event.payload) + headers_size(headers)
        if size > self._limit:
            raise _Unsendable(
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

    async def _told(self, error: Exception) -> None:
        self._complaint = f"It said: {error}"

    async def _watch(self, client: Client) -> None:
        await until_lost(client)
        self._settle_all()

    def _settle_all(self) -> None:
        for batch in self._batches.values():
            batch.settle_rest(_DISCONNECTED, self._gone())

    def _gone(self) -> Unknown:
        return Unknown(f"the connection to NATS at {self._address} ended before the confirm came")

    async def _stream(self, client: Client, *, apply: bool) -> Declaration:
        return await stream(client.jetstream(timeout=REQUEST_TIMEOUT), self._settings.stream, apply=apply)

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """As `Sink.topology`."""
        client = await connect(self._settings)
        try:
            async with asking(self._address):
                return [await self._stream(client, apply=apply)]
        finally:
            await disconnect(client)

    async def close(self) -> None:
        """As `Sink.close`."""
        client, self._client = self._client, None
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        if client is not None:
            self._settle_all()
            await disconnect(client)


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
        return Unknown(f"the confirm is none of JetStream's: {message.data[:200]!r}")
    # The rest depends on the stream's state (full, sealed, no leader), which passes or which a person mends.
    return Never("too_large", reason) if code in _TOO_LARGE else Refused(reason)
