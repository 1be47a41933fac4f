"""Google Cloud Pub/Sub, over gRPC with raw protobuf.

`connection` connects and says what an error means, `message` is an event as a Pub/Sub message, `resources` looks at
topics and subscriptions and declares them, `topology` says which of them a worker needs. `sink` publishes through
`requests`, one in flight per key; `queue` pulls, `lease` keeps what is in hand, `dead` reads what was given up.
"""

from typing import Final

from bridge.brokers.accounts import Accounts, Installation
from bridge.brokers.contract import Broker, DeadLetters, Queue, Sink, Subscription
from bridge.brokers.description import Description
from bridge.brokers.pubsub.settings import EXAMPLE, PubSubSettings


class PubSub:
    """See `contract.Broker`. Each part is imported where it is made, since it takes the client library along."""

    settings = PubSubSettings
    requires = "google.pubsub_v1"
    example = EXAMPLE

    def accounts(self, installation: Installation, /) -> Accounts:
        from bridge.brokers.pubsub.accounts import accounts

        return accounts(installation)

    def sink(self, settings: PubSubSettings, /) -> Sink:
        from bridge.brokers.pubsub.sink import PubSubSink

        return PubSubSink(settings)

    def queue(self, settings: PubSubSettings, subscription: Subscription, /) -> Queue:
        from bridge.brokers.pubsub.queue import PubSubQueue

        return PubSubQueue(settings, subscription)

    def dead_letters(self, settings: PubSubSettings, worker: str, /, *, lanes: int = 1) -> DeadLetters:
        from bridge.brokers.pubsub.dead import PubSubDeadLetters

        return PubSubDeadLetters(settings, worker)

    def description(self, settings: PubSubSettings, /) -> Description:
        from bridge.brokers.pubsub.description import PubSubDescription

        return PubSubDescription(settings)


BROKER: Final[Broker] = PubSub()
