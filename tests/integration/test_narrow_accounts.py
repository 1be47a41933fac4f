"""Accounts that may do what one kind of process needs, and no more, as docs/operations.md lists them, do their work."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from bridge.brokers.contract import CONFIRMED, Delivery, Failure, Letter, Subscription, Verdict
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.registry import broker_of
from bridge.settings import SinkSettings
from tests.support import narrow
from tests.support.environment import ROOT
from tests.support.events import make_event
from tests.support.servers import NatsServer, RabbitMQServer
from tests.support.until import LIMIT

HOST: Final = "narrow"
"""The virtual host of RabbitMQ."""

NATS_USERS: Final = {
    "bridge": narrow.NATS_BRIDGE,
    "fast": (*narrow.NATS_BRIDGE, *narrow.NATS_FAST),
    "workers": narrow.NATS_WORKERS,
    "ordered": (*narrow.NATS_WORKERS, *narrow.NATS_ORDERED),
    "looks": narrow.NATS_LOOKS,
    "applies": narrow.NATS_APPLIES,
    "lists": narrow.NATS_DEAD,
    "replays": narrow.NATS_REPLAYS,
}

Account = Callable[[str], SinkSettings]
"""The settings of a sink, with this user."""


@pytest.fixture(scope="module")
def rabbitmq_account(rabbitmq: RabbitMQServer) -> Account:
    users = {
        "bridge": narrow.BRIDGE,
        "workers": narrow.WORKERS,
        "applies": narrow.TOPOLOGY,
        "looks": narrow.Rights(),
        "replays": narrow.DEAD,
    }
    named = {f"{user}-narrow": rights for user, rights in users.items()}
    narrow.add_users(rabbitmq, HOST, named)
    return lambda user: RabbitMQSettings.model_validate(
        {"type": "rabbitmq", "url": narrow.url_of(rabbitmq, f"{user}-narrow", HOST)}
    )


@pytest.fixture(scope="module")
def nats_account(server_folder: Path) -> Iterator[Account]:
    folder = server_folder / "narrow"
    folder.mkdir()
    with NatsServer(folder, lines=[narrow.nats_users(NATS_USERS)]) as server:
        yield lambda user: NatsSettings.model_validate({"type": "nats", "url": narrow.url_of(server, user)})


def wanted(*, ordered: bool = False, lanes: int = 1) -> Subscription:
    return Subscription(
        narrow.WORKER, ["shop.#"], 10, [0.1], max_attempts=3, ack_wait=10.0, ordered=ordered, lanes=lanes
    )


async def apply(account: Account, subscription: Subscription) -> None:
    """As `pgbridge topology --apply`, then as `pgbridge topology`."""
    for user, does in (("applies", True), ("looks", False)):
        settings = account(user)
        found = [
            *await broker_of(settings).sink(settings).topology(apply=does),
            *await broker_of(settings).queue(settings, subscription).topology(apply=does),
        ]
        assert {each.state for each in found} <= {"declared", "present"}, found


async def publish(account: Account, count: int) -> None:
    settings = account("bridge")
    sink = broker_of(settings).sink(settings)
    await sink.open()
    outcomes = await asyncio.wait_for(sink.publish([make_event(number) for number in range(count)]), LIMIT)
    await sink.close()
    assert outcomes == [CONFIRMED] * count


async def work(account: Account, user: str, subscription: Subscription, *verbs: str) -> None:
    """Settles one delivery after the other."""
    settings = account(user)
    queue = broker_of(settings).queue(settings, subscription)
    await queue.open()
    deliveries = queue.deliveries()
    async with asyncio.timeout(LIMIT):
        for verb in verbs:
            await settle(await anext(deliveries), verb)
        assert await queue.depth() is not None
        await queue.stop()
        await queue.close()


def settle(delivery: Delivery, verb: str) -> Awaitable[None]:
    match verb:
        case "retry":
            return delivery.retry(0.1)
        case "dead_letter":
            return delivery.dead_letter(Failure("rejected", "no"))
        case "give_back":
            return delivery.give_back()
    return delivery.ack()


async def letters(account: Account, user: str, verdict: Verdict) -> int:
    """How many dead letters there are, of each of which this becomes."""
    settings = account(user)
    box = broker_of(settings).dead_letters(settings, narrow.WORKER)
    assert box is not None
    seen = []

    async def decide(letter: Letter) -> Verdict:
        seen.append(letter)
        return verdict

    await asyncio.wait_for(box.walk(decide), LIMIT)
    return len(seen)


@pytest.mark.rabbitmq
async def test_rabbitmq(rabbitmq_account: Account) -> None:
    await apply(rabbitmq_account, wanted())
    await publish(rabbitmq_account, 3)
    await work(rabbitmq_account, "workers", wanted(), "retry", "give_back", "dead_letter", "ack", "ack")
    assert await letters(rabbitmq_account, "replays", "replay") == 1
    await work(rabbitmq_account, "workers", wanted(), "ack")


@pytest.mark.rabbitmq
async def test_rabbitmq_in_order(rabbitmq: RabbitMQServer, rabbitmq_account: Account) -> None:
    for queue in ("invoices", "invoices.dead"):
        await asyncio.to_thread(rabbitmq.ctl, "delete_queue", "-p", HOST, queue)
    await apply(rabbitmq_account, wanted(ordered=True, lanes=2))
    await publish(rabbitmq_account, 3)
    await work(rabbitmq_account, "workers", wanted(ordered=True, lanes=2), "ack", "dead_letter", "ack")


async def test_nats(nats_account: Account) -> None:
    await apply(nats_account, wanted())
    await publish(nats_account, 3)
    await work(nats_account, "workers", wanted(), "retry", "give_back", "dead_letter", "ack", "ack")
    assert await letters(nats_account, "lists", "keep") == 1
    assert await letters(nats_account, "replays", "replay") == 1
    await work(nats_account, "workers", wanted(), "ack")
    assert await letters(nats_account, "lists", "keep") == 0


async def test_a_bridge_that_sees_the_limits_of_nats_has_several_events_of_a_key_on_the_way(
    nats_account: Account,
) -> None:
    await apply(nats_account, wanted())
    for user, pipelines in (("bridge", False), ("fast", True)):
        sink = broker_of(nats_account(user)).sink(nats_account(user))
        await sink.open()
        assert sink.pipelines is pipelines
        await sink.close()


async def test_nats_in_order(nats_account: Account) -> None:
    await apply(nats_account, wanted(ordered=True))
    await publish(nats_account, 3)
    await work(nats_account, "ordered", wanted(ordered=True), "ack", "dead_letter")
    # It begins at once, since the one before it has given up its pin.
    async with asyncio.timeout(5):
        await work(nats_account, "ordered", wanted(ordered=True), "ack")


def test_the_page_lists_what_was_tried() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    rows = {
        who: re.findall(r"`([^`]+)`", publishes)
        for who, publishes in re.findall(r"^\| ([^|]+?) \| (`\$JS[^|]+?) \| `_INBOX\.>` \|$", page, flags=re.MULTILINE)
    }
    shown: dict[str, Sequence[str]] = {
        "the bridge": narrow.NATS_BRIDGE,
        "the bridge, for several events of a key on the way": narrow.NATS_FAST,
        "a worker": narrow.NATS_WORKERS,
        "an ordered worker, beside that": narrow.NATS_ORDERED,
        "`pgbridge topology`": narrow.NATS_LOOKS,
        "`pgbridge topology --apply`": narrow.NATS_APPLIES,
        "`pgbridge dead list`, `show`": narrow.NATS_DEAD,
        "`pgbridge dead replay`, `discard`": narrow.NATS_REPLAYS,
    }
    assert rows == {who: list(subjects) for who, subjects in shown.items()}
    for rights in (narrow.BRIDGE, narrow.WORKERS, narrow.TOPOLOGY, narrow.DEAD):
        assert f" '{rights.configure}' '{rights.write}' '{rights.read}'\n" in page
