"""What the contract suite needs of each broker to make every mistake there: registered in `BROKERS`."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.settings import SinkSettings
from tests.support.certificates import self_signed
from tests.support.pubsub import speak_as_to_the_service
from tests.support.refusals import SECRET, SINK
from tests.support.scripted_pubsub import ScriptedPubSub
from tests.support.servers import NatsServer, RabbitMQServer
from tests.support.tokens import REFUSED, TOKEN, service_account, token_server

NOBODY = "127.0.0.1:1"
"""Where nothing listens."""


@dataclass(frozen=True)
class Mistake:
    """Settings with one mistake in them."""

    settings: SinkSettings
    key: str = "url"
    """The field that leads there."""
    met_late_by: Sequence[str] = ()
    """What the broker lets connect all the same: it says so at the first publish, or where something is declared."""


@dataclass(frozen=True)
class Place:
    """Where a test makes its mistakes."""

    stack: AsyncExitStack
    """Ends, with the test, what was started for it."""
    server: Any
    """What the fixture gave; None without one."""
    name: str
    """One that no other test uses."""
    folder: Path


Make = Callable[[str, Place], Awaitable[Mistake]]


async def rabbitmq(mistake: str, at: Place) -> Mistake:
    server: RabbitMQServer = at.server
    match mistake:
        case "server down":
            return Mistake(_rabbitmq(f"amqp://guest:{SECRET}@{NOBODY}/"))
        case "wrong password":
            return Mistake(_rabbitmq(f"amqp://guest:{SECRET}@127.0.0.1:{server.port}/"))
        case "missing place":
            return Mistake(_rabbitmq(f"amqp://guest:guest@127.0.0.1:{server.port}/{at.name}"))
        case "no permission":
            await asyncio.to_thread(server.ctl, "add_user", at.name, SECRET)
            await asyncio.to_thread(server.ctl, "set_permissions", at.name, "^$", "^$", "^$")
            # Looking for an exchange or a queue needs no permission.
            late = ("sink", "queue", "dead letters")
            return Mistake(_rabbitmq(f"amqp://{at.name}:{SECRET}@127.0.0.1:{server.port}/"), met_late_by=late)
        case "certificate not trusted":
            # TLS comes before the first byte of AMQP, so any server with a certificate will do.
            port = await _tls_server(at)
            return Mistake(_rabbitmq(f"amqps://guest:{SECRET}@127.0.0.1:{port}/"), "tls.ca_file")
    raise ValueError(mistake)


def _rabbitmq(url: str) -> SinkSettings:
    return RabbitMQSettings.model_validate({"type": "rabbitmq", "url": url}, context={"sink": SINK})


async def _tls_server(at: Place) -> int:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*self_signed(at.folder))
    listener = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0, ssl=context)
    await at.stack.enter_async_context(listener)
    return int(listener.sockets[0].getsockname()[1])


async def nats(mistake: str, at: Place) -> Mistake:
    user = f"user: u, password: {SECRET}"
    denied = 'permissions: { publish: { deny: ["$JS.API.>"] } }'
    lines = {
        "wrong password": 'authorization { user: "u", password: "another" }',
        "missing place": f"accounts {{ WITHOUT: {{ users: [{{ {user} }}] }}, WITH: {{ jetstream: enabled }} }}",
        "no permission": f"authorization {{ users: [{{ {user}, {denied} }}] }}",
    }
    if mistake == "server down":
        return Mistake(_nats(NOBODY))
    if mistake == "certificate not trusted":
        certificate, key = self_signed(at.folder / "tls")
        port = await _nats_server(at, f'tls {{ cert_file: "{certificate}", key_file: "{key}" }}')
        return Mistake(_nats(f"127.0.0.1:{port}"), "tls.ca_file")
    return Mistake(_nats(f"127.0.0.1:{await _nats_server(at, lines[mistake])}"))


async def _nats_server(at: Place, *lines: str) -> int:
    server = await asyncio.to_thread(at.stack.enter_context, NatsServer(at.folder, lines=lines))
    return server.port


def _nats(address: str) -> SinkSettings:
    return NatsSettings.model_validate({"type": "nats", "url": f"nats://u:{SECRET}@{address}"}, context={"sink": SINK})


async def pubsub(mistake: str, at: Place) -> Mistake:
    match mistake:
        case "server down":
            return Mistake(_pubsub(emulator_host=NOBODY), "emulator_host")
        case "wrong password":
            tokens = await at.stack.enter_async_context(token_server(*REFUSED))
            return Mistake(_pubsub(credentials=service_account(at.folder, tokens)), "credentials")
        case "missing place":
            service = await _refusing(
                at, grpc.StatusCode.NOT_FOUND, "GetTopic", "CreateTopic", "Pull", "GetSubscription"
            )
            # Who only looks cannot tell a missing project from a missing topic.
            late = ("sink", "queue", "dead letters")
            return Mistake(_pubsub(emulator_host=service.address), "project", met_late_by=late)
        case "no permission":
            denied = grpc.StatusCode.PERMISSION_DENIED
            methods = ("GetTopic", "GetSubscription", "TestIamPermissions", "Pull")
            service = await _refusing(at, denied, *methods)
            speak_as_to_the_service(at.stack.enter_context(pytest.MonkeyPatch.context()))
            return Mistake(_pubsub(endpoint=service.address), "credentials")
        case "certificate not trusted":
            tokens = await at.stack.enter_async_context(token_server(*TOKEN))
            secure = ScriptedPubSub(certificate=self_signed(at.folder / "tls"))
            service = await at.stack.enter_async_context(secure)
            account = service_account(at.folder, tokens)
            return Mistake(_pubsub(credentials=account, endpoint=service.address), "endpoint")
    raise ValueError(mistake)


async def _refusing(at: Place, code: grpc.StatusCode, *methods: str) -> ScriptedPubSub:
    service = await at.stack.enter_async_context(ScriptedPubSub())
    service.refusals = dict.fromkeys(methods, code)
    return service


def _pubsub(**values: str) -> SinkSettings:
    return PubSubSettings.model_validate({"type": "pubsub", "project": "shop", **values}, context={"sink": SINK})


BROKERS: dict[str, tuple[str | None, Make]] = {
    "nats": (None, nats),
    "pubsub": (None, pubsub),
    "rabbitmq": ("rabbitmq", rabbitmq),
}
"""By the sink's type: the fixture of its server, and how a mistake is made there."""
