"""Dead letters of a worker on Pub/Sub: how they are marked, listed, replayed and discarded.

They stand in the topic ``<worker>.dead``, whose subscription of the same name keeps them for 31 days.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from google.pubsub_v1 import types

from bridge.errors import BrokerUnavailableError
from bridge.event import Event, Malformed
from bridge.pubsub.connection import Connection, connect
from bridge.pubsub.wire import MAX_ATTRIBUTES, VALUE_BYTES, from_message
from bridge.settings import PubSubSettings
from workers.queues import Failure
from workers.queues.letters import ATTEMPTS, PREFIX, letter_headers
from workers.queues.pubsub_topology import Names

FOR_WORKER: Final = f"{PREFIX}for"
"""Names the one worker that a replayed message is meant for; the queues of others pass over it."""
FORWARDED: Final = "CloudPubSubDeadLetterSource"
"""Begins the attributes of a message that the service itself forwarded, after too many deliveries."""

PULL_LIMIT: Final = 1.0
"""Seconds that a pull waits for dead letters."""
EMPTY_PULLS: Final = 2
"""Pulls without a message after which there is none; the service may answer with fewer than it has."""

_Message: Final = types.PubsubMessage.pb()


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """What a worker could not handle."""

    id: str
    """The event's id; for a message that is no event, the id that the service gave it."""
    event: Event | Malformed
    failure: Failure
    attempts: int
    time: datetime
    """When it was dead-lettered."""


def marked(message: Any, failure: Failure, worker: str, attempts: int) -> Any:
    """The message, with why it failed; texts are cut to what an attribute holds, the trace at its beginning."""
    marks = {
        name: _cut(value, keep_end=name.endswith("trace"))
        for name, value in letter_headers(worker, failure, attempts).items()
    }
    kept = {name: value for name, value in message.attributes.items() if not name.startswith(PREFIX)}
    # A message of ours has room for the marks; a stranger's that has none loses its last attributes.
    kept = dict(sorted(kept.items(), key=lambda item: not item[0].startswith("ce-"))[: MAX_ATTRIBUTES - len(marks)])
    return _Message(data=message.data, attributes=kept | marks)


def _cut(text: str, *, keep_end: bool) -> str:
    cut = text.encode()[-VALUE_BYTES:] if keep_end else text.encode()[:VALUE_BYTES]
    return cut.decode(errors="ignore")


class PubSubDeadLetters:
    """The dead letters of one worker."""

    def __init__(self, settings: PubSubSettings, worker: str) -> None:
        self._settings = settings
        self._worker = worker
        self._names = Names(settings, worker)

    async def letters(self, limit: int = 1000) -> list[DeadLetter]:
        """Up to `limit` dead letters, which stay. Raises BrokerUnavailableError, TopologyError, PrivilegeError."""
        return [letter for letter, _ in await self._walk(limit, (), replay=False)]

    async def replay(self, ids: Collection[str], limit: int = 1000) -> list[str]:
        """Publishes those with these ids again, for this worker alone; gives the ids that were found."""
        return [letter.id for letter, chosen in await self._walk(limit, ids, replay=True) if chosen]

    async def discard(self, ids: Collection[str], limit: int = 1000) -> list[str]:
        """Deletes those with these ids; gives the ids that were found."""
        return [letter.id for letter, chosen in await self._walk(limit, ids, replay=False) if chosen]

    async def _walk(self, limit: int, ids: Collection[str], *, replay: bool) -> list[tuple[DeadLetter, bool]]:
        """Takes up to `limit` in hand, acts on the chosen ones, and gives the others back."""
        connection = await connect(self._settings)
        walked: list[tuple[DeadLetter, bool]] = []
        others: list[str] = []
        try:
            empty = 0
            while len(walked) < limit and empty < EMPTY_PULLS:
                batch = await self._pull(connection, limit - len(walked))
                empty = 0 if batch else empty + 1
                for received in batch:
                    letter = _letter(received.message)
                    chosen = letter.id in ids
                    if chosen and replay:
                        await self._publish_again(connection, received.message)
                    if chosen:
                        await self._acknowledge(connection, received.ack_id)
                    else:
                        others.append(received.ack_id)
                    walked.append((letter, chosen))
        finally:
            await self._give_back(connection, others)
            await connection.close()
        return walked

    async def _pull(self, connection: Connection, count: int) -> Any:
        request = types.PullRequest.pb()(subscription=self._names.dead_subscription, max_messages=min(count, 1000))
        try:
            response = await connection.call(connection.pull, request, limit=PULL_LIMIT)
        except BrokerUnavailableError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return []
            raise
        return response.received_messages

    async def _publish_again(self, connection: Connection, message: Any) -> None:
        kept = {name: value for name, value in message.attributes.items() if not name.startswith((PREFIX, FORWARDED))}
        key = kept.get("ce-subject", "") if self._settings.ordering else ""
        again = _Message(data=message.data, attributes=kept | {FOR_WORKER: self._worker}, ordering_key=key)
        request = types.PublishRequest.pb()(topic=self._names.topic, messages=[again])
        await connection.call(connection.publish, request, limit=self._settings.publish_timeout)

    async def _acknowledge(self, connection: Connection, ack_id: str) -> None:
        request = types.AcknowledgeRequest.pb()(subscription=self._names.dead_subscription, ack_ids=[ack_id])
        await connection.call(connection.acknowledge, request)

    async def _give_back(self, connection: Connection, ack_ids: list[str]) -> None:
        for start in range(0, len(ack_ids), 1000):
            request = types.ModifyAckDeadlineRequest.pb()(
                subscription=self._names.dead_subscription,
                ack_ids=ack_ids[start : start + 1000],
                ack_deadline_seconds=0,
            )
            await connection.call(connection.modify_ack_deadline, request)


def _letter(message: Any) -> DeadLetter:
    flat = dict(message.attributes)
    event = from_message(message)
    if f"{PREFIX}code" in flat:
        reason, trace = flat.get(f"{PREFIX}reason", ""), flat.get(f"{PREFIX}trace", "")
        failure = Failure(flat[f"{PREFIX}code"], reason, trace)
        attempts = flat.get(ATTEMPTS, "0")
    else:
        attempts = flat.get(f"{FORWARDED}DeliveryCount", "0")
        failure = Failure("delivery_limit", f"Pub/Sub delivered it {attempts} times, and no worker settled it")
    at = datetime.fromtimestamp(message.publish_time.seconds + message.publish_time.nanos / 1e9, UTC)
    name = event.id if isinstance(event, Event) else message.message_id
    return DeadLetter(name, event, failure, int(attempts) if attempts.isdigit() else 0, at)
