"""RabbitMQ: persistent, mandatory publishes on one confirm channel, as CloudEvents in binary mode.

It speaks AMQP itself (`bridge.brokers.rabbitmq`), since a client library's task and future for each message would
cost thirty times as much.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from bridge.brokers.contract import Declaration, NotSent, Outcome
from bridge.brokers.rabbitmq.closure import Closure
from bridge.brokers.rabbitmq.connection import Connection, answers, connect, connected
from bridge.brokers.rabbitmq.frames import Encoder
from bridge.brokers.rabbitmq.permissions import may_publish
from bridge.brokers.rabbitmq.publisher import Publisher
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.topology import LOOK_LIMIT, Exchange, declaration, require
from bridge.event import Event

_START_LIMIT: Final = 10.0
"""Seconds that looking for the exchange and opening the channel may take, once connected."""

_NOT_OPEN: Final = NotSent("the sink is not open")


class RabbitMQSink:
    """Publishes to one topic exchange; the routing key is the event's topic."""

    def __init__(self, settings: RabbitMQSettings) -> None:
        self._settings = settings
        self._exchange = Exchange(settings.exchange)
        self._opening = asyncio.Lock()
        self._connection: Connection | None = None
        self._publisher: Publisher[Event] | None = None

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
        """Always: nothing shows beforehand that a queue rejects what is over its limit. The sink's setting `pipelined`
        is for those who know."""
        return True

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

    async def _start(self, connection: Connection) -> Publisher[Event]:
        learned = self._publisher.learned_limit if self._publisher is not None else None
        limit = min(self._settings.max_message_bytes, learned or self._settings.max_message_bytes)
        encoder = Encoder(self._settings.exchange, connection.frame_max, limit)
        publisher = Publisher(connection, encoder.encode, self._settings.publish_timeout)
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

    async def inspect(self, topics: Sequence[str]) -> Sequence[str]:
        """See `contract.InspectableSink.inspect`."""
        async with connected(self._settings, LOOK_LIMIT) as connection:
            await require(self._settings, connection, [self._exchange])
            return await may_publish(self._settings, connection, self._exchange.name, topics) if topics else []
