"""The dead letters of a worker on RabbitMQ: the queue ``<worker>.dead``.

AMQP has no look without a take: each letter is taken and, unless it is replayed or discarded, given back when the
connection closes. Meanwhile others do not see it. RabbitMQ gives back what was taken so in an order of its own.
"""

import contextlib
from collections.abc import AsyncIterator

from aio_pika.abc import AbstractIncomingMessage, AbstractQueue

from bridge.brokers.contract import Decide, Letter, Order
from bridge.brokers.letters import PREFIX, in_order, letter_of
from bridge.brokers.rabbitmq.client import LOST, open_client, refusals
from bridge.brokers.rabbitmq.connection import answers
from bridge.brokers.rabbitmq.copies import Copies, copy_of
from bridge.brokers.rabbitmq.lanes import LANE
from bridge.brokers.rabbitmq.message import Message, count_of, event_of
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.topology import dead_queue, lane_queues
from bridge.event import replay_mark


class RabbitMQDeadLetters:
    """See `contract.DeadLetters`. A replayed letter goes to its worker's queue alone, to that of its lane."""

    def __init__(self, settings: RabbitMQSettings, worker: str, lanes: int = 1) -> None:
        self._settings = settings
        self._worker = worker
        self._queues = lane_queues(worker, lanes)

    async def walk(self, decide: Decide, order: Order | None = None) -> None:
        """See `contract.DeadLetters.walk`.

        Raises SettingsError for certificates that cannot be used, BrokerUnavailableError, LoginError, RefusedError
        for the virtual host, PrivilegeError, TopologyError.
        """
        connection = await open_client(self._settings)
        copies: Copies | None = None
        try:
            with refusals(self._settings, during="declaring"):
                channel = await connection.channel(publisher_confirms=False)
                queue = await channel.declare_queue(dead_queue(self._worker), passive=True)
            async for (message, taken), letter in in_order(self._letters(queue), order):
                verdict = await decide(letter)
                if verdict == "replay":
                    if copies is None:
                        copies = Copies(self._settings)
                        await copies.open()
                    # A person waits, so not for as long as an alarm lasts.
                    async with answers(self._settings, self._settings.publish_timeout):
                        await copies.publish(copy_of(taken, self._queue_of(taken), replay_mark()))
                if verdict != "keep":
                    with refusals(self._settings):
                        await message.ack()
        finally:
            if copies is not None:
                await copies.close()
            with contextlib.suppress(*LOST):
                await connection.close()

    async def _letters(
        self, queue: AbstractQueue
    ) -> AsyncIterator[tuple[tuple[AbstractIncomingMessage, Message], Letter]]:
        """Takes what is in the queue."""
        for _ in range(queue.declaration_result.message_count or 0):
            with refusals(self._settings):
                message = await queue.get(fail=False)
            if message is None:
                return
            taken = Message(
                message.delivery_tag or 0,
                message.exchange or "",
                message.routing_key or "",
                message.properties,
                message.body,
            )
            yield (message, taken), self._letter(taken)

    def _queue_of(self, message: Message) -> str:
        """Where its key is, so that what comes after a replay does not overtake it."""
        return self._queues[count_of(message, LANE) % len(self._queues)]

    def _letter(self, message: Message) -> Letter:
        marks = {name: str(value) for name, value in message.headers.items() if name.startswith(PREFIX)}
        if f"{PREFIX}code" not in marks:
            marks = {
                f"{PREFIX}code": "delivery_limit",
                f"{PREFIX}reason": "RabbitMQ moved it here: it was delivered too often, and no worker settled it",
                f"{PREFIX}attempts": str(count_of(message, "x-delivery-count")),
            }
        known_as = message.properties.message_id or str(message.tag)
        return letter_of(
            self._worker, self._settings.name, event_of(message), known_as, marks, message.body, message.content_type
        )
