"""An independent reader of what arrived at the broker: it shares no code with sinks and queues.

It takes every message that the bridge publishes, from a queue, consumer or subscription of its own, and keeps the ids.
"""

import asyncio
import json
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import nats
from aio_pika.abc import AbstractIncomingMessage
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from bridge.supervise import background

TARGET = "events"
"""The exchange, stream or topic that the demo's bridge publishes to."""

_NAME = "audit"
_PULL_INTERVAL = 0.1


class Arrivals:
    """What arrived: how often each event id did."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    @property
    def messages(self) -> int:
        """Different events."""
        return len(self.counts)

    @property
    def duplicates(self) -> int:
        """Arrivals of an event that had arrived before."""
        return self.counts.total() - len(self.counts)


@asynccontextmanager
async def on_rabbitmq(url: str, arrivals: Arrivals) -> AsyncIterator[None]:
    """Counts what the exchange routes, from a queue bound to all topics. The exchange must stand."""

    async def took(message: AbstractIncomingMessage) -> None:
        arrivals.counts[str(message.message_id)] += 1

    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(_NAME, durable=True)
        await queue.bind(TARGET, "#")
        await queue.consume(took, no_ack=True)
        yield


@asynccontextmanager
async def on_nats(url: str, arrivals: Arrivals) -> AsyncIterator[None]:
    """Counts what the stream stores, which must stand; what it has deduplicated, nobody sees."""

    async def took(message: Msg) -> None:
        arrivals.counts[(message.headers or {}).get("Nats-Msg-Id", "")] += 1

    client = await nats.connect(url)
    try:
        inbox = client.new_inbox()
        await client.subscribe(inbox, cb=took)
        await client.jetstream().add_consumer(
            TARGET,
            ConsumerConfig(deliver_subject=inbox, ack_policy=AckPolicy.NONE, deliver_policy=DeliverPolicy.ALL),
        )
        yield
    finally:
        await client.close()


@asynccontextmanager
async def on_pubsub(address: str, project: str, arrivals: Arrivals) -> AsyncIterator[None]:
    """Counts what the topic delivers to a subscription of its own, over the emulator's REST interface."""
    subscription = f"http://{address}/v1/projects/{project}/subscriptions/{_NAME}"
    seen: set[str] = set()

    async def pull_for_ever() -> None:
        while True:
            answer = await _call("POST", f"{subscription}:pull", {"maxMessages": 1000, "returnImmediately": True})
            received = answer.get("receivedMessages", [])
            for message in (each["message"] for each in received):
                # Pub/Sub may deliver one message twice; a duplicate of ours is another message with the same event.
                if message["messageId"] not in seen:
                    seen.add(message["messageId"])
                    arrivals.counts[message["attributes"]["ce-id"]] += 1
            if received:
                await _call("POST", f"{subscription}:acknowledge", {"ackIds": [each["ackId"] for each in received]})
            else:
                await asyncio.sleep(_PULL_INTERVAL)

    await _call("PUT", subscription, {"topic": f"projects/{project}/topics/{TARGET}", "ackDeadlineSeconds": 60})
    async with background(pull_for_ever()):
        yield


async def _call(method: str, url: str, body: dict[str, Any]) -> dict[str, Any]:
    def send() -> dict[str, Any]:
        request = urllib.request.Request(  # noqa: S310 - http, to the emulator that we started
            url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
            answer: dict[str, Any] = json.load(response)
            return answer

    return await asyncio.to_thread(send)
