"""docs/wire.md names all that a message of each broker carries beside its payload, and nothing else."""

import re
from collections.abc import Callable, Iterable
from typing import Final

import pytest
from google.pubsub_v1 import types
from pamqp import frame, header

from bridge.brokers.nats.message import ID_HEADER, headers_of
from bridge.brokers.pubsub.message import Encoder as PubSubEncoder
from bridge.brokers.rabbitmq.frames import Encoder as AmqpEncoder
from tests.support.environment import ROOT
from tests.support.events import make_event
from tests.support.frames import together

EVENT: Final = make_event(headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "actor": "{}", "mine": "1"})


def amqp() -> Iterable[str]:
    rest = together(AmqpEncoder("events", 4096, 1_000_000).encode(EVENT))
    while rest:
        size, _, found = frame.unmarshal(rest)
        rest = rest[size:]
        if isinstance(found, header.ContentHeader):
            properties = dict(found.properties)
            headers = properties.pop("headers")
            assert isinstance(headers, dict)
            yield from headers
            yield from (name for name, value in properties.items() if value)


def nats() -> Iterable[str]:
    return [ID_HEADER, *headers_of(EVENT)]


def pubsub() -> Iterable[str]:
    _, field = PubSubEncoder(ordering=True, max_payload=100_000).encode(EVENT)
    [message] = types.PublishRequest.pb().FromString(field).messages
    return dict(message.attributes)


@pytest.mark.parametrize(("column", "carried"), [(2, amqp), (3, nats), (4, pubsub)])
def test_the_page_names_what_a_message_carries(column: int, carried: Callable[[], Iterable[str]]) -> None:
    rows = re.findall(r"^\|.*\|$", (ROOT / "docs" / "wire.md").read_text(), re.MULTILINE)[2:]
    assert len(rows) == 12
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[column])}
    assert named == set(carried()) - {"mine"}
