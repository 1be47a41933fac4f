"""One mistake has one answer on NATS, whoever meets it: its class, the key of the setting, the address, no secret."""

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.errors import Error as NatsError
from pydantic import ValidationError

from bridge.brokers.contract import CONFIRMED, Refused, Subscription
from bridge.brokers.nats.connection import Connection, _open, connect, tasks_of, transport_of
from bridge.brokers.nats.queue import NatsQueue
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.sink import NatsSink
from bridge.errors import (
    BrokerUnavailableError,
    LoginError,
    PgbridgeError,
    PrivilegeError,
    RefusedError,
    SettingsError,
    TopologyError,
)
from bridge.settings import load
from tests.support.certificates import self_signed
from tests.support.events import make_event
from tests.support.proxy import Proxy
from tests.support.refusals import SINK, all_are_refused, everything_that_connects
from tests.support.servers import NatsServer
from tests.support.until import LIMIT


def settings_of(url: str, stream: str = "events", **changes: Any) -> NatsSettings:
    values = {"type": "nats", "url": url, "stream": stream, **changes}
    return NatsSettings.model_validate(values, context={"sink": SINK})


def queue_of(settings: NatsSettings, worker: str = "shop") -> NatsQueue:
    return NatsQueue(settings, Subscription(worker, ["#"], 10, [1.0], max_attempts=3, ack_wait=3.0))


async def all_meet(settings: NatsSettings, kind: type[PgbridgeError], *words: str, key: str = "url") -> None:
    """Everything that connects is refused in this way within 4 s, by an error that names the servers."""
    uses = everything_that_connects(settings, apply=True)
    await all_are_refused(uses, kind, str(settings.servers), *words, key=key, limit=4.0)


@contextmanager
def server(folder: Path, *lines: str, jetstream: bool = True) -> Iterator[NatsServer]:
    with NatsServer(folder, jetstream=jetstream, lines=lines) as started:
        yield started


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://u:hunter2@h:4222",
        "nats://",
        "nats://u:hunter2@:4222",
        "nats://u:hunter2@h:port",
        "nats://u:hunter2@h:99999",
        "nats://u:12/hunter2@h",
        "nats://u:hunter2@h/stream",
        "nats://u:12,hunter2@h",
        "nats://u:hunter2@[::1",
        "u:hunter2@h:4222",
        "nats://a:hunter2@h1,nats://b:hunter2@h2",
    ],
)
def test_a_url_that_is_not_one_is_refused_when_settings_load(tmp_path: Path, url: str) -> None:
    path = tmp_path / "bridge.toml"
    path.write_text(f'name = "test"\n[sinks.mine]\ntype = "nats"\nurl = "{url}"\n')
    with pytest.raises(SettingsError) as caught:
        load(path, {})
    assert "sinks.mine.url: " in str(caught.value)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValidationError):
        settings_of(url)


@pytest.mark.parametrize(
    ("url", "addresses", "login"),
    [
        ("h", "h:4222", (None, None, None)),
        ("nats://h:1", "h:1", (None, None, None)),
        ("tls://u:p@h1:1, h2", "h1:1, h2:4222", ("u", "p", None)),
        ("nats://t%2Fken@[::1]:1", "[::1]:1", (None, None, "t/ken")),
        ("nats://u:p%40%2F%25@h", "h:4222", ("u", "p@/%", None)),
    ],
)
def test_a_url_says_where_and_who(url: str, addresses: str, login: tuple[str | None, ...]) -> None:
    servers = settings_of(url).servers
    assert str(servers) == addresses
    assert (servers.user, servers.password, servers.token) == login
    assert servers.encrypted is url.startswith("tls")
    assert "p@/%" not in repr(servers)
    assert "t/ken" not in repr(servers)


async def test_where_nobody_listens_nothing_answers() -> None:
    await all_meet(settings_of("nats://u:hunter2@127.0.0.1:1"), BrokerUnavailableError, "does not answer")


async def test_a_server_that_ends_the_connection_did_answer(nats_server: NatsServer) -> None:
    async with Proxy(nats_server.host, nats_server.port) as proxy:
        proxy.refuse = True
        with pytest.raises(BrokerUnavailableError, match=r"sinks.mine.url: NATS at .* ended the connection"):
            await connect(settings_of(f"nats://127.0.0.1:{proxy.port}"))


async def test_a_wrong_login_is_refused_and_a_right_one_taken(tmp_path: Path) -> None:
    with server(tmp_path, 'authorization { user: "u", password: "p@/%" }') as nats:
        address = f"127.0.0.1:{nats.port}"
        for url in (f"nats://u:hunter2@{address}", f"nats://hunter2@{address}", f"nats://{address}"):
            await all_meet(settings_of(url), LoginError, "refuses the user, the password or the token")
        await NatsSink(settings_of(f"nats://u:p%40%2F%25@{address}")).topology(apply=True)


async def test_a_wrong_token_is_refused_and_a_right_one_taken(tmp_path: Path) -> None:
    with server(tmp_path, 'authorization { token: "t/ken" }') as nats:
        await all_meet(settings_of(f"nats://hunter2@127.0.0.1:{nats.port}"), LoginError)
        await NatsSink(settings_of(f"nats://t%2Fken@127.0.0.1:{nats.port}")).topology(apply=True)


def permissions(*lines: str) -> str:
    return "authorization { users: [{ user: u, password: hunter2, permissions: {" + "\n".join(lines) + "} }] }"


async def test_what_the_user_may_not_ask_of_jetstream_is_said_at_once(tmp_path: Path) -> None:
    with server(tmp_path, permissions('publish: { deny: ["$JS.API.>"] }')) as nats:
        settings = settings_of(f"nats://u:hunter2@127.0.0.1:{nats.port}")
        await all_meet(settings, PrivilegeError, "does not permit", "js.api.")


async def test_an_inbox_that_the_user_may_not_read_is_said_at_once(tmp_path: Path) -> None:
    with server(tmp_path, permissions('subscribe: { deny: ["_INBOX.>"] }')) as nats:
        settings = settings_of(f"nats://u:hunter2@127.0.0.1:{nats.port}")
        await all_meet(settings, PrivilegeError, "does not permit", "subscription")


async def test_a_subject_that_the_user_may_not_publish_to_holds_back_itself_and_no_other(tmp_path: Path) -> None:
    with server(tmp_path, permissions('publish: { deny: ["events.Secret.>"] }')) as nats:
        sink = NatsSink(settings_of(f"nats://u:hunter2@127.0.0.1:{nats.port}"))
        await sink.topology(apply=True)
        await sink.open()
        topics = ["a", "Secret.a", "Secret.b", "b", "Secret.a"]
        outcomes = await asyncio.wait_for(sink.publish([make_event(topic=topic) for topic in topics]), LIMIT)
        assert [type(outcome) for outcome in outcomes] == [type(CONFIRMED), Refused, Refused, type(CONFIRMED), Refused]
        assert isinstance(outcomes[1], Refused)
        assert "does not permit" in outcomes[1].reason
        assert sink.is_open
        await sink.close()


@pytest.mark.parametrize("subject", ["$JS.API.CONSUMER.MSG.NEXT.>", "$JS.ACK.>"])
async def test_a_queue_that_may_not_do_its_work_says_so(tmp_path: Path, subject: str) -> None:
    with server(tmp_path, permissions(f'publish: {{ deny: ["{subject}"] }}')) as nats:
        settings = settings_of(f"nats://u:hunter2@127.0.0.1:{nats.port}")
        queue, sink = queue_of(settings), NatsSink(settings)
        await queue.topology(apply=True)
        await sink.open()
        await sink.publish([make_event()])
        await sink.close()
        await queue.open()
        deliveries = aiter(queue.deliveries())

        async def work() -> None:
            await (await anext(deliveries)).ack()

        with pytest.raises(PrivilegeError, match="does not permit"):
            await asyncio.wait_for(work(), 4.0)
        with pytest.raises(PrivilegeError, match="does not permit"):
            await asyncio.wait_for(anext(aiter(queue.deliveries())), LIMIT)
        await queue.close()


async def test_a_server_without_jetstream_is_told_apart(tmp_path: Path) -> None:
    with server(tmp_path, jetstream=False) as nats:
        await all_meet(settings_of(nats.url), RefusedError, "runs without JetStream")


async def test_an_account_without_jetstream_is_told_apart(tmp_path: Path) -> None:
    lines = "accounts { PLAIN: { users: [{ user: u, password: hunter2 }] }, JS: { jetstream: enabled } }"
    with server(tmp_path, lines) as nats:
        settings = settings_of(f"nats://u:hunter2@127.0.0.1:{nats.port}")
        await all_meet(settings, RefusedError, "not enabled for this account")


async def test_what_is_missing_points_to_the_command_that_declares_it(nats_server: NatsServer, unique: str) -> None:
    settings = settings_of(nats_server.url, unique)
    uses = everything_that_connects(settings, unique)
    missing = {name: uses[name] for name in ("sink", "queue", "dead letters")}
    await all_are_refused(missing, TopologyError, "Run `pgbridge topology --apply`")


async def test_a_stream_in_the_way_of_ours_is_said_in_jetstreams_words(nats_server: NatsServer, unique: str) -> None:
    await NatsSink(settings_of(nats_server.url, unique)).topology(apply=True)
    connection = await connect(settings_of(nats_server.url))
    await connection.jetstream().add_stream(name=f"{unique}-in-the-way", subjects=[f"{unique}x.a"])
    await connection.close()
    with pytest.raises(RefusedError, match=r"sinks.mine.url: JetStream of NATS at .* refuses: subjects overlap"):
        await NatsSink(settings_of(nats_server.url, f"{unique}x")).topology(apply=True)


def tls(folder: Path, *lines: str, name: str = "IP:127.0.0.1") -> tuple[Path, Path, str]:
    """Certificate, key, and the lines of a server's configuration that use them."""
    certificate, key = self_signed(folder / "tls", name=name)
    own = [f'cert_file: "{certificate}"', f'key_file: "{key}"', *lines]
    return certificate, key, "tls { " + "\n".join(own) + " }"


async def test_a_certificate_that_is_not_trusted_is_a_matter_of_ca_file(tmp_path: Path) -> None:
    certificate, _, lines = tls(tmp_path)
    with server(tmp_path, lines) as nats:
        for scheme in ("tls", "nats"):
            url = f"{scheme}://u:hunter2@127.0.0.1:{nats.port}"
            await all_meet(settings_of(url), RefusedError, "not trusted", key="tls.ca_file")
            trusting = settings_of(url, tls={"ca_file": str(certificate)})
            await NatsSink(trusting).topology(apply=True)


async def test_a_missing_certificate_is_a_mistake_in_the_settings(tmp_path: Path) -> None:
    settings = settings_of("tls://u:hunter2@127.0.0.1:1", tls={"ca_file": str(tmp_path / "ca.pem")})
    await all_are_refused(everything_that_connects(settings), SettingsError, "ca.pem", key="tls.ca_file")


async def test_a_certificate_for_another_host_is_a_matter_of_the_url(tmp_path: Path) -> None:
    certificate, _, lines = tls(tmp_path, name="DNS:mq.internal")
    with server(tmp_path, lines) as nats:
        settings = settings_of(f"tls://u:hunter2@127.0.0.1:{nats.port}", tls={"ca_file": str(certificate)})
        await all_meet(settings, RefusedError, "not for this host")


async def test_a_server_that_wants_a_certificate_of_ours_says_so(tmp_path: Path) -> None:
    certificate, key, _ = tls(tmp_path)
    _, _, lines = tls(tmp_path, "verify: true", f'ca_file: "{certificate}"')
    with server(tmp_path, lines) as nats:
        url = f"tls://127.0.0.1:{nats.port}"
        ours = {"ca_file": str(certificate), "cert_file": str(certificate), "key_file": str(key)}
        await all_meet(settings_of(url, tls={"ca_file": ours["ca_file"]}), LoginError, key="tls.cert_file")
        await NatsSink(settings_of(url, tls=ours)).topology(apply=True)


@pytest.mark.parametrize("wants", [True, False], ids=["certificate wanted", "nothing wanted"])
async def test_a_refused_certificate_is_known_though_a_reset_destroyed_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wants: bool
) -> None:
    really_open = _open

    async def reset(connection: Connection, settings: NatsSettings, tls: ssl.SSLContext | None) -> None:
        with contextlib.suppress(NatsError, OSError):
            await really_open(connection, settings, tls)
        connection.heard.clear()
        raise ConnectionResetError

    monkeypatch.setattr("bridge.brokers.nats.connection._open", reset)
    certificate, _, _ = tls(tmp_path)
    _, _, lines = tls(tmp_path, *(["verify: true", f'ca_file: "{certificate}"'] if wants else []))
    with server(tmp_path, lines) as nats:
        settings = settings_of(f"tls://127.0.0.1:{nats.port}", tls={"ca_file": str(certificate)})
        with pytest.raises(LoginError if wants else BrokerUnavailableError) as caught:
            await connect(settings)
    assert ("sinks.mine.tls.cert_file: " in str(caught.value)) == wants


async def test_tls_that_the_server_does_not_have_sends_no_password(nats_server: NatsServer, tmp_path: Path) -> None:
    async with Proxy(nats_server.host, nats_server.port) as proxy:
        for url, tls in (
            (f"tls://u:hunter2@127.0.0.1:{proxy.port}", {}),
            (f"nats://u:hunter2@127.0.0.1:{proxy.port}", {"ca_file": str(self_signed(tmp_path).file)}),
        ):
            await all_meet(settings_of(url, tls=tls), RefusedError, "does not require TLS")


async def test_what_we_use_of_nats_py_although_it_is_private_is_there(nats_server: NatsServer) -> None:
    connection = await connect(settings_of(nats_server.url))
    assert len(tasks_of(connection.client)) == 3
    transport = transport_of(connection.client)
    assert transport is not None
    await connection.close()
    assert transport.is_closing()


async def test_a_connection_closes_without_what_is_private(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = await connect(settings_of(nats_server.url))
    monkeypatch.setattr("bridge.brokers.nats.connection.transport_of", lambda client: None)
    await connection.close()
    assert not connection.is_open
