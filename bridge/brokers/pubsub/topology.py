"""What a worker needs on Pub/Sub: its subscription, and a dead-letter topic with a subscription that keeps it."""

import json
from collections.abc import Sequence
from typing import Any, Final

from google.protobuf import duration_pb2
from google.pubsub_v1 import types

from bridge.brokers.contract import Declaration, Subscription
from bridge.brokers.pubsub import permissions, resources
from bridge.brokers.pubsub.connection import Connection
from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.errors import PrivilegeError, SettingsError, TopologyError

ACK_DEADLINES: Final = (10, 60)
"""Seconds: the shortest that Pub/Sub offers, and the longest that a crashed worker's messages should wait."""

MAX_DELIVERIES: Final = 100
"""The most that Pub/Sub offers. It counts nacks, too; long before, the worker itself dead-letters what fails."""

RETENTION: Final = 7 * 86400
"""Seconds that a worker's messages are kept: 7 days."""

DEAD_RETENTION: Final = 31 * 86400
"""Seconds that dead letters are kept: the longest that Pub/Sub offers."""
EMULATED_RETENTION: Final = 7 * 86400
"""Seconds: the longest that the emulator takes."""

MAX_LEASE: Final = 600
"""Seconds: the longest that a lease can be made, and so the longest delay before another attempt."""

FILTER_BYTES: Final = 256
"""Longest filter that Pub/Sub takes."""

_TYPE: Final = 'attributes."ce-type"'


class Names:
    """Full names of a worker's topics and subscriptions."""

    def __init__(self, settings: PubSubSettings, worker: str) -> None:
        """Raises SettingsError for a worker whose name Pub/Sub refuses."""
        if len(worker) < 3 or worker.startswith("goog"):
            raise SettingsError(
                f"workers.{worker}: Pub/Sub names its subscription after the worker, and takes no name shorter than "
                "three characters or beginning with 'goog'; rename the worker"
            )
        self.project = project = f"projects/{settings.project}"
        self.topic = f"{project}/topics/{settings.topic}"
        self.subscription = f"{project}/subscriptions/{worker}"
        self.dead_topic = f"{project}/topics/{worker}.dead"
        self.dead_subscription = f"{project}/subscriptions/{worker}.dead"


def filter_of(patterns: Sequence[str]) -> str:
    """A Pub/Sub filter that lets pass all that the patterns take, and perhaps more; "" lets pass everything.

    The language knows equality and prefixes of attributes: https://cloud.google.com/pubsub/docs/subscription-message-filter
    """
    clauses: set[str] = set()
    for pattern in patterns:
        words = pattern.split(".")
        literal = words[: next((n for n, word in enumerate(words) if word in ("*", "#")), len(words))]
        rest = words[len(literal) :]
        if not literal:
            return ""
        text = ".".join(literal)
        if all(word == "#" for word in rest):
            clauses.add(f"{_TYPE} = {_quoted(text)}")
        if rest:
            clauses.add(f"hasPrefix({_TYPE}, {_quoted(text + '.')})")
    joined = " OR ".join(sorted(clauses))
    return joined if len(joined.encode()) <= FILTER_BYTES else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


async def ack_deadline(connection: Connection, wanted: Subscription, names: Names) -> int:
    """The subscription's ack deadline in seconds.

    Raises TopologyError when the subscription does not exist, or might withhold what the worker wants; PrivilegeError.
    """
    try:
        found = await resources.find_subscription(connection, names.subscription)
    except PrivilegeError:
        # Who may only consume cannot look. Ten seconds are the shortest deadline that there is.
        await permissions.require(connection, [permissions.consume(names.subscription)])
        return 10
    what = f"subscription {wanted.worker!r} in {names.project}"
    if found is None:
        raise TopologyError(f"{connection.at()} has no {what}: run `pgbridge topology --apply`")
    if found.topic != names.topic:
        raise TopologyError(
            f"{connection.at('topic')} has a {what} that reads {found.topic}, not {names.topic}: delete it, then run "
            "`pgbridge topology --apply`"
        )
    if found.filter not in ("", filter_of(wanted.topics)):
        raise TopologyError(
            f"{connection.at()} has a {what} with the filter {found.filter}, which may withhold what the worker wants: "
            "`pgbridge topology` says what to do"
        )
    if wanted.ordered and not found.enable_message_ordering:
        raise TopologyError(
            f"{connection.at('ordering')} has a {what} without message ordering, which workers.{wanted.worker}.ordered "
            "needs and nothing can add: `pgbridge topology` says what to do"
        )
    if wanted.ordered and found.HasField("dead_letter_policy"):
        raise TopologyError(
            f"{connection.at()} has a {what} with a dead-letter policy, under which Pub/Sub may deliver a key out of "
            f"order, against workers.{wanted.worker}.ordered: run `pgbridge topology --apply`"
        )
    return int(found.ack_deadline_seconds)


async def declarations(
    connection: Connection, settings: PubSubSettings, wanted: Subscription, names: Names, *, apply: bool
) -> list[Declaration]:
    """Each of the worker's topics and subscriptions, in the order in which they must be declared."""
    try:
        return await _declarations(connection, settings, wanted, names, apply=apply)
    except PrivilegeError:
        # Who may only consume and publish cannot look, and need not.
        if apply or await permissions.lacking(connection, needs(names)):
            raise
        return [resources.unseen("subscription", names.subscription), resources.unseen("topic", names.dead_topic)]


def needs(names: Names) -> list[permissions.Need]:
    """What a worker must be able to do."""
    return [permissions.consume(names.subscription), permissions.publish_to(names.dead_topic)]


async def _declarations(
    connection: Connection, settings: PubSubSettings, wanted: Subscription, names: Names, *, apply: bool
) -> list[Declaration]:
    topic = await resources.topic_declaration(connection, names.topic, settings.retention, apply=apply, warn=False)
    dead_topic = await resources.topic_declaration(connection, names.dead_topic, 0, apply=apply, warn=False)
    found = [topic, dead_topic]
    for each in (_dead_subscription(names, connection.emulated), _subscription(settings, wanted, names)):
        found += [await resources.subscription_declaration(connection, each, apply=apply)]
    return found


def _subscription(settings: PubSubSettings, wanted: Subscription, names: Names) -> Any:
    shortest, longest = ACK_DEADLINES
    # With it the service promises no order: it forwards when it likes. An ordered worker makes all its dead letters.
    dead_letters = types.DeadLetterPolicy.pb()(dead_letter_topic=names.dead_topic, max_delivery_attempts=MAX_DELIVERIES)
    return types.Subscription.pb()(
        name=names.subscription,
        topic=names.topic,
        ack_deadline_seconds=max(shortest, min(longest, round(wanted.ack_wait))),
        message_retention_duration=duration_pb2.Duration(seconds=RETENTION),
        enable_message_ordering=settings.ordering,
        filter=filter_of(wanted.topics),
        expiration_policy=types.ExpirationPolicy.pb()(),
        dead_letter_policy=None if wanted.ordered else dead_letters,
    )


def _dead_subscription(names: Names, emulated: bool) -> Any:
    return types.Subscription.pb()(
        name=names.dead_subscription,
        topic=names.dead_topic,
        ack_deadline_seconds=60,
        message_retention_duration=duration_pb2.Duration(seconds=EMULATED_RETENTION if emulated else DEAD_RETENTION),
        expiration_policy=types.ExpirationPolicy.pb()(),
    )
