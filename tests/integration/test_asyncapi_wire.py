"""Messages of each broker, as they stand there, are what `pgbridge asyncapi` says of them."""

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import nats
import pytest

from tests.support import awkward
from tests.support.asyncapi import faults
from tests.support.commands import command
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute
from tests.support.pubsub import PROJECT, PubSubReader
from tests.support.servers import NatsServer, PubSubEmulator, RabbitMQServer
from tests.support.until import LIMIT

SCHEMAS = """
select bridge.register_schema('shop.order placed', '{"type": "object", "required": ["id"]}'),
       bridge.register_schema('nötes', '{"type": "string", "maxLength": 5}', 'Notes.', 'text/plain')
"""
BY_HAND = """
select bridge.emit('shop.order placed', '{"id": 1}'::jsonb, 'k 1', '{"tenant": "a b", "traceparent":
         "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}'),
       bridge.emit('shop.order placed', '{"id": 2}'::json),
       bridge.emit('nötes', 'text', 'ü'), bridge.notify('nötes', 'more'),
       pg_notify('open %%', 'heard')
"""


class Raw(NamedTuple):
    """A message as it stands on a broker."""

    address: str
    headers: dict[str, Any]
    body: bytes
    content_type: str | None


class Reader(Protocol):
    async def open(self) -> None:
        """From now on it misses nothing; what is published to exists."""

    async def take(self, count: int) -> list[Raw]: ...


class RabbitMQReader:
    def __init__(self, server: RabbitMQServer, name: str) -> None:
        self._messages = Messages(server.url, name)

    async def open(self) -> None:
        await self._messages.open()

    async def take(self, count: int) -> list[Raw]:
        taken = await self._messages.take(count)
        await self._messages.connection.close()
        return [Raw(m.routing_key or "", dict(m.headers), m.body, m.content_type) for m in taken]


class NatsReader:
    def __init__(self, server: NatsServer, name: str) -> None:
        self._url, self._name = server.url, name

    async def open(self) -> None:
        """A stream keeps what it has."""

    async def take(self, count: int) -> list[Raw]:
        async with await nats.connect(self._url) as client:
            reader = await client.jetstream().subscribe(f"{self._name}.>", ordered_consumer=True)
            taken = [await reader.next_msg(LIMIT) for _ in range(count)]
            return [Raw(m.subject, dict(m.headers or {}), m.data, (m.headers or {})["content-type"]) for m in taken]


class PubSubRawReader:
    def __init__(self, server: PubSubEmulator, name: str) -> None:
        self._reader = PubSubReader(server.address, name)
        self._topic = f"projects/{PROJECT}/topics/{name}"

    async def open(self) -> None:
        await self._reader.subscribe()

    async def take(self, count: int) -> list[Raw]:
        taken: list[Any] = []
        while len(taken) < count:
            taken += await self._reader.messages()
        return [Raw(self._topic, dict(m.attributes), m.data, m.attributes["content-type"]) for m in taken]


READERS: dict[str, Any] = {
    "rabbitmq": RabbitMQReader,
    "nats_server": NatsReader,
    "pubsub_emulator": PubSubRawReader,
}


async def test_messages_are_as_the_document_says(
    request: pytest.FixtureRequest, bridge_database: str, place: tuple[str, str], tmp_path: Path, unique: str
) -> None:
    awkward.create_table(bridge_database, virtual=True)
    await execute(bridge_database, SCHEMAS)
    text = (
        f'name = "test"\nchannels = {{listen = ["open %"]}}\n[postgres]\ndsn = "{bridge_database}"\n{place[0]}\n'
        '[[routes]]\ntopic = "#"\nsink = "e"\n'
    )
    daemon = Daemon(tmp_path, text)
    await command("topology", "--config", str(daemon.config), "--apply")
    kind = request.node.callspec.params["place"]
    reader: Reader = READERS[kind](request.getfixturevalue(kind), unique)
    await reader.open()
    with daemon:
        daemon.wait_for("bridge.leading")
        count = awkward.write(bridge_database)
        await execute(bridge_database, BY_HAND)
        taken = await reader.take(count + 5)
    out, _ = await command("asyncapi", "--config", str(daemon.config), "--format", "json")
    made = json.loads(out)
    channels = {channel["address"] or channel["x-address"]: channel for channel in made["channels"].values()}
    seen = set()
    for raw in taken:
        value = json.loads(raw.body) if raw.content_type == "application/json" else raw.body.decode()
        channel = channels[raw.address]
        found = {name: _faults(made, message, raw, value) for name, message in channel["messages"].items()}
        fitting = [name for name, wrong in found.items() if not wrong]
        assert len(fitting) == 1, (raw, found)
        seen.add(fitting[0])
        # What is required is there, and it is looked at.
        for name in channel["messages"][fitting[0]]["headers"]["required"]:
            without = {header: held for header, held in raw.headers.items() if header != name}
            assert _faults(made, channel["messages"][fitting[0]], raw._replace(headers=without), value)
    assert seen == {name for channel in channels.values() for name in channel["messages"]}
    assert len(seen) == 4 + 2 + 1


def _faults(made: dict[str, Any], message: dict[str, Any], raw: Raw, value: object) -> list[str]:
    wrong = [*faults(made, message["headers"], raw.headers), *faults(made, message["payload"], value)]
    return wrong if raw.content_type == message["contentType"] else [*wrong, "the content type"]
