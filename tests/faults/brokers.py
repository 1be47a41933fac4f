"""The brokers that the suite runs on: their server, their sinks' settings, their queues, and what breaks only there.

Two sinks of one server, each behind a wire of its own: `events` takes everything, `second` what is not poison. Each
queue is a consumer's, who sees the events of one sink, or a part of them.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar

import nats

from tests.faults.audit import Audit, NatsAudit, RabbitMQAudit
from tests.faults.load import BURST, MOVED, PLACED
from tests.support.servers import NatsServer, RabbitMQServer, Server

SINKS = ("events", "second")
SECOND = (PLACED, MOVED, BURST)
"""The topics of the second sink."""


class Broker:
    """One kind of broker."""

    name: ClassVar[str]

    def __init__(self, server: Server, url: str) -> None:
        self.server = server
        self.url = url
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

    def settings(self, sink: str, port: int) -> str:
        url = self._url_at(port)
        return f'type = "rabbitmq"\nurl = "{url}"\nexchange = "{self._place_of(sink)}"\nheartbeat = 4\n'

    def audits(self) -> Sequence[Audit]:
        url, second = self.url, self._place_of("second")
        return [
            RabbitMQAudit(url, self.place, f"{self.place}-audit", "events"),
            RabbitMQAudit(url, second, f"{second}-audit", "second", [PLACED, BURST]),
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

    async def _limit(self, stream: str, *, full: bool) -> None:
        client = await nats.connect(self.url, connect_timeout=5, allow_reconnect=False)
        try:
            found = await client.jetstream().stream_info(stream)
            found.config.max_msgs = found.state.messages + 5 if full else -1
            await client.jetstream().update_stream(found.config)
        finally:
            await client.close()
