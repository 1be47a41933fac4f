"""The brokers that the demo runs on: how each is started, set in bridge.toml, and audited."""

import asyncio
import importlib.util
import json
import secrets
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import aio_pika
import nats
from aio_pika.abc import AbstractIncomingMessage
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from bridge.demo.servers import MissingProgramError, NatsServer, PubSubEmulator, RabbitMQServer, Server
from bridge.process.tasks import background

TARGET: Final = "events"
"""The exchange, stream or topic that the demo's bridge publishes to."""

_NAME: Final = "audit"
_PULL_INTERVAL: Final = 0.1
"""Seconds between two pulls while nothing comes."""


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
    """Counts what the exchange routes, from a queue bound to all topics. The exchange must exist."""

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
    """Counts what the stream stores. It must exist; repetitions that it has dropped are seen by nobody."""

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


@dataclass(frozen=True, slots=True)
class DemoBroker:
    """One broker, not yet started."""

    title: str
    server: Server
    sink: str
    """Its lines in ``[sinks.events]`` of bridge.toml."""
    audited: Callable[[Arrivals], AbstractAsyncContextManager[None]]
    """Counts, within the context, all that arrives."""


def make_broker(kind: str, folder: Path) -> DemoBroker:
    """The broker for ``--broker``: ``embedded``, ``rabbitmq`` or ``pubsub``.

    Raises MissingProgramError, saying what to install.
    """
    match kind:
        case "embedded":
            require("nats", "demo")
            nats_server = NatsServer(folder)
            sink = _toml(type="nats", url=nats_server.url, stream=TARGET)
            return DemoBroker("NATS JetStream", nats_server, sink, partial(on_nats, nats_server.url))
        case "rabbitmq":
            rabbitmq = RabbitMQServer(folder)
            sink = _toml(type="rabbitmq", url=rabbitmq.url, exchange=TARGET)
            return DemoBroker("RabbitMQ", rabbitmq, sink, partial(on_rabbitmq, rabbitmq.url))
        case "pubsub":
            require("google.pubsub_v1", "pubsub")
            emulator = PubSubEmulator(folder)
            # An emulator that was there before us may hold the topics of an earlier demo.
            project = f"demo-{secrets.token_hex(4)}"
            sink = _toml(type="pubsub", project=project, topic=TARGET, emulator_host=emulator.address)
            return DemoBroker(
                "the Pub/Sub emulator",
                emulator,
                sink,
                partial(on_pubsub, emulator.address, project),
            )
        case _:
            raise ValueError(f"there is no broker {kind!r}")


def require(module: str, extra: str) -> None:
    """Raises MissingProgramError unless a Python module is installed."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise MissingProgramError(
            f"the package {module.partition('.')[0]} is not installed: pip install 'pgbridge[{extra}]'"
        )


def _toml(**settings: str) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
