"""What `pgbridge check` says of Google Cloud Pub/Sub: what is missing on the emulator, and what an account may not do
on a service of which a script plays the part, since the emulator knows no permissions."""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Final

import grpc
import pytest

from bridge.settings import load
from tests.support.checked import (
    HANDLER,
    ONLY_BRIDGE,
    ONLY_WORKERS,
    Around,
    Broken,
    Section,
    World,
    declare,
    found_in,
    wrong_of,
)
from tests.support.pubsub import delete, pubsub_settings, speak_as_to_the_service
from tests.support.scripted_pubsub import ScriptedPubSub
from tests.support.servers import PubSubEmulator

pytestmark = pytest.mark.pubsub

PROJECT: Final = "pgbridge-check"

PUBLISH: Final = ("events", "pubsub.topics.publish")
CONSUME: Final = ("invoices", "pubsub.subscriptions.consume")
GIVE_UP: Final = ("invoices.dead", "pubsub.topics.publish")


@pytest.fixture(scope="module")
def world(shop_world: World, pubsub_emulator: PubSubEmulator) -> World:
    def sink(user: str) -> str:
        return f'type = "pubsub"\nproject = "{PROJECT}"\nemulator_host = "{pubsub_emulator.address}"'

    made = replace(shop_world, sink=sink, ports={pubsub_emulator.port: 8085})
    asyncio.run(prepare(made, pubsub_emulator.address))
    return made


async def prepare(world: World, address: str) -> None:
    """Declares what is as it should be, and what is not."""
    await declare(load(world.settings(), environ={}))
    for worker, line in (
        ("elsewhere", 'topic = "other"'),
        ("unordered", "ordering = false"),
        ("lonely", ""),
        ("kept", 'topic = "unkept"\nretention = 0'),
    ):
        change = {"[workers.invoices]": f"[workers.{worker}]", 'type = "pubsub"': f'type = "pubsub"\n{line}'}
        await declare(load(world.settings(change=change), environ={}))
    settings = pubsub_settings(address, "events", project=PROJECT)
    for name in ("subscriptions/lonely.dead", "topics/lonely.dead", "subscriptions/kept"):
        await delete(settings, name)


@asynccontextmanager
async def service(
    world: World, grants: Collection[tuple[str, str]] | None = None, *, looks: bool = True
) -> AsyncIterator[tuple[ScriptedPubSub, Mapping[str, str]]]:
    """A service that has all that is needed and grants these permissions, by default all; and what leads there.
    `looks`: whether the credentials may look at topics and subscriptions."""
    server = ScriptedPubSub()
    world.ports[int(server.address.rpartition(":")[2])] = 443
    [emulator] = [line for line in world.sink("").splitlines() if line.startswith("emulator_host")]
    change = {emulator: f'endpoint = "{server.address}"'}
    with pytest.MonkeyPatch.context() as patch:
        speak_as_to_the_service(patch)
        async with server:
            looking = ("GetTopic", "GetSubscription")
            server.refusals = dict.fromkeys(looking, grpc.StatusCode.NOT_FOUND)
            await declare(load(world.settings(change=change), environ={}))
            server.refusals = {} if looks else dict.fromkeys(looking, grpc.StatusCode.PERMISSION_DENIED)
            server.grants = grants
            server.calls.clear()
            yield server, change


def granted(*grants: tuple[str, str], looks: bool = True) -> Around:
    """A service that grants these and nothing else."""

    @asynccontextmanager
    async def around(world: World) -> AsyncIterator[Mapping[str, str]]:
        async with service(world, grants, looks=looks) as (_, change):
            yield change

    def entered(world: World) -> AbstractAsyncContextManager[Mapping[str, str]]:
        return around(world)

    return entered


BROKEN: Final[Mapping[str, Broken]] = {
    "no emulator at this address": Broken(
        "sink events",
        ["sinks.events.emulator_host: Pub/Sub at 127.0.0.1:1 does not answer"],
        69,
        change={'emulator_host = "': 'emulator_host = "127.0.0.1:1" # "'},
        also=["topology"],
    ),
    "an emulator elsewhere, in plain text": Broken(
        "tls",
        ["sinks.events.emulator_host: nothing is encrypted on the way to mq.invalid", "Leave it out"],
        69,
        change={'emulator_host = "127.0.0.1': 'emulator_host = "mq.invalid'},
        also=["sink events", "topology"],
    ),
    "a missing topic": Broken(
        "topology",
        ["missing: topic gone (sink events)", "pgbridge topology --apply"],
        69,
        change={'type = "pubsub"': 'type = "pubsub"\ntopic = "gone"'},
        processes=ONLY_BRIDGE,
        also=["sink events"],
    ),
    "a topic that keeps nothing, as nobody has a subscription": Broken(
        "topology",
        [
            "different: topic unkept (sink events): WARNING: no subscription and no retention",
            "Set the sink's retention",
        ],
        69,
        change={'type = "pubsub"': 'type = "pubsub"\ntopic = "unkept"\nretention = 0'},
        processes=ONLY_BRIDGE,
    ),
    "a missing subscription": Broken(
        "topology",
        ["missing: topic others.dead (worker others)", "subscription others (worker others)"],
        69,
        change={"[workers.invoices]": "[workers.others]"},
    ),
    "a subscription without its dead letters": Broken(
        "topology",
        ["missing: topic lonely.dead (worker lonely), subscription lonely.dead (worker lonely)"],
        69,
        change={"[workers.invoices]": "[workers.lonely]"},
    ),
    "a subscription that reads another topic": Broken(
        "topology",
        ["different: subscription elsewhere (worker elsewhere): topic is", "subscriptions delete elsewhere"],
        69,
        change={"[workers.invoices]": "[workers.elsewhere]"},
    ),
    "a subscription with another filter": Broken(
        "topology",
        ["different: subscription invoices (worker invoices): filter is", "subscriptions delete invoices"],
        69,
        change={HANDLER: f'{HANDLER}\nsubscribe = ["shop.order.*"]'},
    ),
    "an ordered worker on a subscription without ordering": Broken(
        "topology",
        ["different: subscription unordered (worker unordered): enable_message_ordering is False, wanted True"],
        69,
        change={"[workers.invoices]": "[workers.unordered]", HANDLER: f"{HANDLER}\nordered = true"},
    ),
    "an account that may do nothing": Broken(
        "sink events",
        ["does not permit these credentials to publish to the topic events"],
        69,
        around=granted(looks=False),
        also=["topology", "worker invoices"],
    ),
    "the bridge's account may not publish": Broken(
        "sink events",
        [
            "to publish to the topic events",
            "gcloud pubsub topics add-iam-policy-binding events",
            "roles/pubsub.publisher",
        ],
        69,
        around=granted(),
        processes=ONLY_BRIDGE,
    ),
    "the workers' account may not consume": Broken(
        "worker invoices",
        ["to consume the subscription invoices", "gcloud pubsub subscriptions add-iam-policy-binding invoices"],
        69,
        around=granted(GIVE_UP),
        processes=ONLY_WORKERS,
    ),
    "the workers' account may not store dead letters": Broken(
        "worker invoices",
        ["to publish to the topic invoices.dead", "gcloud pubsub topics add-iam-policy-binding invoices.dead"],
        69,
        around=granted(CONSUME),
        processes=ONLY_WORKERS,
    ),
    "the bridge's account, in settings that have workers": Broken(
        "worker invoices",
        ["to consume the subscription invoices", "All that the bridge needs this account may do"],
        around=granted(PUBLISH, looks=False),
        also=["topology"],
    ),
    "the workers' account, in settings that have routes": Broken(
        "sink events",
        ["to publish to the topic events", "All that the workers need this account may do"],
        around=granted(CONSUME, GIVE_UP, looks=False),
        also=["topology"],
    ),
}

SECTION: Final = Section("Google Cloud Pub/Sub", BROKEN)


@pytest.mark.parametrize("broken", BROKEN)
async def test_what_is_broken_is_named(world: World, broken: str) -> None:
    await SECTION.breaks(world, broken)


def test_the_page_shows_what_is_said() -> None:
    SECTION.compare_with_page()


async def test_where_nothing_is_broken_every_line_is_ok(world: World) -> None:
    found = await found_in(world.settings())
    assert wrong_of(found) == []
    said = {finding.subject: finding.text for finding in found}
    assert said["sink events"] == "pubsub, answers; the emulator knows no permissions"


@pytest.mark.parametrize("looks", [True, False])
async def test_an_account_that_may_do_what_is_needed_lacks_nothing_and_moves_no_message(
    world: World, looks: bool
) -> None:
    async with service(world, [PUBLISH, CONSUME, GIVE_UP], looks=looks) as (server, change):
        found = await found_in(world.settings(change=change))
    assert wrong_of(found) == []
    said = {finding.subject: finding.text for finding in found}
    assert said["sink events"] == "pubsub, answers; may publish to the topic events"
    assert said["worker invoices"].endswith(
        "may consume the subscription invoices; may publish to the topic invoices.dead; what Pub/Sub's service agent "
        "may do cannot be known"
    )
    assert said["topology"].startswith("complete" if looks else "complete; assumed, since the broker does not say")
    assert set(server.calls) == {"GetTopic", "GetSubscription", "TestIamPermissions"}
    assert server.requests == []
