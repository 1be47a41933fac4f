"""Topics and subscriptions: what exists, what is missing, what differs; and declaring it.

What can be changed in place, `apply` changes; of what cannot (a filter, ordering) the declaration says what to do.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

from google.protobuf import duration_pb2, field_mask_pb2
from google.pubsub_v1 import types

from bridge.brokers.contract import Declaration
from bridge.brokers.pubsub.connection import Connection, MissingError
from bridge.errors import TopologyError

NOT_KEPT: Final = (
    "WARNING: no subscription and no retention: the service confirms what is published here and keeps none of it. "
    "Set the sink's retention, or declare a worker's subscription"
)
DELETED_TOPIC: Final = "_deleted-topic_"
"""What the service gives as the topic of a subscription whose topic was deleted."""

_Topic: Final = types.Topic.pb()
_GetTopic: Final = types.GetTopicRequest.pb()
_UpdateTopic: Final = types.UpdateTopicRequest.pb()
_GetSubscription: Final = types.GetSubscriptionRequest.pb()
_UpdateSubscription: Final = types.UpdateSubscriptionRequest.pb()
_ListSubscriptions: Final = types.ListTopicSubscriptionsRequest.pb()

_MUTABLE: Final = ("ack_deadline_seconds", "message_retention_duration", "dead_letter_policy", "retry_policy")
_IMMUTABLE: Final = ("filter", "enable_message_ordering", "topic")


async def find_topic(connection: Connection, name: str) -> Any | None:
    """The Topic of this full name; None when there is none."""
    return await _found(connection, connection.get_topic, _GetTopic(topic=name))


async def find_subscription(connection: Connection, name: str) -> Any | None:
    """The Subscription of this full name; None when there is none."""
    return await _found(connection, connection.get_subscription, _GetSubscription(subscription=name))


async def _found(connection: Connection, method: Any, request: Any) -> Any | None:
    try:
        return await connection.call(method, request)
    except MissingError:
        return None


async def keeps_messages(connection: Connection, topic: Any) -> bool:
    """Whether what is published to this Topic is kept for anyone."""
    if topic.message_retention_duration.seconds:
        return True
    request = _ListSubscriptions(topic=topic.name, page_size=1)
    return bool((await connection.call(connection.list_topic_subscriptions, request)).subscriptions)


async def topic_declaration(
    connection: Connection, name: str, retention: float, *, apply: bool, warn: bool = True
) -> Declaration:
    """The state of a topic that should keep messages for `retention` seconds; with `warn`, whether any are kept."""
    short = name.rpartition("/")[2]
    wanted = _Topic(name=name)
    if retention:
        wanted.message_retention_duration.CopyFrom(duration_pb2.Duration(seconds=int(retention)))
    detail = f"keeps messages for {_days(retention)}" if retention else "keeps no messages itself"
    found = await find_topic(connection, name)
    if found is None and not apply:
        return Declaration("topic", short, "missing", detail)
    state: Literal["declared", "present"] = "declared"
    if found is None:
        found = await _created(connection, wanted)
    elif found.message_retention_duration == wanted.message_retention_duration:
        state = "present"
    elif apply:
        mask = field_mask_pb2.FieldMask(paths=["message_retention_duration"])
        found = await connection.call(connection.update_topic, _UpdateTopic(topic=wanted, update_mask=mask))
    else:
        kept = _days(found.message_retention_duration.seconds)
        return Declaration("topic", short, "differs", f"keeps messages for {kept}; --apply sets {_days(retention)}")
    if warn and not await keeps_messages(connection, found):
        return Declaration("topic", short, "differs", NOT_KEPT)
    return Declaration("topic", short, state, detail)


async def _created(connection: Connection, topic: Any) -> Any:
    try:
        return await connection.call(connection.create_topic, topic)
    except MissingError as error:
        # Of what a topic is created in, there is only the project.
        project = topic.name.split("/")[1]
        raise TopologyError(
            f"{connection.at('project')} has no project {project!r}, or does not show it to these credentials"
        ) from error


async def subscription_declaration(connection: Connection, wanted: Any, *, apply: bool) -> Declaration:
    """The state of a subscription that should be as the Subscription `wanted`."""
    short = wanted.name.rpartition("/")[2]
    detail = _described(wanted)
    found = await find_subscription(connection, wanted.name)
    if found is None:
        if not apply:
            return Declaration("subscription", short, "missing", detail)
        await connection.call(connection.create_subscription, wanted)
        return Declaration("subscription", short, "declared", detail)
    stuck = [name for name in _IMMUTABLE if getattr(found, name) != getattr(wanted, name)]
    if stuck:
        return Declaration("subscription", short, "differs", _immutable(found, wanted, stuck))
    changed = [name for name in _MUTABLE if getattr(found, name) != getattr(wanted, name)]
    if changed and not apply:
        detail = f"{', '.join(changed)} differ; --apply changes them"
        return Declaration("subscription", short, "differs", detail)
    if changed:
        mask = field_mask_pb2.FieldMask(paths=changed)
        request = _UpdateSubscription(subscription=wanted, update_mask=mask)
        await connection.call(connection.update_subscription, request)
        return Declaration("subscription", short, "declared", f"changed: {', '.join(changed)}")
    if found.HasField("expiration_policy") and not found.expiration_policy.HasField("ttl"):
        return Declaration("subscription", short, "present", detail)
    command = f"gcloud pubsub subscriptions update {short} --expiration-period=never"
    return Declaration("subscription", short, "differs", f"it is deleted when nobody uses it for a while; {command}")


def _described(subscription: Any) -> str:
    parts = [f"of topic {subscription.topic.rpartition('/')[2]}"]
    parts.append(f"keeps messages for {_days(subscription.message_retention_duration.seconds)}")
    parts.append("in order per key" if subscription.enable_message_ordering else "in no order")
    if subscription.filter:
        parts.append(f"filter {subscription.filter}")
    if subscription.dead_letter_policy.dead_letter_topic:
        policy = subscription.dead_letter_policy
        parts.append(
            f"after {policy.max_delivery_attempts} deliveries to {policy.dead_letter_topic.rpartition('/')[2]}"
        )
    return "; ".join(parts)


def _immutable(found: Any, wanted: Any, names: Sequence[str]) -> str:
    differences = "; ".join(f"{name} is {getattr(found, name)!r}, wanted {getattr(wanted, name)!r}" for name in names)
    short = wanted.name.rpartition("/")[2]
    return (
        f"{differences}. Pub/Sub cannot change this: let the worker empty the subscription, stop it, then "
        f"`gcloud pubsub subscriptions delete {short}` and `pgbridge topology --apply`; what is published in between "
        "is lost to this worker, unless the topic keeps messages and the new subscription seeks back"
    )


def _days(seconds: float) -> str:
    return f"{seconds / 86400:g} d" if seconds >= 86400 else f"{seconds / 60:g} min"


def unseen(kind: str, name: str) -> Declaration:
    """Of what these credentials may use, and not look at."""
    detail = "these credentials may use it, and may not look at it (roles/pubsub.viewer)"
    return Declaration(kind, name.rpartition("/")[2], "present", detail, assumed=True)
