"""The brokers that the suite runs on: their server, their sinks' settings, their queues, and what breaks only there.

Two sinks of one server, each behind a wire of its own: `events` takes everything, `second` what is not poison. Each
queue is a consumer's, who sees the events of one sink, or a part of them.
"""

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import ClassVar

import grpc
import nats
import nats.errors
from nats.js import JetStreamContext

from bridge.brokers.nats.topology import dead_stream
from bridge.brokers.rabbitmq.topology import dead_queue
from bridge.errors import UnavailableError
from tests.faults.audit import Audit, NatsAudit, PubSubAudit, RabbitMQAudit, Subscriber
from tests.faults.load import BURST, MOVED, PLACED, PROBED
from tests.faults.outcomes import WORKERS
from tests.support.pubsub import PROJECT
from tests.support.servers import NatsServer, PubSubEmulator, RabbitMQServer, Server
from workers.build import LEASE

SECOND = (PLACED, MOVED, PROBED, BURST)
"""The topics of the second sink."""
_QUIET = 5.0
"""Seconds in which nothing comes from a subscription that holds nothing."""
_START_LIMIT = 60.0
"""Seconds within which a broker that a fault has killed or frozen is there again."""


async def _surely(work: Callable[[], Awaitable[object]]) -> None:
    """As often as it takes, since another fault may have killed or frozen the broker. Raises the last error."""
    deadline = time.monotonic() + _START_LIMIT
    while True:
        try:
            await work()
            return
        except (UnavailableError, nats.errors.Error, OSError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.5)


class Broker:
    """One kind of broker."""

    name: ClassVar[str]
    redelivery: ClassVar[float] = 0.0
    """Seconds until what a process had in hand when it died comes again, where no look at the queue shows that."""

    def __init__(self, server: Server, url: str) -> None:
        self.server = server
        self.url = url
        self.ordered = "ordered = true"
        """What makes a worker ordered, in its settings."""
        self.place = f"faults-{os.getpid()}"

    def settings(self, sink: str, port: int) -> str:
        """What the settings file says of a sink whose broker is at a port."""
        raise NotImplementedError

    def audits(self) -> Sequence[Audit]:
        """One for each queue, that of everything first."""
        raise NotImplementedError

    def full(self, audits: Sequence[Audit]) -> contextlib.AbstractAsyncContextManager[None]:
        """A part of the second sink takes nothing more meanwhile."""
        raise NotImplementedError

    def letters_refused(self) -> contextlib.AbstractAsyncContextManager[None]:
        """The workers' dead letters are refused meanwhile, all but a first one."""
        raise NotImplementedError

    async def left(self, *, stopped: bool) -> list[str]:
        """What the workers' queues still hold, for people. `stopped`: the workers have, so nothing is taken away from
        them by a look."""
        raise NotImplementedError

    def _url_at(self, port: int) -> str:
        return self.url.replace(f":{self.server.port}", f":{port}")

    def _place_of(self, sink: str) -> str:
        return self.place if sink == "events" else f"{self.place}-{sink}"


class RabbitMQ(Broker):
    """The second exchange leads to two queues, of which one can be full."""

    name = "rabbitmq"

    def __init__(self, server: RabbitMQServer) -> None:
        super().__init__(server, server.url)
        self._rabbitmq = server
        self.ordered += "\nlanes = 4"

    def settings(self, sink: str, port: int) -> str:
        url = self._url_at(port)
        return f'type = "rabbitmq"\nurl = "{url}"\nexchange = "{self._place_of(sink)}"\nheartbeat = 4\n'

    def audits(self) -> Sequence[Audit]:
        url, second = self.url, self._place_of("second")
        return [
            RabbitMQAudit(url, self.place, f"{self.place}-audit", "events"),
            RabbitMQAudit(url, second, f"{second}-audit", "second", [PLACED, PROBED, BURST]),
            RabbitMQAudit(url, second, f"{second}-full", "second", [MOVED], room=5),
        ]

    @contextlib.asynccontextmanager
    async def full(self, audits: Sequence[Audit]) -> AsyncIterator[None]:
        audits[2].going.clear()
        try:
            yield
        finally:
            audits[2].going.set()

    @contextlib.asynccontextmanager
    async def alarm(self) -> AsyncIterator[None]:
        """No memory is left, so publishers are blocked."""
        await asyncio.to_thread(self._rabbitmq.alarm, True)
        try:
            yield
        finally:
            await asyncio.to_thread(self._rabbitmq.alarm, False)

    @contextlib.asynccontextmanager
    async def letters_refused(self) -> AsyncIterator[None]:
        await self._limit_letters(1)
        try:
            yield
        finally:
            # A policy without a limit, or none, would go on to refuse those who were refused: only where there is a
            # limit does RabbitMQ look whether there is room again.
            await self._limit_letters(1_000_000)

    async def _limit_letters(self, most: int) -> None:
        policy = json.dumps({"max-length": most, "overflow": "reject-publish"})
        names = "|".join(map(dead_queue, WORKERS)).replace(".", r"\.")
        set_policy = ("set_policy", "--apply-to", "queues", "full", f"^({names})$", policy)
        await _surely(lambda: asyncio.to_thread(self._rabbitmq.ctl, *set_policy))

    async def left(self, *, stopped: bool) -> list[str]:
        command = ("list_queues", "--silent", "--formatter", "json", "name", "messages")
        queues = json.loads(await asyncio.to_thread(self._rabbitmq.ctl, *command))
        ours = [each for each in queues if re.split(r"\.(?:retry|lane)", each["name"])[0] in WORKERS]
        return [f"{each['messages']} messages in queue {each['name']}" for each in ours if each["messages"]]


class Nats(Broker):
    """The second stream can be full."""

    name = "nats"

    def __init__(self, server: NatsServer) -> None:
        super().__init__(server, server.url)

    def settings(self, sink: str, port: int) -> str:
        url = self._url_at(port)
        return f'type = "nats"\nurl = "{url}"\nstream = "{self._place_of(sink)}"\n'

    def audits(self) -> Sequence[Audit]:
        second = self._place_of("second")
        return [
            NatsAudit(self.url, self.place, "audit", "events"),
            NatsAudit(self.url, second, "audit", "second", SECOND),
        ]

    @contextlib.asynccontextmanager
    async def full(self, audits: Sequence[Audit]) -> AsyncIterator[None]:
        await self._limit(audits[1].place, full=True)
        try:
            yield
        finally:
            await self._limit(audits[1].place, full=False)

    @contextlib.asynccontextmanager
    async def letters_refused(self) -> AsyncIterator[None]:
        for worker in WORKERS:
            await self._limit(dead_stream(worker), full=True, room=1)
        try:
            yield
        finally:
            for worker in WORKERS:
                await self._limit(dead_stream(worker), full=False)

    async def left(self, *, stopped: bool) -> list[str]:
        async with self._jetstream() as jetstream:
            infos = [await jetstream.consumer_info(self.place, worker) for worker in WORKERS]
        return [
            f"{info.num_pending} messages not delivered to {info.name}, {info.num_ack_pending} not settled"
            for info in infos
            if info.num_pending or info.num_ack_pending
        ]

    async def _limit(self, stream: str, *, full: bool, room: int = 5) -> None:
        async def limit() -> None:
            async with self._jetstream() as jetstream:
                found = await jetstream.stream_info(stream)
                found.config.max_msgs = found.state.messages + room if full else -1
                await jetstream.update_stream(found.config)

        await _surely(limit)

    @contextlib.asynccontextmanager
    async def _jetstream(self) -> AsyncIterator[JetStreamContext]:
        client = await nats.connect(self.url, connect_timeout=5, allow_reconnect=False)
        try:
            yield client.jetstream()
        finally:
            await client.close()


class PubSub(Broker):
    """Google's emulator. It forgets everything when it is killed, so nobody does that."""

    name = "pubsub"
    redelivery = LEASE + 5.0

    def __init__(self, server: PubSubEmulator) -> None:
        super().__init__(server, server.address)

    def settings(self, sink: str, port: int) -> str:
        address = self._url_at(port)
        return (
            f'type = "pubsub"\nproject = "{PROJECT}"\ntopic = "{self._place_of(sink)}"\nemulator_host = "{address}"\n'
        )

    def audits(self) -> Sequence[Audit]:
        return [
            PubSubAudit(self.url, self.place, f"{self.place}-audit", "events"),
            PubSubAudit(self.url, self._place_of("second"), f"{self.place}-second-audit", "second", SECOND),
        ]

    async def left(self, *, stopped: bool) -> list[str]:
        if not stopped:
            return []
        return [words for worker, topics in WORKERS.items() for words in await self._pulled(worker, topics)]

    async def _pulled(self, worker: str, topics: Sequence[str]) -> list[str]:
        """What comes for some seconds. The emulator obeys no filter, so what the worker does not take comes too."""
        found = []
        last = time.monotonic()
        async with grpc.aio.insecure_channel(self.url) as channel:
            subscription = Subscriber(channel, worker)
            while time.monotonic() - last < _QUIET:
                received = await subscription.pull()
                for flat in [each.message.attributes for each in received]:
                    if flat["ce-type"] in topics:
                        found.append(f"{worker}: {flat['ce-id']} in its subscription")
                        last = time.monotonic()
                await subscription.acknowledge(received)
                await asyncio.sleep(0.05)
        return found
