"""One mistake has one answer on Pub/Sub, whoever meets it: its class, the key of the setting, the address, no secret.

A scripted server refuses as the service would; a small HTTP server plays the one that gives tokens for credentials.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from bridge.brokers.contract import Subscription
from bridge.brokers.pubsub.connection import connect
from bridge.brokers.pubsub.queue import PubSubQueue
from bridge.brokers.pubsub.settings import PubSubSettings
from bridge.brokers.pubsub.sink import PubSubSink
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
from tests.support.pubsub import speak_as_to_the_service
from tests.support.refusals import SINK, all_are_refused, everything_that_connects
from tests.support.scripted_pubsub import ScriptedPubSub
from tests.support.servers import free_port
from tests.support.tokens import REFUSED, TOKEN, service_account, token_server

READING = ("GetTopic", "GetSubscription", "TestIamPermissions", "Pull")
"""One of these is the first that a user of Pub/Sub calls."""


def settings_of(address: str = "", **changes: Any) -> PubSubSettings:
    values = {"type": "pubsub", "project": "shop", "emulator_host": address, **changes}
    return PubSubSettings.model_validate(values, context={"sink": SINK})


def queue_of(settings: PubSubSettings) -> PubSubQueue:
    return PubSubQueue(settings, Subscription("worker", ["#"], 10, [1.0], max_attempts=3, ack_wait=10.0))


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedPubSub]:
    async with ScriptedPubSub() as server:
        yield server


async def test_where_nobody_listens_nothing_answers() -> None:
    words = ("Pub/Sub at 127.0.0.1:1 does not answer",)
    await all_are_refused(
        everything_that_connects(settings_of("127.0.0.1:1")), BrokerUnavailableError, *words, key="emulator_host"
    )


@pytest.mark.parametrize(
    ("code", "kind", "key", "words"),
    [
        ("UNAUTHENTICATED", LoginError, "credentials", "does not take the credentials"),
        ("UNAVAILABLE", BrokerUnavailableError, "emulator_host", "is not available now"),
        ("RESOURCE_EXHAUSTED", BrokerUnavailableError, "emulator_host", "is not available now"),
        ("FAILED_PRECONDITION", TopologyError, "emulator_host", "FAILED_PRECONDITION"),
        ("INVALID_ARGUMENT", RefusedError, "emulator_host", "refuses"),
    ],
)
async def test_a_refusal_is_told_by_its_code(
    scripted: ScriptedPubSub, code: str, kind: type[PgbridgeError], key: str, words: str
) -> None:
    scripted.refusals = dict.fromkeys(READING, grpc.StatusCode[code])
    await all_are_refused(
        everything_that_connects(settings_of(scripted.address)), kind, scripted.address, words, key=key
    )


@pytest.mark.parametrize("use", ["sink's topology", "queue's topology", "dead letters"])
async def test_a_missing_permission_is_told_by_its_code(
    scripted: ScriptedPubSub, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    speak_as_to_the_service(monkeypatch)
    scripted.refusals = dict.fromkeys(READING, grpc.StatusCode.PERMISSION_DENIED)
    with pytest.raises(PrivilegeError, match=r"sinks\.mine\.credentials: Pub/Sub at .*docs/pubsub.md lists the roles"):
        await everything_that_connects(settings_of(endpoint=scripted.address))[use]()


@pytest.mark.parametrize("asked", ["granted", "not granted", "may not ask"])
@pytest.mark.parametrize("module", ["sink", "queue"])
async def test_who_may_not_look_may_still_publish_or_consume(
    scripted: ScriptedPubSub, monkeypatch: pytest.MonkeyPatch, module: str, asked: str
) -> None:
    settings = settings_of(endpoint=scripted.address)
    speak_as_to_the_service(monkeypatch)
    denied = grpc.StatusCode.PERMISSION_DENIED
    scripted.refusals = {"GetTopic": denied, "GetSubscription": denied}
    if asked == "may not ask":
        scripted.refusals["TestIamPermissions"] = denied
    scripted.grants = None if asked == "granted" else []
    user = PubSubSink(settings) if module == "sink" else queue_of(settings)
    if asked == "granted":
        await user.open()
    else:
        with pytest.raises(PrivilegeError, match=r"sinks\.mine\.credentials: Pub/Sub at "):
            await user.open()
    await user.close()


async def test_what_is_missing_points_to_the_command_that_declares_it(scripted: ScriptedPubSub) -> None:
    scripted.refusals = dict.fromkeys(READING, grpc.StatusCode.NOT_FOUND)
    for use in ("sink", "queue", "dead letters"):
        with pytest.raises(TopologyError, match=r"sinks.mine.*: Pub/Sub at .*un `pgbridge topology --apply`"):
            await everything_that_connects(settings_of(scripted.address))[use]()
    (topic,) = await PubSubSink(settings_of(scripted.address)).topology(apply=False)
    assert topic.state == "missing"


async def test_a_missing_project_has_words_of_its_own(scripted: ScriptedPubSub) -> None:
    scripted.refusals = dict.fromkeys(("GetTopic", "CreateTopic"), grpc.StatusCode.NOT_FOUND)
    for broken in (PubSubSink(settings_of(scripted.address)), queue_of(settings_of(scripted.address))):
        with pytest.raises(TopologyError, match=r"sinks.mine.project: Pub/Sub at .* has no project 'shop'"):
            await broken.topology(apply=True)


async def test_credentials_that_google_refuses_are_a_refused_login(tmp_path: Path) -> None:
    async with token_server(*REFUSED) as url:
        await all_are_refused(
            everything_that_connects(settings_of(credentials=service_account(tmp_path, url))),
            LoginError,
            "Invalid JWT Signature",
            key="credentials",
        )


async def test_a_token_server_that_does_not_answer_is_not_a_refused_login(tmp_path: Path) -> None:
    settings = settings_of(credentials=service_account(tmp_path, "http://127.0.0.1:1/token"))
    with pytest.raises(BrokerUnavailableError, match=r"sinks\.mine\.credentials: the server that gives"):
        await connect(settings)


@pytest.mark.parametrize("given", ["hunter2", '{"type": "hunter2"}', '{"type": "service_account"}'])
async def test_credentials_that_are_not_a_key_are_a_mistake_in_the_settings(given: str) -> None:
    await all_are_refused(everything_that_connects(settings_of(credentials=given)), SettingsError, key="credentials")


async def test_an_endpoint_where_nobody_listens_does_not_answer(tmp_path: Path) -> None:
    async with token_server(*TOKEN) as url:
        settings = settings_of(credentials=service_account(tmp_path, url), endpoint=f"127.0.0.1:{free_port()}")
        await all_are_refused(
            everything_that_connects(settings),
            BrokerUnavailableError,
            settings.endpoint,
            "does not answer",
            key="endpoint",
        )


async def test_an_endpoint_whose_certificate_is_not_trusted_does_answer(tmp_path: Path) -> None:
    certificate = self_signed(tmp_path / "tls")
    async with token_server(*TOKEN) as url, ScriptedPubSub(certificate=certificate) as server:
        settings = settings_of(credentials=service_account(tmp_path, url), endpoint=server.address)
        await all_are_refused(
            everything_that_connects(settings),
            RefusedError,
            server.address,
            "certificate that is not trusted",
            key="endpoint",
        )


async def test_an_endpoint_without_tls_does_answer(tmp_path: Path) -> None:
    async with token_server(*TOKEN) as url, ScriptedPubSub() as server:
        settings = settings_of(credentials=service_account(tmp_path, url), endpoint=server.address)
        await all_are_refused(
            everything_that_connects(settings), RefusedError, server.address, "makes no TLS connection", key="endpoint"
        )
        assert not server.calls


@pytest.mark.parametrize("module", ["sink", "queue"])
async def test_topology_of_who_may_not_look_is_taken_for_granted_where_it_may_be_used(
    scripted: ScriptedPubSub, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    settings = settings_of(endpoint=scripted.address)
    speak_as_to_the_service(monkeypatch)
    denied = grpc.StatusCode.PERMISSION_DENIED
    scripted.refusals = {"GetTopic": denied, "GetSubscription": denied}
    user = PubSubSink(settings) if module == "sink" else queue_of(settings)
    found = await user.topology(apply=False)
    assert {(each.state, each.assumed) for each in found} == {("present", True)}
    with pytest.raises(PrivilegeError):
        await user.topology(apply=True)
    scripted.grants = []
    with pytest.raises(PrivilegeError):
        await user.topology(apply=False)
