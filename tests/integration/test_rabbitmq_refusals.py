"""What RabbitMQ, or the way to it, refuses: one mistake is told in the same words by everything that connects."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aio_pika
import pytest

from bridge.brokers.contract import Subscription
from bridge.brokers.rabbitmq import client, connection
from bridge.brokers.rabbitmq.queue import RabbitMQQueue
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.sink import RabbitMQSink
from bridge.errors import (
    BrokerUnavailableError,
    LoginError,
    PgbridgeError,
    PrivilegeError,
    RefusedError,
    SettingsError,
    TopologyError,
)
from tests.support.certificates import self_signed
from tests.support.commands import command
from tests.support.daemons import Daemon, run_command
from tests.support.messages import execute
from tests.support.refusals import SINK, all_are_refused, everything_that_connects
from tests.support.servers import RabbitMQServer, free_port
from tests.support.shop import SHOP
from tests.support.tls_rabbitmq import TlsRabbitMQServer
from tests.support.until import rows_become
from tests.support.unwrapped import unwrapped

pytestmark = pytest.mark.rabbitmq


@pytest.fixture(scope="module")
def node(rabbitmq: RabbitMQServer, server_folder: Path) -> Iterator[TlsRabbitMQServer]:
    """Wants certificates of its clients over TLS. `rabbitmq` skips where none is installed."""
    folder = server_folder / "wants-certificates"
    folder.mkdir()
    with TlsRabbitMQServer(folder, wants_certificates=True) as server:
        self_signed(server.folder / "other", name="DNS:localhost")
        server.authority.issue(server.folder / "client")
        server.authority.issue(server.folder / "expired", expired=True)
        yield server


def settings_for(url: str, exchange: str, tls: dict[str, Any] | None = None) -> RabbitMQSettings:
    table = {"type": "rabbitmq", "url": url, "exchange": exchange, "tls": tls or {}}
    return RabbitMQSettings.model_validate(table, context={"sink": SINK})


def queue_of(settings: RabbitMQSettings) -> RabbitMQQueue:
    """The queue of `everything_that_connects`, of a worker that has the exchange's name."""
    wanted = Subscription(settings.exchange, ["#"], 10, [1.0], max_attempts=3, ack_wait=10.0)
    return RabbitMQQueue(settings, wanted)


@dataclass
class Mistake:
    """What is written in the settings, with names of the servers' ports in braces, and what is said of it."""

    url: str
    error: type[PgbridgeError]
    says: list[str]
    key: str = "url"
    tls: dict[str, str] = field(default_factory=dict)


OWN = {"cert_file": "{folder}/client/certificate.pem", "key_file": "{folder}/client/key.pem"}
TRUSTED = {"ca_file": "{folder}/authority/certificate.pem"}

MISTAKES = {
    "nothing there": Mistake(
        "amqp://guest:hunter2@127.0.0.1:1/", BrokerUnavailableError, ["127.0.0.1:1 does not answer: ", "failed"]
    ),
    "no such host": Mistake(
        "amqp://guest:hunter2@no-such-host.invalid/", BrokerUnavailableError, ["no-such-host.invalid:5672", "found"]
    ),
    "password": Mistake("amqp://guest:hunter2@127.0.0.1:{port}/", LoginError, ["'guest'", "ACCESS_REFUSED"]),
    "user": Mistake("amqp://nobody:hunter2@127.0.0.1:{port}/", LoginError, ["'nobody'", "ACCESS_REFUSED"]),
    "no virtual host": Mistake(
        "amqp://guest:guest@127.0.0.1:{port}/no-such",
        RefusedError,
        ["'no-such'", "not found", "rabbitmqctl add_vhost no-such"],
    ),
    "another's virtual host": Mistake(
        "amqp://{user}:hunter2@127.0.0.1:{port}/",
        RefusedError,
        ["access to vhost '/' refused", "rabbitmqctl set_permissions -p / {user} "],
    ),
    "untrusted": Mistake(
        "amqps://guest:hunter2@127.0.0.1:{tls_port}/",
        RefusedError,
        ["not trusted", "self-signed certificate"],
        key="tls.ca_file",
    ),
    "another name": Mistake(
        "amqps://guest:hunter2@0.0.0.0:{tls_port}/",
        RefusedError,
        ["for another name", "IP address mismatch", "sinks.mine.tls.ca_file"],
        tls=TRUSTED,
    ),
    "no client certificate": Mistake(
        "amqps://guest:hunter2@127.0.0.1:{tls_port}/",
        LoginError,
        ["asks for a client certificate, and none is set"],
        key="tls.cert_file",
        tls=TRUSTED,
    ),
    "another's client certificate": Mistake(
        "amqps://guest:hunter2@127.0.0.1:{tls_port}/",
        LoginError,
        ["refuses the certificate in {folder}/other/certificate.pem"],
        key="tls.cert_file",
        tls=TRUSTED | {"cert_file": "{folder}/other/certificate.pem", "key_file": "{folder}/other/key.pem"},
    ),
    "an expired client certificate": Mistake(
        "amqps://guest:hunter2@127.0.0.1:{tls_port}/",
        LoginError,
        ["refuses the certificate in {folder}/expired/certificate.pem", "CERTIFICATE_EXPIRED", "Name one that"],
        key="tls.cert_file",
        tls=TRUSTED | {"cert_file": "{folder}/expired/certificate.pem", "key_file": "{folder}/expired/key.pem"},
    ),
    "password over TLS": Mistake(
        "amqps://guest:hunter2@127.0.0.1:{tls_port}/", LoginError, ["ACCESS_REFUSED"], tls=TRUSTED | OWN
    ),
    "TLS to a port without": Mistake(
        "amqps://guest:hunter2@127.0.0.1:{port}/", RefusedError, ["does not speak TLS", "begins with amqps://"]
    ),
    "no TLS to a port with": Mistake(
        "amqp://guest:hunter2@127.0.0.1:{tls_port}/", RefusedError, ["speaks TLS", "begins with amqp://"]
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
async def test_a_mistake_on_the_way_is_told_alike(node: TlsRabbitMQServer, unique: str, name: str) -> None:
    mistake = MISTAKES[name]
    if "{user}" in mistake.url:
        node.ctl("add_user", unique, "hunter2")
    known = {"port": node.port, "tls_port": node.tls_port, "folder": node.folder, "user": unique}
    tls = {name: value.format(**known) for name, value in mistake.tls.items()}
    settings = settings_for(mistake.url.format(**known), unique, tls)
    words = [f"sinks.{SINK}.{mistake.key}: RabbitMQ at {settings.login} "]
    words += [each.format(**known) for each in mistake.says]
    said = await all_are_refused(everything_that_connects(settings, unique), mistake.error, *words, key=mistake.key)
    for each in said.values():
        assert ("does not answer" in each) == (name == "nothing there")


async def test_a_server_whose_certificate_has_expired_is_to_be_given_another(
    node: TlsRabbitMQServer, unique: str
) -> None:
    tls = {name: value.format(folder=node.folder) for name, value in (TRUSTED | OWN).items()}
    settings = settings_for(f"amqps://guest:hunter2@127.0.0.1:{node.tls_port}/", unique, tls)
    node.show(expired=True)
    try:
        words = (f"sinks.{SINK}.url: RabbitMQ at {settings.login} ", "certificate has expired", "Renew it")
        await all_are_refused(everything_that_connects(settings, unique), RefusedError, *words)
    finally:
        node.show(expired=False)


async def test_certificates_of_the_client_let_it_in(node: TlsRabbitMQServer, unique: str) -> None:
    tls = {name: value.format(folder=node.folder) for name, value in (TRUSTED | OWN).items()}
    settings = settings_for(f"amqps://guest:guest@127.0.0.1:{node.tls_port}/", unique, tls)
    await queue_of(settings).topology(apply=True)
    for use in everything_that_connects(settings, unique).values():
        await use()


OVER_TLS = """
name = "test"
[postgres]
dsn = "{dsn}"
[sinks.events]
type = "rabbitmq"
url = "amqps://guest:guest@127.0.0.1:{port}/"
exchange = "{name}"
tls = {{ {tls} }}
[[routes]]
topic = "#"
sink = "events"
[workers.{name}]
handler = "tests.support.worker_handlers:echo"
reply = "shop.rendered"
"""


async def test_a_bridge_and_a_worker_connect_with_certificates(
    node: TlsRabbitMQServer, bridge_database: str, unique: str, tmp_path: Path
) -> None:
    await execute(bridge_database, SHOP)
    tls = ", ".join(f'{key} = "{value.format(folder=node.folder)}"' for key, value in (TRUSTED | OWN).items())
    text = OVER_TLS.format(dsn=bridge_database, port=node.tls_port, name=unique, tls=tls)
    bridge = Daemon(tmp_path, text)
    await command("topology", "--apply", "--config", str(bridge.config))
    with bridge, Daemon(tmp_path / "worker", text, "run", unique, module="workers.cli"):
        await execute(bridge_database, "select bridge.emit('shop.order.placed', '7'::jsonb)")
        await rows_become(bridge_database, "select result ->> 'of' from shop.invoice", [("7",)])


async def test_a_missing_certificate_is_a_mistake_in_the_settings(tmp_path: Path, unique: str) -> None:
    settings = settings_for("amqps://guest:hunter2@127.0.0.1:1/", unique, {"ca_file": str(tmp_path / "ca.pem")})
    uses = everything_that_connects(settings, unique)
    await all_are_refused(uses, SettingsError, "/ca.pem", key="tls.ca_file")


@pytest.fixture
async def answering() -> AsyncIterator[Callable[[bytes | None], Awaitable[int]]]:
    """Starts servers that answer with these bytes, or with nothing at all; their ports."""
    servers: list[asyncio.Server] = []

    async def start(answer: bytes | None) -> int:
        async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if answer is not None:
                writer.write(answer)
                await writer.drain()
                writer.close()
            else:
                await reader.read()

        port = free_port()
        servers.append(await asyncio.start_server(respond, "127.0.0.1", port))
        return port

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize(
    ("scheme", "answer", "says"),
    [
        ("amqp", b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not AMQP 0-9-1: b'HTTP/1.1'"),
        ("amqp", b"", "no greeting of AMQP 0-9-1"),
        ("amqp", b"SSH", "no greeting of AMQP 0-9-1"),
        ("amqp", None, "does not answer: nothing came within 0.5 s"),
        ("amqps", b"", "ended the connection during the TLS handshake"),
        ("amqps", None, "does not answer: nothing came within 0.5 s"),
    ],
)
async def test_a_server_that_is_not_rabbitmq_is_told(
    unique: str,
    answering: Callable[[bytes | None], Awaitable[int]],
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    answer: bytes | None,
    says: str,
) -> None:
    for module in (connection, client):
        monkeypatch.setattr(module, "CONNECT_LIMIT", 0.5)
    port = await answering(answer)
    uses = everything_that_connects(settings_for(f"{scheme}://guest:hunter2@127.0.0.1:{port}/", unique), unique)
    said = await all_are_refused(uses, BrokerUnavailableError, f"sinks.{SINK}.url: RabbitMQ at 127.0.0.1:{port} ", says)
    for each in said.values():
        assert ("does not answer" in each) == (answer is None)


async def test_what_is_missing_points_to_topology(rabbitmq: RabbitMQServer, unique: str) -> None:
    uses = everything_that_connects(settings_for(rabbitmq.url, unique), unique)
    missing = {name: uses[name] for name in ("sink", "queue", "dead letters")}
    words = (unique, "`pgbridge topology --apply`", f"127.0.0.1:{rabbitmq.port}")
    await all_are_refused(missing, TopologyError, *words)


@dataclass
class Limited:
    """A user with permissions of its own, for an exchange and a worker of its name whose topology is there."""

    settings: RabbitMQSettings
    permit: Callable[[str, str, str], Awaitable[None]]
    """Grants configure, write and read."""


@pytest.fixture
async def limited(rabbitmq: RabbitMQServer, unique: str) -> Limited:
    await queue_of(settings_for(rabbitmq.url, unique)).topology(apply=True)
    rabbitmq.ctl("add_user", unique, "hunter2")

    async def permit(configure: str, write: str, read: str) -> None:
        await asyncio.to_thread(rabbitmq.ctl, "set_permissions", unique, configure, write, read)

    return Limited(settings_for(f"amqp://{unique}:hunter2@127.0.0.1:{rabbitmq.port}/", unique), permit)


def is_told(error: PrivilegeError, resource: str, limited: Limited) -> None:
    said, user = str(error), limited.settings.login.user
    assert said.startswith(f"sinks.{SINK}.url: RabbitMQ at {limited.settings.login} ")
    assert f"access to {resource} in vhost '/' refused" in said
    assert f"`rabbitmqctl set_permissions -p / {user} CONFIGURE WRITE READ`" in said
    assert "hunter2" not in said


@pytest.mark.parametrize(("use", "queue"), [("queue", "{0}"), ("dead letters", "{0}.dead")])
async def test_a_user_that_may_not_read_is_told_of_the_queue(
    rabbitmq: RabbitMQServer, unique: str, limited: Limited, use: str, queue: str
) -> None:
    await limited.permit(".*", ".*", "")
    async with await aio_pika.connect(rabbitmq.url) as other:
        channel = await other.channel()
        await channel.default_exchange.publish(aio_pika.Message(b""), f"{unique}.dead")
    with pytest.raises(PrivilegeError) as caught:
        await everything_that_connects(limited.settings, unique)[use]()
    is_told(caught.value, f"queue '{queue.format(unique)}'", limited)


async def test_a_user_that_may_not_write_is_told_before_anything_is_delivered(unique: str, limited: Limited) -> None:
    await limited.permit("", "", ".*")
    with pytest.raises(PrivilegeError) as caught:
        await queue_of(limited.settings).open()
    is_told(caught.value, "exchange 'amq.default'", limited)


async def test_a_user_that_may_not_configure_sees_the_topology_and_cannot_apply_it(
    rabbitmq: RabbitMQServer, unique: str, limited: Limited
) -> None:
    await limited.permit("", ".*", ".*")
    sink, queue = RabbitMQSink(limited.settings), queue_of(limited.settings)
    for apply in (False, True):
        found = [*await sink.topology(apply=apply), *await queue.topology(apply=apply)]
        things = [each for each in found if each.kind != "binding"]
        assert {(each.state, "cannot be compared" in each.detail) for each in things} == {("present", True)}
    async with await aio_pika.connect(rabbitmq.url) as other:
        channel = await other.channel()
        await channel.queue_delete(f"{unique}.retry.1s")
        states = {each.name: each.state for each in await queue.topology(apply=False)}
        assert states[f"{unique}.retry.1s"] == "missing"
        with pytest.raises(PrivilegeError) as caught:
            await queue.topology(apply=True)
        is_told(caught.value, f"queue '{unique}.retry.1s'", limited)
        await channel.exchange_delete(unique)
        with pytest.raises(PrivilegeError) as caught:
            await sink.topology(apply=True)
        is_told(caught.value, f"exchange '{unique}'", limited)


async def test_an_exchange_of_another_kind_differs_for_sink_and_worker(rabbitmq: RabbitMQServer, unique: str) -> None:
    async with await aio_pika.connect(rabbitmq.url) as other:
        await (await other.channel()).declare_exchange(unique, aio_pika.ExchangeType.FANOUT, durable=True)
    settings = settings_for(rabbitmq.url, unique)
    found = [*await RabbitMQSink(settings).topology(apply=True), *await queue_of(settings).topology(apply=True)]
    exchanges = [each for each in found if each.kind == "exchange"]
    assert len(exchanges) == 2
    assert {each.state for each in exchanges} == {"differs"}
    assert all("fanout" in each.detail and "topic exchange, durable" in each.detail for each in exchanges)


PROCESSES = """
name = "test"
[postgres]
dsn = "{dsn}"
[sinks.events]
type = "rabbitmq"
url = "{url}"
[[routes]]
topic = "#"
sink = "events"
[workers.echo]
handler = "tests.support.worker_handlers:refuse"
subscribe = ["#"]
"""

EVERY_COMMAND = pytest.mark.parametrize(
    ("module", "words"),
    [
        ("bridge.cli", ["run"]),
        ("bridge.cli", ["check"]),
        ("bridge.cli", ["topology"]),
        ("bridge.cli", ["dead", "list"]),
        ("workers.cli", ["run", "echo"]),
    ],
)


@EVERY_COMMAND
def test_every_process_refuses_a_bad_url_with_78_and_its_key(tmp_path: Path, module: str, words: list[str]) -> None:
    config = tmp_path / "bridge.toml"
    config.write_text(PROCESSES.format(dsn="postgresql://127.0.0.1:1/x", url="amqp://user:hunter2@host:port/"))
    done = run_command(*words, "--config", str(config), module=module)
    assert done.returncode == 78, done.stderr
    assert "sinks.events.url: is not a URL, or its port is not a number" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("module", "words"), [("bridge.cli", ["run"]), ("bridge.cli", ["check"]), ("workers.cli", ["run", "echo"])]
)
def test_every_process_ends_with_69_when_the_password_is_refused(
    bridge_database: str, rabbitmq: RabbitMQServer, tmp_path: Path, module: str, words: list[str]
) -> None:
    config = tmp_path / "bridge.toml"
    url = f"amqp://guest:hunter2@127.0.0.1:{rabbitmq.port}/"
    config.write_text(PROCESSES.format(dsn=bridge_database, url=url))
    done = run_command(*words, "--config", str(config), module=module)
    said = unwrapped(done.stdout) + done.stderr
    assert done.returncode == 69, said
    assert f"sinks.events.url: RabbitMQ at 127.0.0.1:{rabbitmq.port} refuses the user 'guest'" in said
    assert "hunter2" not in said
    assert "Traceback" not in said
