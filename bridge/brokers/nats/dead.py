"""The dead letters of a worker on NATS: the stream ``<worker>_dead``, read by a consumer that settles nothing."""

import json
from collections.abc import AsyncIterator
from typing import Final
from urllib.parse import unquote

from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import NotFoundError

from bridge.brokers.contract import Decide, Letter, Order, Verdict
from bridge.brokers.letters import PREFIX, in_order, letter_of
from bridge.brokers.nats.connection import REQUEST_TIMEOUT, Connection, connect
from bridge.brokers.nats.message import ID_HEADER, event_of, quote_headers, unquote_headers
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.topology import dead_stream
from bridge.errors import BrokerUnavailableError, TopologyError
from bridge.event import replay_mark

_BATCH: Final = 100
"""Letters read at once."""

_BATCH_BYTES: Final = 16_000_000
"""At most so large, unless the server takes larger messages."""


class NatsDeadLetters:
    """See `bridge.brokers.contract.DeadLetters`.

    A replayed letter goes back to the sink's stream, since a consumer takes from nowhere else: other workers that
    subscribe to its topic get the event again too, and know from their inbox that they have handled it.
    """

    def __init__(self, settings: NatsSettings, worker: str) -> None:
        self._settings = settings
        self._worker = worker
        self._stream = dead_stream(worker)

    async def walk(self, decide: Decide, order: Order | None = None) -> None:
        """See `contract.DeadLetters.walk`."""
        connection = await connect(self._settings)
        try:
            async for message, letter in in_order(self._letters(connection), order):
                await self._act(connection, message, await decide(letter))
        finally:
            await connection.close()

    async def _letters(self, connection: Connection) -> AsyncIterator[tuple[Msg, Letter]]:
        """Reads what is in the stream."""
        async with connection.asking():
            try:
                state = (await connection.jetstream().stream_info(self._stream)).state
            except NotFoundError:
                raise TopologyError(
                    f"{self._settings.key('url')}: NATS at {connection.address} has no stream {self._stream}. "
                    "Run `pgbridge topology --apply`"
                ) from None
        first = state.first_seq
        while state.messages and first <= state.last_seq:
            # What lies behind the last one came meanwhile, perhaps from a replay of ours.
            messages = [each for each in await self._read(connection, first) if _sequence(each) <= state.last_seq]
            if not messages:
                return
            for message in messages:
                yield message, self._letter(message)
            first = _sequence(messages[-1]) + 1

    async def _read(self, connection: Connection, first: int) -> list[Msg]:
        """The next letters, from this sequence number on; none where there are no more.

        A consumer for each batch, since JetStream forgets one that is idle while somebody decides; and not nats-py's
        `fetch`, which takes a letter with a header ``Status`` for a word of the server's.
        """
        jetstream, client = connection.jetstream(), connection.client
        config = ConsumerConfig(
            ack_policy=AckPolicy.NONE, deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=first
        )
        request = {"batch": _BATCH, "no_wait": True, "max_bytes": max(_BATCH_BYTES, 2 * client.max_payload)}
        messages: list[Msg] = []
        async with connection.asking():
            consumer = (await jetstream.add_consumer(self._stream, config)).name
            answers = await client.subscribe(client.new_inbox(), pending_bytes_limit=0)
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{consumer}"
            await client.publish(subject, json.dumps(request).encode(), reply=answers.subject)
            while len(messages) < _BATCH and (answer := await answers.next_msg(REQUEST_TIMEOUT)).reply:
                messages.append(answer)
            await answers.unsubscribe()
            await jetstream.delete_consumer(self._stream, str(consumer))
        status = answer.headers or {}
        if not messages and status.get("Status") != "404":
            said = status.get("Description", "nothing")
            raise BrokerUnavailableError(
                f"{self._settings.key('url')}: NATS at {connection.address} ended the request for dead letters: {said}"
            )
        return messages

    async def _act(self, connection: Connection, message: Msg, verdict: Verdict) -> None:
        jetstream = connection.jetstream()
        async with connection.asking():
            if verdict == "replay":
                await self._publish_again(jetstream, message)
            if verdict != "keep":
                await jetstream.delete_msg(self._stream, _sequence(message))

    async def _publish_again(self, jetstream: JetStreamContext, message: Msg) -> None:
        kept = {
            name: value
            for name, value in (message.headers or {}).items()
            if not unquote(name).startswith(PREFIX) and not name.lower().startswith("nats-")
        }
        kept |= quote_headers(replay_mark())
        # Under the event's id the stream would drop it, had the event come within the duplicate window.
        kept[ID_HEADER] = f"{self._stream}:{_sequence(message)}"
        subject = f"{self._settings.stream}.{message.subject.partition('.')[2]}"
        await jetstream.publish(subject, message.data, stream=self._settings.stream, headers=kept)

    def _letter(self, message: Msg) -> Letter:
        flat = unquote_headers(message.headers or {})
        marks = {name: value for name, value in flat.items() if name.startswith(PREFIX)}
        sequence = str(_sequence(message))
        content_type = (message.headers or {}).get("content-type")
        return letter_of(
            self._worker, self._settings.name, event_of(message), sequence, marks, message.data, content_type
        )


def _sequence(message: Msg) -> int:
    return message.metadata.sequence.stream
