"""What `pgbridge check` says of NATS: what is missing there, and what a user may not do."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

import nats
import pytest

from bridge.commands.check import BOTH
from bridge.settings import Process, load
from tests.support.checked import (
    HANDLER,
    ONLY_BRIDGE,
    ONLY_WORKERS,
    Broken,
    Section,
    World,
    declare,
    each_uses_its_own,
    found_in,
    lacks_nothing,
    wrong_of,
)
from tests.support.narrow import ASKS, NATS_BRIDGE, NATS_WORKERS, nats_users, url_of
from tests.support.servers import NatsServer

USERS: Final[Mapping[str, Sequence[str]]] = {
    "bridge": (*NATS_BRIDGE, ASKS),
    "workers": (*NATS_WORKERS, ASKS),
    "both": (*NATS_BRIDGE, *NATS_WORKERS, ASKS),
    "unasked": (*NATS_BRIDGE, *NATS_WORKERS),
    "mute": ("$JS.API.STREAM.INFO.events", *NATS_WORKERS, ASKS),
    "part": ("$JS.API.STREAM.INFO.events", "events.shop.order.>", *NATS_WORKERS, ASKS),
    "no-ack": (*NATS_BRIDGE, *(each for each in NATS_WORKERS if "ACK" not in each), ASKS),
    "no-letters": (*NATS_BRIDGE, *(each for each in NATS_WORKERS if not each.startswith("invoices_dead")), ASKS),
}


@pytest.fixture(scope="module")
def server(shop_world: World) -> Iterator[NatsServer]:
    with NatsServer(shop_world.folder, lines=[nats_users(USERS)]) as server:
        yield server


@pytest.fixture(scope="module")
def world(shop_world: World, server: NatsServer) -> World:
    def sink(user: str) -> str:
        return f'type = "nats"\nurl = "{url_of(server, user)}"'

    made = replace(shop_world, sink=sink, ports={server.port: 4222})
    asyncio.run(declare(load(made.settings("admin"), environ={})))
    asyncio.run(add_stream(server, "elsewhere", "other.>"))
    return made


async def add_stream(server: NatsServer, name: str, subject: str) -> None:
    connection = await nats.connect(url_of(server, "admin"))
    await connection.jetstream().add_stream(name=name, subjects=[subject])
    await connection.close()


BROKEN: Final[Mapping[str, Broken]] = {
    "a server elsewhere in plain text": Broken(
        "tls",
        ["sinks.events.url: nothing is encrypted on the way to mq.invalid", "Write tls://"],
        69,
        change={"hunter2@127.0.0.1": "hunter2@mq.invalid"},
        also=["sink events", "topology"],
    ),
    "a stream that takes other subjects": Broken(
        "topology",
        ["different: stream elsewhere (sink events): it takes other.>, and not elsewhere.>"],
        69,
        change={'type = "nats"': 'type = "nats"\nstream = "elsewhere"'},
        user="admin",
        also=["sink events"],
    ),
    "a consumer with other topics": Broken(
        "topology",
        ["different: consumer events -> invoices (worker invoices): it takes events.shop.order.placed"],
        69,
        change={HANDLER: f'{HANDLER}\nsubscribe = ["shop.order.*"]'},
    ),
    "the bridge's user may not publish": Broken(
        "sink events",
        ["does not permit the user to publish to events.shop, events.shop.>"],
        69,
        user="mute",
        processes=ONLY_BRIDGE,
    ),
    "the workers' user may not acknowledge": Broken(
        "worker invoices",
        ["does not permit the user to publish to $JS.ACK.events.invoices.>"],
        69,
        user="no-ack",
        processes=ONLY_WORKERS,
    ),
    "the workers' user may not store dead letters": Broken(
        "worker invoices",
        ["does not permit the user to publish to invoices_dead.shop.order.placed"],
        69,
        user="no-letters",
        processes=ONLY_WORKERS,
    ),
    "the workers' user may not ask for its consumer": Broken(
        "worker invoices",
        ["does not permit this to the user", "js.api.stream.info.invoices_dead"],
        69,
        user="bridge",
        processes=ONLY_WORKERS,
        also=["topology"],
    ),
    "the bridge's user, in settings that have workers": Broken(
        "worker invoices",
        ["All that the bridge needs this account may do", "pgbridge check --for workers"],
        user="bridge",
        also=["topology"],
    ),
    "no server": Broken(
        "sink events",
        ["sinks.events.url: NATS at 127.0.0.1:1 does not answer"],
        69,
        change={'type = "nats"\nurl = "': 'type = "nats"\nurl = "nats://127.0.0.1:1" # "'},
        also=["topology"],
    ),
    "a missing stream": Broken(
        "topology",
        ["missing: stream gone (sink events)", "pgbridge topology --apply"],
        69,
        change={'type = "nats"': 'type = "nats"\nstream = "gone"'},
        user="admin",
        also=["sink events"],
    ),
    "a missing consumer": Broken(
        "topology",
        ["missing: stream others_dead (worker others), consumer events -> others (worker others)"],
        69,
        change={"[workers.invoices]": "[workers.others]"},
        user="admin",
    ),
}

SECTION: Final = Section("NATS", BROKEN)


@pytest.mark.parametrize("broken", BROKEN)
async def test_what_is_broken_is_named(world: World, broken: str) -> None:
    await SECTION.breaks(world, broken)


def test_the_page_shows_what_is_said() -> None:
    SECTION.compare_with_page()


async def test_where_nothing_is_broken_every_line_is_ok(world: World) -> None:
    assert wrong_of(await found_in(world.settings("both"))) == []


async def test_each_account_that_systemd_hands_over_is_looked_at_with_its_own_credentials(
    world: World, server: NatsServer
) -> None:
    await each_uses_its_own(world, "mute", {process: url_of(server, process) for process in BOTH})


@pytest.mark.parametrize(
    ("user", "processes", "subject", "says"),
    [
        ("bridge", ONLY_BRIDGE, "sink events", "nats, answers; may not publish to $JS.API.INFO, so"),
        ("workers", ONLY_WORKERS, "worker invoices", "reply shop.rendered"),
        ("part", ONLY_BRIDGE, "sink events", "may publish to a part of events.shop, events.shop.> only"),
        ("unasked", BOTH, "sink events", "cannot be known: let it publish to $SYS.REQ.USER.INFO"),
    ],
)
async def test_an_account_that_may_do_what_is_needed_lacks_nothing(
    world: World, user: str, processes: Sequence[Process], subject: str, says: str
) -> None:
    await lacks_nothing(world, user, processes, subject, says)


async def test_nats_hands_out_and_stores_nothing(world: World, server: NatsServer) -> None:
    connection = await nats.connect(url_of(server, "admin"))
    try:
        jetstream = connection.jetstream()
        await jetstream.publish("events.shop.order.placed", b"waits")
        assert wrong_of(await found_in(world.settings("both"))) == []
        consumer = await jetstream.consumer_info("events", "invoices")
        assert (consumer.num_pending, consumer.num_ack_pending) == (1, 0)
        assert (await jetstream.stream_info("events")).state.messages == 1
        assert (await jetstream.stream_info("invoices_dead")).state.messages == 0
        await jetstream.purge_stream("events")
    finally:
        await connection.close()
