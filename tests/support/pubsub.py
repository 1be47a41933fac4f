"""What tests need of Pub/Sub beside the sink and the queue: settings for the emulator, and a plain reader."""

import asyncio
import time
from typing import Any

import grpc
import pytest
from google.pubsub_v1 import types

from bridge.brokers.pubsub import dead, queue, sink
from bridge.brokers.pubsub.connection import Connection, connect
from bridge.brokers.pubsub.message import from_message
from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.event import Event
from tests.support.until import LIMIT

PROJECT = "pgbridge-tests"


def pubsub_settings(address: str, topic: str, **changes: Any) -> PubSubSettings:
    """Settings of the sink ``events`` on the emulator at this address."""
    values: dict[str, Any] = {"type": "pubsub", "project": PROJECT, "topic": topic, "emulator_host": address}
    values |= {"max_message_bytes": 100_000} | changes
    return PubSubSettings.model_validate(values, context={"sink": "events"})


def speak_as_to_the_service(patch: pytest.MonkeyPatch) -> None:
    """From now on sinks, queues and dead letters take the server at their `endpoint` for Google's service, without TLS
    and tokens: of an emulator they would ask no permissions."""

    async def connected(settings: PubSubSettings) -> Connection:
        return Connection(grpc.aio.insecure_channel(settings.endpoint), settings)

    for module in (sink, queue, dead):
        patch.setattr(module, "connect", connected)


async def delete(settings: PubSubSettings, name: str) -> None:
    """Deletes ``topics/<name>`` or ``subscriptions/<name>``."""
    full = f"projects/{settings.project}/{name}"
    if name.startswith("topics/"):
        method, request = "Publisher/DeleteTopic", types.DeleteTopicRequest.pb()(topic=full)
    else:
        method, request = "Subscriber/DeleteSubscription", types.DeleteSubscriptionRequest.pb()(subscription=full)
    connection = await connect(settings)
    try:
        delete = connection.channel.unary_unary(
            f"/google.pubsub.v1.{method}", request_serializer=type(request).SerializeToString
        )
        await connection.call(delete, request)
    finally:
        await connection.close()


class PubSubReader:
    """Reads all that a topic was given since `subscribe`, in the order of each key."""

    def __init__(self, address: str, topic: str, *, subscription: str | None = None) -> None:
        self._settings = pubsub_settings(address, topic)
        self._topic = f"projects/{PROJECT}/topics/{topic}"
        self._subscription = f"projects/{PROJECT}/subscriptions/{subscription or topic + '-reader'}"

    async def subscribe(self) -> None:
        """From now on the topic's messages are kept for this reader."""
        connection = await connect(self._settings)
        wanted = types.Subscription.pb()(
            name=self._subscription, topic=self._topic, ack_deadline_seconds=600, enable_message_ordering=True
        )
        await connection.call(connection.create_subscription, wanted)
        await connection.close()

    async def messages(self, *, least: int = 0, quiet: float = 0.5, into: list[Any] | None = None) -> list[Any]:
        """Takes protobuf messages until `least` have come (or `LIMIT` is over) and then none for `quiet` seconds.

        With `into` they are added there as they come, so that they are known when the emulator goes meanwhile.
        """
        connection = await connect(self._settings)
        taken = [] if into is None else into
        began = last = time.monotonic()
        # Never a pull that waits: the emulator goes on giving messages to one that was cancelled.
        pull = types.PullRequest.pb()(subscription=self._subscription, max_messages=1000, return_immediately=True)
        try:
            while time.monotonic() - last < quiet or (len(taken) < least and time.monotonic() - began < LIMIT):
                batch = (await connection.call(connection.pull, pull)).received_messages
                if not batch:
                    await asyncio.sleep(0.01)
                    continue
                taken += [received.message for received in batch]
                ids = [received.ack_id for received in batch]
                acknowledge = types.AcknowledgeRequest.pb()(subscription=self._subscription, ack_ids=ids)
                await connection.call(connection.acknowledge, acknowledge)
                # Only now: on a busy machine the answer to this alone may take longer than `quiet`.
                last = time.monotonic()
        finally:
            await connection.close()
        return taken

    async def drain(self, least: int = 0) -> list[Event]:
        """Takes all events, and waits for `least` of them."""
        events = [from_message(message) for message in await self.messages(least=least)]
        assert all(isinstance(event, Event) for event in events), events
        return [event for event in events if isinstance(event, Event)]
