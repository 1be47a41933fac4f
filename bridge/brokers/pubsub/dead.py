"""Dead letters of a worker on Pub/Sub: how they are shown, replayed and discarded.

They are in the topic ``<worker>.dead``, whose subscription of the same name keeps them for 31 days.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from google.pubsub_v1 import types

from bridge.brokers.contract import Decide, Letter, Order
from bridge.brokers.letters import ATTEMPTS, PREFIX, in_order, letter_of
from bridge.brokers.pubsub.connection import Connection, TimedOutError, connect
from bridge.brokers.pubsub.message import CONTENT_TYPE, FOR_WORKER, NOT_THE_EVENTS, from_message
from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.brokers.pubsub.topology import MAX_LEASE, Names
from bridge.event import replay_mark

FORWARDED_COUNT: Final = "CloudPubSubDeadLetterSourceDeliveryCount"
"""Marks a message that the service itself forwarded, after so many deliveries."""

PULL_LIMIT: Final = 1.0
"""Seconds that a pull waits for dead letters."""
EMPTY_PULLS: Final = 2
"""Pulls without a new message after which there is none; the service may answer with fewer than it has."""
_BATCH: Final = 100
_EXTEND_INTERVAL: Final = MAX_LEASE / 4
"""Seconds after which what is in hand is kept in hand for longer, while somebody decides."""

_Message: Final = types.PubsubMessage.pb()
_Modify: Final = types.ModifyAckDeadlineRequest.pb()


class PubSubDeadLetters:
    """See `bridge.brokers.contract.DeadLetters`.

    A replayed letter goes to the sink's topic, since no message can be given to one subscription; the queues of other
    workers pass over it. Subscriptions that are not ours see it again, under the same `ce-id`.
    """

    def __init__(self, settings: PubSubSettings, worker: str) -> None:
        self._settings = settings
        self._worker = worker
        self._names = Names(settings, worker)

    async def walk(self, decide: Decide, order: Order | None = None) -> None:
        """See `contract.DeadLetters.walk`. Until the end, a letter is in hand, and nobody else can see it."""
        connection = await connect(self._settings)
        kept: dict[str, str] = {}
        replayed: set[str] = set()
        loop = asyncio.get_running_loop()
        try:
            extended = loop.time()
            async for message, letter in in_order(self._letters(connection, kept), order):
                # One that was replayed may have been refused again by now: it is for the next walk.
                verdict = "keep" if letter.id in replayed else await decide(letter)
                if verdict == "replay":
                    replayed.add(letter.id)
                    await self._publish_again(connection, message)
                if verdict != "keep":
                    await self._remove(connection, kept.pop(message.message_id))
                if loop.time() - extended > _EXTEND_INTERVAL:
                    await self._extend(connection, list(kept.values()), MAX_LEASE)
                    extended = loop.time()
        finally:
            await self._extend(connection, list(kept.values()), 0)
            await connection.close()

    async def _letters(self, connection: Connection, kept: dict[str, str]) -> AsyncIterator[tuple[Any, Letter]]:
        """Takes what is there in hand; `kept` has its ack ids by its message ids."""
        empty = 0
        while empty < EMPTY_PULLS:
            batch = await self._pull(connection)
            fresh = [received.message for received in batch if received.message.message_id not in kept]
            kept |= {received.message.message_id: received.ack_id for received in batch}
            empty = 0 if fresh else empty + 1
            for message in fresh:
                yield message, self._letter(message)

    async def _pull(self, connection: Connection) -> Any:
        request = types.PullRequest.pb()(
            subscription=self._names.dead_subscription, max_messages=_BATCH, return_immediately=connection.emulated
        )
        try:
            response = await connection.call(connection.pull, request, limit=PULL_LIMIT)
        except TimedOutError:
            return []
        await self._extend(connection, [each.ack_id for each in response.received_messages], MAX_LEASE)
        return response.received_messages

    def _letter(self, message: Any) -> Letter:
        flat = dict(message.attributes)
        if f"{PREFIX}code" not in flat:
            count = flat.get(FORWARDED_COUNT, "0")
            flat |= {
                f"{PREFIX}code": "delivery_limit",
                f"{PREFIX}reason": f"Pub/Sub delivered it {count} times, and no worker settled it",
                f"{PREFIX}failed-at": message.publish_time.ToDatetime().isoformat() + "+00:00",
                ATTEMPTS: count,
            }
        return letter_of(
            self._worker, self._settings.name, from_message(message), message.message_id, flat,
            bytes(message.data), flat.get(CONTENT_TYPE),
        )  # fmt: skip

    async def _publish_again(self, connection: Connection, message: Any) -> None:
        flat = {name: value for name, value in message.attributes.items() if not name.startswith(NOT_THE_EVENTS)}
        key = flat.get("ce-subject", "") if self._settings.ordering else ""
        flat |= {FOR_WORKER: self._worker, **replay_mark()}
        again = _Message(data=message.data, attributes=flat, ordering_key=key)
        request = types.PublishRequest.pb()(topic=self._names.topic, messages=[again])
        await connection.call(connection.publish, request, limit=self._settings.publish_timeout)

    async def _remove(self, connection: Connection, ack_id: str) -> None:
        request = types.AcknowledgeRequest.pb()(subscription=self._names.dead_subscription, ack_ids=[ack_id])
        await connection.call(connection.acknowledge, request)

    async def _extend(self, connection: Connection, ack_ids: list[str], seconds: int) -> None:
        for start in range(0, len(ack_ids), _BATCH):
            part = ack_ids[start : start + _BATCH]
            request = _Modify(subscription=self._names.dead_subscription, ack_ids=part, ack_deadline_seconds=seconds)
            await connection.call(connection.modify_ack_deadline, request)
