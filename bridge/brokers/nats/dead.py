"""The dead letters of a worker on NATS: the stream ``<worker>_dead``, read by a consumer that settles nothing."""

from typing import Final
from urllib.parse import unquote

import nats.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import NotFoundError

from bridge.brokers.contract import Decide, Letter
from bridge.brokers.letters import PREFIX, letter_of
from bridge.brokers.nats.connection import Connection, connect
from bridge.brokers.nats.message import ID_HEADER, event_of, quote_headers, unquote_headers
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.topology import dead_stream
from bridge.errors import TopologyError
from bridge.event import REPLAYED

_BATCH: Final = 100


class NatsDeadLetters:
    """See `bridge.brokers.contract.DeadLetters`.

    A replayed letter goes back to the sink's stream, since a consumer takes from nowhere else: other workers that
    subscribe to its topic get the event again too, and know from their inbox that they have handled it.
    """

    def __init__(self, settings: NatsSettings, worker: str) -> None:
        self._settings = settings
        self._worker = worker
        self._stream = dead_stream(worker)

    async def walk(self, decide: Decide) -> None:
        """See `contract.DeadLetters.walk`."""
        connection = await connect(self._settings)
        try:
            jetstream = connection.jetstream()
            async with connection.asking():
                try:
                    state = (await jetstream.stream_info(self._stream)).state
                except NotFoundError:
                    raise TopologyError(
                        f"{self._settings.key('url')}: NATS at {connection.address} has no stream {self._stream}. "
                        "Run `pgbridge topology --apply`"
                    ) from None
            if state.messages:
                await self._walk(connection, state.messages, state.last_seq, decide)
        finally:
            await connection.close()

    async def _walk(self, connection: Connection, count: int, last: int, decide: Decide) -> None:
        jetstream = connection.jetstream()
        async with connection.asking():
            reader = await jetstream.pull_subscribe(
                f"{self._stream}.>", stream=self._stream, config=ConsumerConfig(ack_policy=AckPolicy.NONE)
            )
        while count > 0:
            async with connection.asking():
                try:
                    messages = await reader.fetch(min(_BATCH, count), timeout=1.0)
                except nats.errors.TimeoutError:
                    return  # the last ones were deleted meanwhile
            count -= len(messages)
            for message in messages:
                sequence = message.metadata.sequence.stream
                if sequence > last:
                    return  # came meanwhile, perhaps from a replay of ours
                verdict = await decide(self._letter(message))
                async with connection.asking():
                    if verdict == "replay":
                        await self._publish_again(jetstream, message, sequence)
                    if verdict != "keep":
                        await jetstream.delete_msg(self._stream, sequence)

    async def _publish_again(self, jetstream: JetStreamContext, message: Msg, sequence: int) -> None:
        kept = {
            name: value
            for name, value in (message.headers or {}).items()
            if not unquote(name).startswith(PREFIX) and not name.lower().startswith("nats-")
        }
        kept |= quote_headers({REPLAYED: "true"})
        # Under the event's id the stream would drop it, had the event come within the duplicate window.
        kept[ID_HEADER] = f"{self._stream}:{sequence}"
        subject = f"{self._settings.stream}.{message.subject.partition('.')[2]}"
        await jetstream.publish(subject, message.data, stream=self._settings.stream, headers=kept)

    def _letter(self, message: Msg) -> Letter:
        flat = unquote_headers(message.headers or {})
        marks = {name: value for name, value in flat.items() if name.startswith(PREFIX)}
        sequence = str(message.metadata.sequence.stream)
        content_type = (message.headers or {}).get("content-type")
        return letter_of(
            self._worker, self._settings.name, event_of(message), sequence, marks, message.data, content_type
        )
