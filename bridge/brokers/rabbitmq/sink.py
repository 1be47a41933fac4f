"""RabbitMQ: persistent, mandatory publishes on one confirm channel, as CloudEvents in binary mode.

It speaks AMQP itself (`bridge.brokers.rabbitmq`), since a client library's task and future for each message would
cost thirty times as much.
"""

import asyncio
from collections.abc import Sequence
from math import inf
from time import monotonic
from typing import Final

from bridge.brokers.contract import Declaration, NotSent, Outcome
from bridge.brokers.rabbitmq.closure import Closure
from bridge.brokers.rabbitmq.connection import Connection, answers, connect, connected
from bridge.brokers.rabbitmq.frames import Encoder
from bridge.brokers.rabbitmq.publisher import Publisher
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.topology import LOOK_LIMIT, Exchange, declaration, require
from bridge.event import Event

_START_LIMIT: Final = 10.0
"""Seconds that looking for the exchange and opening the channel may take, once connected."""

_CALM_AFTER: Final = 60.0
"""Seconds without a refusal after which events of one key may be on the way together again."""

_NOT_OPEN: Final = NotSent("the sink is not open")


class RabbitMQSink:
    """Publishes to one topic exchange; the routing key is the event's topic."""

    def __init__(self, settings: RabbitMQSettings) -> None:
        self._settings = settings
        self._exchange = Exchange(settings.exchange)
        self._opening = asyncio.Lock()
        self._connection: Connection | None = None
        self._publisher: Publisher | None = None
        self._refused_at = -inf
        """When an earlier publisher was last refused a message, by `time.monotonic`."""

    @property
    def is_open(self) -> bool:
        """See `contract.Sink.is_open`."""
        return self._publisher is not None and self._publisher.lost is None

    @property
    def stalled(self) -> str | None:
        """See `contract.Sink.stalled`."""
        return self._publisher.stalled if self._publisher is not None else None

    @property
    def pipelines(self) -> bool:
        """Whether no queue has refused a message within the last minute.

        A queue that rejects when it is full takes the next message as soon as a consumer has made room, and nothing
        shows beforehand which queues a topic reaches.
        """
        publisher = self._publisher
        refused_at = max(self._refused_at, publisher.refused_at) if publisher is not None else self._refused_at
        return monotonic() - refused_at > _CALM_AFTER

    async def open(self) -> None:
        """See `contract.Sink.open`.

        Raises SettingsError for certificates that cannot be used, BrokerUnavailableError, LoginError, RefusedError
        for the virtual host, PrivilegeError, TopologyError for a missing exchange.
        """
        async with self._opening:
            if self.is_open:
                return
            self._connection = connection = await connect(self._settings)
            try:
                async with answers(self._settings, _START_LIMIT):
                    await require(self._settings, connection, [self._exchange])
                    self._publisher = await self._start(connection)
            except BaseException:
                connection.leave(Closure("opening failed"))
                raise

    async def _start(self, connection: Connection) -> Publisher:
        learned = None
        if self._publisher is not None:
            learned = self._publisher.learned_limit
            self._refused_at = max(self._refused_at, self._publisher.refused_at)
        limit = min(self._settings.max_message_bytes, learned or self._settings.max_message_bytes)
        encoder = Encoder(self._settings.exchange, connection.frame_max, limit)
        publisher = Publisher(connection, encoder, self._settings.publish_timeout)
        await publisher.start()
        return publisher

    async def publish(self, events: Sequence[Event]) -> Sequence[Outcome]:
        """See `contract.Sink.publish`. Never: ``unroutable``, ``too_large``, ``malformed``, ``access_refused``."""
        if self._publisher is None:
            return [_NOT_OPEN] * len(events)
        return await self._publisher.publish(events)

    async def close(self) -> None:
        """See `contract.Sink.close`."""
        async with self._opening:
            connection, self._connection, self._publisher = self._connection, None, None
            if connection is not None:
                await connection.close()

    async def topology(self, *, apply: bool) -> Sequence[Declaration]:
        """The durable topic exchange. Raises what `open` raises, but for a missing exchange."""
        async with connected(self._settings, LOOK_LIMIT) as connection:
            return [await declaration(connection, self._exchange, apply=apply)]
