"""Whatever another program publishes, each broker's reader makes an event of it or says why it is none."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from unittest.mock import Mock

from google.pubsub_v1 import types
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.msg import Msg
from pamqp import commands

from bridge.brokers.nats.message import event_of as from_nats
from bridge.brokers.pubsub.message import from_message as from_pubsub
from bridge.brokers.rabbitmq.message import Message
from bridge.brokers.rabbitmq.message import event_of as from_rabbitmq
from bridge.event import Event, Malformed

ATTRIBUTES = {"specversion": "1.0", "id": "order-17", "source": "/other", "type": "shop.order.placed"}
OTHERS = ["time", "subject", "datacontenttype", "dataschema", "x", ""]

text = st.text(max_size=10)
names = st.tuples(
    st.sampled_from(["ce-", "CE-", "Ce-", "cloudEvents_", "cloudEvents:", "cloudevents_", ""]),
    st.sampled_from([*ATTRIBUTES, *OTHERS]) | text,
).map("".join) | st.sampled_from(
    ["content-type", "Content-Type", "Nats-Msg-Id", "Status", "x-pgbridge-code", "x-death"]
)
values = (
    st.sampled_from(
        [*ATTRIBUTES.values(), "2026-01-02T03:04:05Z", '"quoted"', '"', "%C0%A0", "%", "\\", "application/"]
    )
    | text
)
content_types = st.none() | st.sampled_from(
    ["application/json", "application/cloudevents+json", "Application/CloudEvents-batch+json", "text/plain", ""]
)
bodies = st.binary(max_size=20) | st.dictionaries(
    st.sampled_from([*ATTRIBUTES, *OTHERS, "data", "data_base64"]), st.none() | text | st.integers() | st.lists(text)
).map(lambda members: json.dumps({**ATTRIBUTES, **members}).encode())


def with_attributes(prefix: str) -> st.SearchStrategy[dict[str, str]]:
    """Any headers, mostly beside those that make an event."""
    whole = {prefix + name: value for name, value in ATTRIBUTES.items()}
    return st.tuples(st.sampled_from([whole, whole, {}]), st.dictionaries(names, values, max_size=4)).map(
        lambda both: {**both[0], **both[1]}
    )


def is_whole(found: Event | Malformed) -> bool:
    """Whether it is an event that a worker can take through all its steps, or says why it is none."""
    if isinstance(found, Malformed):
        return bool(str(found))
    "".join([found.id, found.topic, found.source, found.key or "", *found.headers, *found.headers.values()]).encode()
    return found.time.tzinfo is UTC and len(found.inbox_id) == 36


@given(with_attributes("ce-"), bodies, content_types)
def test_any_message_of_nats_is_an_event_or_malformed(
    headers: dict[str, str], body: bytes, content_type: str | None
) -> None:
    typed = {} if content_type is None else {"Content-Type": content_type}
    reply = "$JS.ACK.s.c.1.2.3.1700000000000000000.0"
    message = Msg(_client=Mock(), subject="s.shop.x", reply=reply, data=body, headers={**headers, **typed} or None)
    assert is_whole(from_nats(message))


@given(with_attributes("ce-"), bodies, content_types)
def test_any_message_of_pubsub_is_an_event_or_malformed(
    headers: dict[str, str], body: bytes, content_type: str | None
) -> None:
    typed = {} if content_type is None else {"content-type": content_type}
    assert is_whole(from_pubsub(types.PubsubMessage.pb()(data=body, attributes={**headers, **typed})))


typed_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.binary(max_size=4) | st.just(Decimal("1.5")) | text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
    max_leaves=4,
) | st.sampled_from([datetime(2026, 1, 2, tzinfo=UTC)])


@given(with_attributes("cloudEvents_"), st.dictionaries(names, typed_values, max_size=3), bodies, content_types)
def test_any_message_of_rabbitmq_is_an_event_or_malformed(
    headers: dict[str, str], typed: dict[str, Any], body: bytes, content_type: str | None
) -> None:
    properties = commands.Basic.Properties(content_type=content_type, headers={**headers, **typed})
    assert is_whole(from_rabbitmq(Message(1, "x", "shop.x", properties, body)))
