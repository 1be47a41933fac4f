"""RabbitMQ, over AMQP 0-9-1.

Publishing is what this project is for, so the sink speaks AMQP itself: `frames` encodes publishes by hand, `confirms`
counts their confirms as ranges, `reader` takes the received bytes apart, `connection` shakes hands and keeps the
socket, and `publisher` puts them together on one confirm channel. `topology` asks and declares over the same
connection. `queue` and `dead` consume with aio-pika, which `client` opens: `message` is what they read, `acks` answers
for it, and `copies` publishes it again, for a retry, a dead letter or a replay, with the sink's publisher.

`settings` takes the URL apart, and `closure` says which error a refusal of the broker is, for all of them.
"""

from typing import Final

from bridge.brokers.accounts import Accounts, Installation
from bridge.brokers.contract import Broker, DeadLetters, Queue, Sink, Subscription
from bridge.brokers.description import Description
from bridge.brokers.rabbitmq.settings import EXAMPLE, RabbitMQSettings


class RabbitMQ:
    """See `contract.Broker`. Each part is imported where it is made, since it takes the client library along."""

    settings = RabbitMQSettings
    requires = None
    example = EXAMPLE

    def accounts(self, installation: Installation, /) -> Accounts:
        from bridge.brokers.rabbitmq.accounts import accounts

        return accounts(installation)

    def sink(self, settings: RabbitMQSettings, /) -> Sink:
        from bridge.brokers.rabbitmq.sink import RabbitMQSink

        return RabbitMQSink(settings)

    def queue(self, settings: RabbitMQSettings, subscription: Subscription, /) -> Queue:
        from bridge.brokers.rabbitmq.queue import RabbitMQQueue

        return RabbitMQQueue(settings, subscription)

    def dead_letters(self, settings: RabbitMQSettings, worker: str, /, *, lanes: int = 1) -> DeadLetters:
        from bridge.brokers.rabbitmq.dead import RabbitMQDeadLetters

        return RabbitMQDeadLetters(settings, worker, lanes)

    def description(self, settings: RabbitMQSettings, /) -> Description:
        from bridge.brokers.rabbitmq.description import RabbitMQDescription

        return RabbitMQDescription(settings)


BROKER: Final[Broker] = RabbitMQ()
