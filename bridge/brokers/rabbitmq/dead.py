"""The dead letters of a worker on RabbitMQ: the queue ``<worker>.dead``.

AMQP has no look without a take: each letter is taken and, unless it is replayed or discarded, given back when the
connection closes. Meanwhile others do not see it.
"""

import contextlib
from collections.abc import Iterator

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aio_pika.exceptions import AMQPError, ChannelInvalidStateError, ChannelNotFoundEntity, DeliveryError, PublishError
from pamqp import commands

from bridge.brokers.contract import Decide, Letter
from bridge.brokers.letters import PREFIX, letter_of
from bridge.brokers.rabbitmq.message import copy_of, count_of, event_of
from bridge.brokers.rabbitmq.queue import CONFIRM_TIMEOUT, connect
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.errors import BrokerUnavailableError, TopologyError

_LOST = (AMQPError, ChannelInvalidStateError, ConnectionError, OSError, TimeoutError)


class RabbitMQDeadLetters:
    """See `bridge.brokers.contract.DeadLetters`. A replayed letter goes to its worker's queue alone."""

    def __init__(self, settings: RabbitMQSettings, worker: str) -> None:
        self._settings = settings
        self._worker = worker

    async def walk(self, decide: Decide) -> None:
        """As `DeadLetters.walk`."""
        connection = await connect(self._settings)
        try:
            with _asking():
                channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
            queue = await self._queue(channel)
            for _ in range(queue.declaration_result.message_count or 0):
                with _asking():
                    message = await queue.get(fail=False)
                if message is None:
                    return
                verdict = await decide(self._letter(message))
                if verdict == "replay":
                    await self._publish(channel, message)
                if verdict != "keep":
                    with _asking():
                        await message.ack()
        finally:
            with contextlib.suppress(*_LOST):
                await connection.close()

    async def _queue(self, channel: AbstractChannel) -> aio_pika.abc.AbstractQueue:
        name = f"{self._worker}.dead"
        try:
            with _asking():
                return await channel.declare_queue(name, passive=True)
        except BrokerUnavailableError as error:
            if isinstance(error.__cause__, ChannelNotFoundEntity):
                raise TopologyError(f"RabbitMQ has no queue {name}. Run `pgbridge topology --apply`") from error
            raise

    def _letter(self, message: AbstractIncomingMessage) -> Letter:
        marks = {name: str(value) for name, value in message.headers.items() if name.startswith(PREFIX)}
        if not marks:
            marks = {
                f"{PREFIX}code": "delivery_limit",
                f"{PREFIX}reason": "RabbitMQ moved it here: it was delivered too often, and no worker settled it",
                f"{PREFIX}attempts": str(count_of(message, "x-delivery-count")),
            }
        known_as = message.message_id or str(message.delivery_tag)
        return letter_of(
            self._worker, self._settings.name, event_of(message), known_as, marks, message.body, message.content_type
        )

    async def _publish(self, channel: AbstractChannel, message: AbstractIncomingMessage) -> None:
        copy = copy_of(message, {"replayed": "true"})
        copy.headers = {name: value for name, value in copy.headers.items() if not name.startswith(PREFIX)}
        try:
            with _asking():
                result = await channel.default_exchange.publish(
                    copy, self._worker, mandatory=True, timeout=CONFIRM_TIMEOUT
                )
        except BrokerUnavailableError as error:
            if isinstance(error.__cause__, PublishError) and not isinstance(error.__cause__, DeliveryError):
                raise TopologyError(f"RabbitMQ has no queue {self._worker}. Run `pgbridge topology --apply`") from error
            raise
        if not isinstance(result, commands.Basic.Ack):
            raise BrokerUnavailableError(f"RabbitMQ did not confirm a message for queue {self._worker}: {result}")


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    try:
        yield
    except _LOST as error:
        raise BrokerUnavailableError(f"RabbitMQ refuses, or is gone: {error or type(error).__name__}") from error
