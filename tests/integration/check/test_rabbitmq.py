"""What `pgbridge check` says of RabbitMQ: what is missing there, and what an account may not do."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import aio_pika
import pytest

from bridge.commands.check import BOTH
from bridge.settings import Process, load
from tests.support.checked import (
    ONLY_BRIDGE,
    ONLY_WORKERS,
    Broken,
    Section,
    World,
    declare,
    each_uses_its_own,
    first_lines,
    found_in,
    lacks_nothing,
    printed,
    wrong_of,
)
from tests.support.narrow import BRIDGE, WORKERS, Rights, add_users, url_of
from tests.support.servers import RabbitMQServer

pytestmark = pytest.mark.rabbitmq

HOST: Final = "check"
"""The virtual host."""

USERS: Final[Mapping[str, Rights]] = {
    "admin": Rights(".*", ".*", ".*"),
    "bridge": BRIDGE,
    "workers": WORKERS,
    "both": Rights(write=r"^(events|amq\.default)$", read="^invoices.*"),
    "nobody": Rights(),
    "reader": Rights(read="^invoices.*"),
    "narrow": Rights(write=r"^(events|amq\.default)$", read="^invoices.*"),
    "impersonator": Rights(write=r"^(events|amq\.default)$", read="^invoices.*"),
}
"""The topics of `narrow` are limited to those below shop.order."""


@pytest.fixture(scope="module")
def world(shop_world: World, rabbitmq: RabbitMQServer) -> World:
    def sink(user: str) -> str:
        return f'type = "rabbitmq"\nurl = "{url_of(rabbitmq, user, HOST)}"'

    add_users(rabbitmq, HOST, USERS, topics={"narrow": r"^shop\.order\."})
    made = replace(shop_world, sink=sink, ports={rabbitmq.port: 5672})
    asyncio.run(declare(load(made.settings("admin"), environ={})))
    return made


BROKEN: Final[Mapping[str, Broken]] = {
    "a server elsewhere in plain text": Broken(
        "tls",
        ["sinks.events.url: nothing is encrypted on the way to mq.invalid", "Write amqps://"],
        69,
        change={"hunter2@127.0.0.1": "hunter2@mq.invalid"},
        also=["sink events", "topology"],
    ),
    "no server": Broken(
        "sink events",
        ["sinks.events.url: RabbitMQ at 127.0.0.1:1 does not answer"],
        69,
        change={'type = "rabbitmq"\nurl = "': 'type = "rabbitmq"\nurl = "amqp://guest@127.0.0.1:1" # "'},
        also=["topology"],
    ),
    "a missing exchange": Broken(
        "topology",
        ["missing: exchange gone (sink events)", "pgbridge topology --apply"],
        69,
        change={'type = "rabbitmq"': 'type = "rabbitmq"\nexchange = "gone"'},
        also=["sink events"],
    ),
    "a missing queue": Broken(
        "topology",
        ["missing: queue others.dead (worker others)"],
        69,
        change={"[workers.invoices]": "[workers.others]"},
    ),
    "an exchange of another kind": Broken(
        "topology",
        ["different: exchange amq.fanout (sink events): ", "inequivalent arg 'type' for exchange 'amq.fanout'"],
        69,
        change={'type = "rabbitmq"': 'type = "rabbitmq"\nexchange = "amq.fanout"'},
        user="admin",
    ),
    "an account that may do nothing": Broken(
        "sink events",
        ["access to exchange 'events' in vhost 'check' refused for user 'nobody'"],
        69,
        user="nobody",
        also=["worker invoices"],
    ),
    "the bridge's account may not publish": Broken(
        "sink events",
        ["access to exchange 'events' in vhost 'check' refused for user 'workers'"],
        69,
        user="workers",
        processes=ONLY_BRIDGE,
    ),
    "the workers' account may not consume": Broken(
        "worker invoices",
        ["access to queue 'invoices' in vhost 'check' refused for user 'bridge'"],
        69,
        user="bridge",
        processes=ONLY_WORKERS,
    ),
    "the workers' account may not publish retries": Broken(
        "worker invoices",
        ["access to exchange 'amq.default' in vhost 'check' refused for user 'reader'"],
        69,
        user="reader",
        processes=ONLY_WORKERS,
    ),
    "the bridge's account, in settings that have workers": Broken(
        "worker invoices",
        ["access to queue 'invoices'", "All that the bridge needs this account may do", "pgbridge check --for workers"],
        user="bridge",
    ),
    "the workers' account, in settings that have routes": Broken(
        "sink events",
        ["access to exchange 'events'", "All that the workers need this account may do", "pgbridge check --for bridge"],
        user="workers",
    ),
    "a topic that the account may not publish": Broken(
        "sink events",
        ["does not permit user 'narrow' to publish the topic 'secret'", "rabbitmqctl set_topic_permissions"],
        69,
        user="narrow",
        change={'topic = "shop.#"': 'topic = "shop.order.placed"\nsink = "events"\n[[routes]]\ntopic = "secret"'},
        processes=ONLY_BRIDGE,
    ),
}

SECTION: Final = Section("RabbitMQ", BROKEN)


@pytest.mark.parametrize("broken", BROKEN)
async def test_what_is_broken_is_named(world: World, broken: str) -> None:
    await SECTION.breaks(world, broken)


def test_the_page_shows_what_is_said() -> None:
    SECTION.compare_with_page()


async def test_where_nothing_is_broken_every_line_is_ok(world: World) -> None:
    assert wrong_of(await found_in(world.settings("both"))) == []


async def test_one_kind_of_process_may_be_looked_at_alone(world: World) -> None:
    path = str(world.settings("workers"))
    out = await printed("--for", "workers", "--config", path)
    assert [line.split()[1] for line in first_lines(out)] == ["settings", "connections", "topology", "worker"]
    out = await printed("--for", "bridge", "--config", path, expect=69)
    assert "worker" not in {line.split()[1] for line in first_lines(out)}


async def test_each_account_that_systemd_hands_over_is_looked_at_with_its_own_credentials(
    world: World, rabbitmq: RabbitMQServer
) -> None:
    await each_uses_its_own(world, "nobody", {process: url_of(rabbitmq, process, HOST) for process in BOTH})


@pytest.mark.parametrize(
    ("user", "processes", "subject", "says"),
    [
        ("bridge", ONLY_BRIDGE, "sink events", "rabbitmq, answers; may publish to the exchange events"),
        ("workers", ONLY_WORKERS, "worker invoices", "may consume invoices; may publish to the exchange amq.default"),
        (
            "both",
            BOTH,
            "topology",
            "; binding events -> invoices: shop.order.placed. Where messages do not arrive: `pgbridge topology",
        ),
        ("narrow", ONLY_BRIDGE, "sink events", "its topic permissions refuse some topics of shop.#"),
    ],
)
async def test_an_account_that_may_do_what_is_needed_lacks_nothing(
    world: World, user: str, processes: Sequence[Process], subject: str, says: str
) -> None:
    await lacks_nothing(world, user, processes, subject, says)


@pytest.mark.parametrize("user", ["both", "impersonator"])
async def test_no_message_is_published_and_none_is_taken(world: World, rabbitmq: RabbitMQServer, user: str) -> None:
    # Who has this tag may name another user as the sender, which is what others are refused for.
    await asyncio.to_thread(rabbitmq.ctl, "set_user_tags", "impersonator", "impersonator")
    async with await aio_pika.connect(url_of(rabbitmq, "admin", HOST)) as connection:
        channel = await connection.channel()
        everything = await channel.declare_queue(exclusive=True)
        await everything.bind("events", "#")
        worker = await channel.declare_queue("invoices", passive=True)
        await channel.default_exchange.publish(aio_pika.Message(b"waits"), "invoices")
        assert wrong_of(await found_in(world.settings(user))) == []
        assert await everything.get(fail=False) is None
        message = await worker.get()
        assert message is not None
        assert (message.body, message.redelivered) == (b"waits", False)
        await message.ack()
        assert await worker.get(fail=False) is None


async def test_while_rabbitmq_blocks_publishers_it_is_said_what_is_not_known(
    world: World, rabbitmq: RabbitMQServer
) -> None:
    second = {"[workers]": '[[routes]]\ntopic = "other.#"\nsink = "events"\n[workers]'}
    await asyncio.to_thread(rabbitmq.alarm, True)
    try:
        found = await found_in(world.settings("both", change=second))
    finally:
        await asyncio.to_thread(rabbitmq.alarm, False)
    assert wrong_of(found) == []
    said = {finding.subject: finding.text for finding in found}
    blocked = "of the topics other.# this cannot be known while the broker blocks publishers"
    assert said["sink events"] == f"rabbitmq, answers; may publish to the exchange events; {blocked}"
    assert said["worker invoices"].endswith("may publish to the exchange amq.default")
