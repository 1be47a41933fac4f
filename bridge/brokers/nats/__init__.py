"""NATS JetStream.

`settings` reads the URL, `connection` opens, closes and says what an error means, `message` names subjects and writes
headers, `topology` declares streams and consumers. `sink` publishes, `queue` consumes, `dead` reads what was given up.
`ordered` consumes for an ordered worker, one process at a time, and `succession` says when the next one may begin.
"""

from typing import Final

from bridge.brokers.accounts import Accounts, Installation
from bridge.brokers.contract import Broker, DeadLetters, Queue, Sink, Subscription
from bridge.brokers.description import Description
from bridge.brokers.nats.settings import EXAMPLE, NatsSettings


class Nats:
    """See `contract.Broker`. Each part is imported where it is made, since it takes the client library along."""

    settings = NatsSettings
    requires = "nats"
    example = EXAMPLE

    def accounts(self, installation: Installation, /) -> Accounts:
        from bridge.brokers.nats.accounts import accounts

        return accounts(installation)

    def sink(self, settings: NatsSettings, /) -> Sink:
        from bridge.brokers.nats.sink import NatsSink

        return NatsSink(settings)

    def queue(self, settings: NatsSettings, subscription: Subscription, /) -> Queue:
        from bridge.brokers.nats.ordered import OrderedNatsQueue
        from bridge.brokers.nats.queue import NatsQueue

        return (OrderedNatsQueue if subscription.ordered else NatsQueue)(settings, subscription)

    def dead_letters(self, settings: NatsSettings, worker: str, /, *, lanes: int = 1) -> DeadLetters:
        from bridge.brokers.nats.dead import NatsDeadLetters

        return NatsDeadLetters(settings, worker)

    def description(self, settings: NatsSettings, /) -> Description:
        from bridge.brokers.nats.description import NatsDescription

        return NatsDescription(settings)


BROKER: Final[Broker] = Nats()
