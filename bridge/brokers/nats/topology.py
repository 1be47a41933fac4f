"""What must exist on NATS: the stream of events, and for each worker a consumer of it and a stream of dead letters.

The consumer of an ordered worker is *pinned*: it gives all messages to one of the processes that ask for them, until
that one has asked for none for `ack_wait`. nats-py knows nothing of that, so `PinnedConfig` adds it to a consumer's
configuration, and `consumer_state` asks for what the server says.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile
from typing import Any, Final

from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import (
    AccountInfo,
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
    StreamInfo,
)
from nats.js.errors import APIError, NotFoundError

from bridge.brokers.contract import Declaration, Subscription
from bridge.brokers.nats.connection import REQUEST_TIMEOUT, Connection
from bridge.brokers.nats.message import quote_word
from bridge.brokers.nats.settings import NatsSettings
from bridge.errors import TopologyError

DUPLICATE_WINDOW: Final = 120.0
"""Seconds within which a message that is published again is stored once."""


def dead_stream(worker: str) -> str:
    """The name of the stream that holds what a worker gave up."""
    return f"{worker}_dead"


async def declarations(
    connection: Connection, stream: str, subscription: Subscription, *, apply: bool
) -> list[Declaration]:
    """All that a worker needs; with `apply`, what is missing is declared, in this order.

    Raises TopologyError for an ordered worker on a server that pins no consumers.
    """
    version = connection.client.connected_server_version
    if subscription.ordered and (version.major, version.minor) < PINS_SINCE:
        raise TopologyError(
            f"workers.{subscription.worker}.ordered: NATS at {connection.address} is {version.major}.{version.minor}, "
            f"and gives a consumer to one process at a time since {'.'.join(map(str, PINS_SINCE))}: use a newer server"
        )
    jetstream = connection.jetstream()
    return [
        await stream_declaration(jetstream, stream, apply=apply),
        await stream_declaration(jetstream, dead_stream(subscription.worker), apply=apply),
        await _consumer_declaration(connection.client, jetstream, stream, subscription, apply=apply),
    ]


async def stream_declaration(jetstream: JetStreamContext, name: str, *, apply: bool) -> Declaration:
    """The state of a stream that takes ``<name>.>``; with `apply`, a missing one is declared.

    Declared on disk and without limits, since a limit would drop events that no worker has seen: the operator sets
    `max_age` or `max_bytes` to what the disk holds. A full stream refuses what is new, so the bridge waits. Limits and
    replicas are never compared: they are the operator's.
    """
    subject = f"{name}.>"
    try:
        found = (await jetstream.stream_info(name)).config
    except NotFoundError:
        if not apply:
            return Declaration("stream", name, "missing", f"subjects {subject}, file storage")
    else:
        problem = _problem_with(found, subject)
        return Declaration("stream", name, "differs" if problem else "present", problem or f"subjects {subject}")
    await jetstream.add_stream(
        StreamConfig(
            name=name,
            description="pgbridge",
            subjects=[subject],
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            duplicate_window=DUPLICATE_WINDOW,
        )
    )
    return Declaration("stream", name, "declared", f"subjects {subject}, file storage")


def _problem_with(found: StreamConfig, subject: str) -> str | None:
    change = "change it with `nats stream edit`, or name another stream in the settings"
    if subject not in (found.subjects or []):
        return f"it takes {', '.join(found.subjects or []) or 'no subjects'}, and not {subject}; {change}"
    if found.storage != StorageType.FILE:
        return "it is kept in memory, so a restart of the server loses it; delete it and declare it again"
    if found.duplicate_window < DUPLICATE_WINDOW:
        return (
            f"its duplicate window is {found.duplicate_window:g} s, and events that are sent again need "
            f"{DUPLICATE_WINDOW:g} s; {change}"
        )
    return None


def refuses_single_messages(stream: StreamInfo, account: AccountInfo) -> bool:
    """Whether the stream may refuse a message and take a later one: at a limit that acks, ages or sizes move it across.

    Nor does a cluster keep every message: while the stream's leader changes, one may be refused or lost, and the next
    be taken.
    """
    config = stream.config
    per_subject = config.discard_new_per_subject and _limited(config.max_msgs_per_subject)
    full = config.discard == DiscardPolicy.NEW and (_limited(config.max_msgs) or _limited(config.max_bytes))
    limits = [account.limits, *[tier.limits for tier in (account.tiers or {}).values()]]
    clustered = stream.cluster is not None and bool(stream.cluster.name)
    return bool(per_subject or full or clustered or any(_limited(each.max_storage) for each in limits if each))


def _limited(limit: int | None) -> bool:
    return limit is not None and limit > 0


def require(found: Sequence[Declaration], settings: NatsSettings) -> None:
    """Raises TopologyError when anything is missing or differs."""
    lacking = [each for each in found if each.state in ("missing", "differs")]
    if lacking:
        raise TopologyError(
            f"{settings.key('url')}: NATS at {settings.servers} lacks what is needed: "
            + "; ".join(f"{each.kind} {each.name} {each.state}: {each.detail}" for each in lacking)
            + ". Run `pgbridge topology --apply`"
        )


MAX_UNSETTLED: Final = NatsSettings.most_prefetch
"""Messages that all processes of a worker have in hand, or that wait for another attempt; beyond, no more are given."""

Words = tuple[str, ...]


def filters(stream: str, patterns: Sequence[str]) -> list[str]:
    """Subjects that take whatever the patterns take; where NATS cannot say it exactly, they take more.

    A `#` at the end is `>` and, since `>` needs a word, the subject without it. A `#` elsewhere becomes `>` there.
    NATS forbids filters of one consumer that overlap, so one that another covers is left out, and two that overlap
    in part become one that covers both. The queue leaves out what no pattern takes.
    """
    found: set[Words] = set()
    for pattern in patterns:
        words = pattern.split(".")
        fixed = list(takewhile(lambda word: word != "#", words))
        quoted = [word if word == "*" else quote_word(word) for word in fixed]
        if len(fixed) < len(words):
            found.add((stream, *quoted, ">"))
        if fixed and all(word == "#" for word in words[len(fixed) :]):
            found.add((stream, *quoted))
    while pair := next((pair for pair in combinations(sorted(found), 2) if overlap(*pair)), None):
        found.difference_update(pair)
        found.add(_cover(*pair))
    return [".".join(words) for words in sorted(found)]


def overlap(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether some subject is taken by both of these filters, given by their words."""
    for ours, theirs in zip(one, other, strict=False):
        if ">" in (ours, theirs):
            return True
        if ours != theirs and "*" not in (ours, theirs):
            return False
    return len(one) == len(other)


def _cover(one: Words, other: Words) -> Words:
    """The narrowest single filter that takes what both take."""
    merged: list[str] = []
    for ours, theirs in zip(one, other, strict=False):
        if ">" in (ours, theirs):
            break
        merged.append(ours if ours == theirs else "*")
    else:
        if len(one) == len(other):
            return tuple(merged)
    return (*merged, ">")


PINS_SINCE: Final = (2, 11)
"""The version of NATS that knows pinned consumers."""

GROUP: Final = "pgbridge"
"""The one priority group of a pinned consumer; each request for its messages names it."""

_PINNED: Final = "pinned_client"


@dataclass
class PinnedConfig(ConsumerConfig):
    """A consumer that gives all messages to one process at a time."""

    priority_groups: list[str] | None = None
    priority_policy: str | None = None
    priority_timeout: int | None = None
    """Nanoseconds without a request of the pinned process, after which another one is pinned."""


async def consumer_state(client: Client, stream: str, consumer: str) -> dict[str, Any]:
    """What the server says of a consumer, with what nats-py leaves out. Raises NotFoundError and its like."""
    answer = await client.request(f"$JS.API.CONSUMER.INFO.{stream}.{consumer}", timeout=REQUEST_TIMEOUT)
    state: dict[str, Any] = json.loads(answer.data)
    if "error" in state:
        APIError.from_error(state["error"])
    return state


async def _consumer_declaration(
    client: Client, jetstream: JetStreamContext, stream: str, subscription: Subscription, *, apply: bool
) -> Declaration:
    """The state of the worker's consumer; with `apply`, it is declared, or brought to these settings."""
    begins = DeliverPolicy.NEW if subscription.start == "now" else DeliverPolicy.ALL
    wanted: ConsumerConfig = PinnedConfig(
        durable_name=subscription.worker,
        description="pgbridge",
        deliver_policy=begins,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=subscription.ack_wait,
        # The worker decides when a message has had enough deliveries, and dead-letters it.
        max_deliver=-1,
        max_ack_pending=MAX_UNSETTLED,
        filter_subjects=filters(stream, subscription.topics),
        **_pinning(subscription),
    )
    name = f"{stream} -> {subscription.worker}"
    detail = f"subjects {', '.join(wanted.filter_subjects or [])}; ack_wait {subscription.ack_wait:g} s"
    if subscription.ordered:
        detail += "; pinned to one process at a time"
    try:
        state = await consumer_state(client, stream, subscription.worker)
    except NotFoundError:
        problem = None
        detail += f"; begins {'now' if subscription.start == 'now' else 'with the oldest message'}"
        if not apply:
            return Declaration("consumer", name, "missing", detail)
    else:
        pinning = {key: value for key, value in state["config"].items() if key.startswith("priority_")}
        found = ConsumerConfig.from_response(state["config"])
        # Where it began is its own matter; NATS refuses to change it.
        wanted = wanted.evolve(
            deliver_policy=found.deliver_policy,
            opt_start_seq=found.opt_start_seq,
            opt_start_time=found.opt_start_time,
        )
        problem = _consumer_problem(found, wanted) or _pinning_problem(pinning, subscription)
        if problem is None:
            return Declaration("consumer", name, "present", detail)
        if not apply:
            return Declaration("consumer", name, "differs", f"{problem}; `pgbridge topology --apply` changes it")
    await jetstream.add_consumer(stream, wanted)
    return Declaration("consumer", name, "declared", f"{detail}{'; before: ' + problem if problem else ''}")


def _consumer_problem(found: ConsumerConfig, wanted: ConsumerConfig) -> str | None:
    subjects = sorted(found.filter_subjects or ([found.filter_subject] if found.filter_subject else []))
    if subjects != wanted.filter_subjects:
        return f"it takes {', '.join(subjects) or 'everything'}"
    for name in ("ack_policy", "ack_wait", "max_deliver", "max_ack_pending"):
        if getattr(found, name) != getattr(wanted, name):
            return f"its {name} is {getattr(found, name)}, not {getattr(wanted, name)}"
    return None


def _pinning(subscription: Subscription) -> dict[str, Any]:
    if not subscription.ordered:
        return {}
    timeout = round(subscription.ack_wait * 1_000_000_000)
    return {"priority_groups": [GROUP], "priority_policy": _PINNED, "priority_timeout": timeout}


def _pinning_problem(found: dict[str, Any], subscription: Subscription) -> str | None:
    """What has to be changed. An unordered worker's processes would get nothing of a pinned consumer, and an ordered
    one's would get another's messages of one that is not."""
    policy = found.get("priority_policy", "none")
    if not subscription.ordered:
        return None if policy == "none" else f"its priority_policy is {policy}, as of an ordered worker"
    wanted = _pinning(subscription)
    if policy != _PINNED:
        return (
            f"its priority_policy is {policy}, not {_PINNED}, as an ordered worker needs it: "
            "stop all processes of the worker first, since they would go on side by side"
        )
    for name in ("priority_groups", "priority_timeout"):
        if found.get(name) != wanted[name]:
            return f"its {name} is {found.get(name)}, not {wanted[name]}"
    return None
