"""What becomes of deliveries whose settling fails: they stay in hand, their verb raises, and a close gives them back.

A scripted server refuses and waits as the emulator cannot.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.pubsub_v1 import types

from bridge.brokers.contract import Failure, Subscription
from bridge.brokers.pubsub.message import Encoder
from bridge.brokers.pubsub.queue import PubSubDelivery, PubSubQueue
from bridge.errors import BrokerUnavailableError, PgbridgeError, RefusedError
from tests.support.events import make_event
from tests.support.pubsub import pubsub_settings
from tests.support.scripted_pubsub import ScriptedPubSub
from tests.support.until import LIMIT, until

FAILURE = Failure("error", "it broke")
INVALID = grpc.StatusCode.INVALID_ARGUMENT

VERBS: dict[str, tuple[Callable[[PubSubDelivery], Awaitable[None]], str]] = {
    "ack": (PubSubDelivery.ack, "Acknowledge"),
    "retry": (lambda delivery: delivery.retry(5.0), "ModifyAckDeadline"),
    "dead_letter": (lambda delivery: delivery.dead_letter(FAILURE), "Acknowledge"),
    "give_back": (PubSubDelivery.give_back, "ModifyAckDeadline"),
}
"""Each with the method that it calls last."""

each_verb = pytest.mark.parametrize(("verb", "method"), VERBS.values(), ids=list(VERBS))


def message(number: int, **changes: Any) -> Any:
    _, field = Encoder(ordering=True, max_payload=1000).encode(make_event(number, payload=b"%d" % number, **changes))
    return types.PublishRequest.pb().FromString(field).messages[0]


@asynccontextmanager
async def consuming(
    server: ScriptedPubSub, prefetch: int = 10
) -> AsyncIterator[tuple[PubSubQueue, AsyncIterator[PubSubDelivery]]]:
    """A queue that is open, and its deliveries; the shortest lease is extended after 3.3 seconds."""
    wanted = Subscription("worker", ["shop.#"], prefetch, [1.0], max_attempts=3, ack_wait=10.0)
    queue = PubSubQueue(pubsub_settings(server.address, "events"), wanted)
    await queue.open()
    try:
        yield queue, aiter(queue.deliveries())
    finally:
        await queue.close()


async def come(deliveries: AsyncIterator[PubSubDelivery]) -> PubSubDelivery:
    return await asyncio.wait_for(anext(deliveries), LIMIT)


async def all_that_come(deliveries: AsyncIterator[PubSubDelivery]) -> list[PubSubDelivery]:
    return [delivery async for delivery in deliveries]


async def in_hand(queue: PubSubQueue, count: int) -> None:
    leases = queue._leases
    assert leases is not None
    await until(lambda: leases.count == count, f"{count} messages are in hand")


@pytest.fixture
async def server() -> AsyncIterator[ScriptedPubSub]:
    async with ScriptedPubSub() as server:
        yield server


@each_verb
async def test_what_a_verb_failed_to_settle_is_given_back_at_the_close_with_what_waits_behind_it(
    server: ScriptedPubSub, verb: Callable[[PubSubDelivery], Awaitable[None]], method: str
) -> None:
    server.to_pull = [message(n, key="a") for n in range(3)]
    async with consuming(server) as (queue, deliveries):
        delivery = await come(deliveries)
        server.refusals = {method: INVALID}
        with pytest.raises(RefusedError):
            await verb(delivery)
        server.refusals = {}
        await queue.close()
        assert server.leases == [("0", 0), ("1", 0), ("2", 0)]


@each_verb
async def test_a_verb_that_follows_one_that_failed_settles_and_its_key_goes_on(
    server: ScriptedPubSub, verb: Callable[[PubSubDelivery], Awaitable[None]], method: str
) -> None:
    server.to_pull = [message(n, key="a") for n in range(2)]
    async with consuming(server) as (queue, deliveries):
        delivery = await come(deliveries)
        server.refusals = {method: INVALID}
        with pytest.raises(RefusedError):
            await verb(delivery)
        server.refusals = {}
        await delivery.ack()
        following = await come(deliveries)
        assert following.message.data == b"1"
        await following.ack()
        await in_hand(queue, 0)


async def test_after_a_letter_that_is_refused_a_retry_may_follow(server: ScriptedPubSub) -> None:
    async def refuse(messages: Any) -> grpc.StatusCode:
        return INVALID

    server.to_pull, server.answer = [message(n, key="a") for n in range(2)], refuse
    async with consuming(server) as (queue, deliveries):
        delivery = await come(deliveries)
        with pytest.raises(RefusedError, match="INVALID_ARGUMENT"):
            await delivery.dead_letter(FAILURE)
        assert not queue.lost
        assert server.leases == []
        await delivery.retry(5.0)
        assert server.leases == [("0", 5), ("1", 5)]
        server.to_pull = [message(2, key="a")]
        assert (await come(deliveries)).message.data == b"2"


@pytest.mark.parametrize(("delay", "lease"), [(0.2, 1), (1.5, 2), (3600.0, 600)])
async def test_a_delay_is_rounded_up_to_a_lease_or_is_the_longest_one(
    server: ScriptedPubSub, delay: float, lease: int
) -> None:
    server.to_pull = [message(0)]
    async with consuming(server) as (queue, deliveries):
        await (await come(deliveries)).retry(delay)
        assert server.leases == [("0", lease)]
        await in_hand(queue, 0)


@pytest.mark.parametrize("verb", ["retry", "give_back"])
async def test_what_comes_behind_one_that_is_on_its_way_back_goes_back_with_it(
    server: ScriptedPubSub, verb: str
) -> None:
    server.to_pull = [message(n, key="a") for n in range(2)]
    async with consuming(server) as (queue, deliveries):
        delivery = await come(deliveries)
        server.gates = {"ModifyAckDeadline": asyncio.Event()}
        going = asyncio.ensure_future(VERBS[verb][0](delivery))
        await until(lambda: "ModifyAckDeadline" in server.calls, "it is on its way")
        server.to_pull = [message(2, key="a"), message(3, key="b")]
        other = await come(deliveries)
        assert other.message.data == b"3"
        server.gates["ModifyAckDeadline"].set()
        await going
        seconds = 5 if verb == "retry" else 0
        assert server.leases == [("0", seconds), ("1", seconds), ("2", seconds)]
        await other.ack()
        await in_hand(queue, 0)


async def test_what_an_extension_made_longer_is_still_let_go_at_its_time(server: ScriptedPubSub) -> None:
    server.to_pull = [message(0)]
    async with consuming(server) as (_, deliveries):
        delivery = await come(deliveries)
        server.gates = {"ModifyAckDeadline": asyncio.Event()}
        await until(lambda: "ModifyAckDeadline" in server.calls, "the lease is being extended")
        extension = server.gates.pop("ModifyAckDeadline")
        retry = asyncio.ensure_future(delivery.retry(1.0))
        await asyncio.wait([retry], timeout=0.3)  # in which a retry that does not wait would be done
        extension.set()
        await retry
        assert server.leases == [("0", 10), ("0", 1)]


async def test_a_retry_on_its_way_is_not_extended(server: ScriptedPubSub) -> None:
    server.to_pull = [message(0, key="a"), message(1, key="b")]
    async with consuming(server) as (_, deliveries):
        delivery, _ = await come(deliveries), await come(deliveries)
        server.gates = {"ModifyAckDeadline": asyncio.Event()}
        retry = asyncio.ensure_future(delivery.retry(1.0))
        await until(lambda: "ModifyAckDeadline" in server.calls, "the retry is on its way")
        held_back = server.gates.pop("ModifyAckDeadline")
        await until(lambda: bool(server.leases), "the other is extended")
        assert server.leases == [("1", 10)]
        held_back.set()
        await retry


async def test_what_is_passed_over_does_not_hold_up_the_next_pull(server: ScriptedPubSub) -> None:
    server.gates = {"Acknowledge": asyncio.Event()}
    server.to_pull = [message(n, key=None, topic="stock.low") for n in range(6)] + [message(6)]
    async with consuming(server, prefetch=2) as (queue, deliveries):
        assert (await come(deliveries)).message.data == b"6"
        server.gates["Acknowledge"].set()
        await in_hand(queue, 1)
        assert sorted(server.acknowledged) == [str(n) for n in range(6)]


async def test_what_cannot_be_passed_over_ends_the_deliveries_and_is_given_back(server: ScriptedPubSub) -> None:
    server.refusals = {"Acknowledge": INVALID}
    server.to_pull = [message(0), message(1, topic="stock.low"), message(2, topic="stock.low")]
    async with consuming(server) as (queue, deliveries):
        with pytest.raises(RefusedError):
            await asyncio.wait_for(all_that_come(deliveries), LIMIT)
        await queue.close()
        assert sorted(server.leases) == [("0", 0), ("1", 0), ("2", 0)]


async def test_what_a_pull_brings_after_the_queue_was_lost_is_given_back(server: ScriptedPubSub) -> None:
    server.to_pull = [message(0)]
    async with consuming(server, prefetch=2) as (queue, deliveries):
        await come(deliveries)
        server.gates = {"Pull": asyncio.Event()}
        server.calls.clear()
        await until(lambda: "Pull" in server.calls, "a pull waits")
        server.refusals = {"ModifyAckDeadline": grpc.StatusCode.UNAVAILABLE}
        with pytest.raises(BrokerUnavailableError):
            await come(deliveries)  # once the lease of the first could not be extended
        server.refusals = {}
        server.to_pull = [message(1)]
        server.gates["Pull"].set()
        await until(lambda: len(server.pulled) == 2, "the pull is answered")
        await queue.close()
        assert server.leases == [("0", 0), ("1", 0)]


async def test_who_waits_for_another_ack_at_the_close_is_told_as_everybody(server: ScriptedPubSub) -> None:
    server.gates = {"Acknowledge": asyncio.Event()}
    server.to_pull = [message(n, key=None) for n in range(2)]
    async with consuming(server) as (queue, deliveries):
        acks = [asyncio.ensure_future((await come(deliveries)).ack())]
        await until(lambda: "Acknowledge" in server.calls, "the first is on its way")
        acks.append(asyncio.ensure_future((await come(deliveries)).ack()))
        await asyncio.sleep(0)
        await queue.close()
        for ack in acks:
            with pytest.raises(BrokerUnavailableError):
                await asyncio.wait_for(ack, LIMIT)
        assert server.leases == [("0", 0), ("1", 0)]


async def test_an_ack_whose_caller_gave_up_is_given_back_at_the_close(server: ScriptedPubSub) -> None:
    server.gates = {"Acknowledge": asyncio.Event()}
    server.to_pull = [message(n, key="a") for n in range(2)]
    async with consuming(server) as (queue, deliveries):
        ack = asyncio.ensure_future((await come(deliveries)).ack())
        await until(lambda: "Acknowledge" in server.calls, "it is on its way")
        ack.cancel()
        await asyncio.wait([ack])
        await queue.close()
        assert server.leases == [("0", 0), ("1", 0)]


async def test_deliveries_that_wait_are_told_of_the_close(server: ScriptedPubSub) -> None:
    async with consuming(server) as (queue, deliveries):
        waiting = asyncio.ensure_future(anext(deliveries))
        await until(lambda: "Pull" in server.calls, "the queue consumes")
        await queue.close()
        with pytest.raises(BrokerUnavailableError, match="the queue was closed"):
            await waiting


async def test_a_stop_that_cannot_give_back_leaves_it_to_the_close(server: ScriptedPubSub) -> None:
    server.to_pull = [message(n, key=f"k{n}") for n in range(3)]
    async with consuming(server) as (queue, deliveries):
        first = await come(deliveries)
        await in_hand(queue, 3)
        server.refusals = {"ModifyAckDeadline": INVALID}
        with pytest.raises(RefusedError):
            await queue.stop()
        await first.ack()
        server.refusals = {}
        await queue.close()
        assert server.leases == [("1", 0), ("2", 0)]


async def test_an_ack_after_a_stop_is_done_although_what_waits_behind_it_cannot_be_given_back(
    server: ScriptedPubSub,
) -> None:
    server.to_pull = [message(n, key="a") for n in range(2)]
    async with consuming(server) as (queue, deliveries):
        first = await come(deliveries)
        await queue.stop()
        server.refusals = {"ModifyAckDeadline": INVALID}
        await first.ack()
        assert server.acknowledged == ["0"]
        server.refusals = {}
        server.leases.clear()
        await queue.close()
        assert server.leases == [("1", 0)]


@each_verb
async def test_a_verb_without_an_answer_raises_within_its_limit(
    server: ScriptedPubSub,
    monkeypatch: pytest.MonkeyPatch,
    verb: Callable[[PubSubDelivery], Awaitable[None]],
    method: str,
) -> None:
    monkeypatch.setattr("bridge.brokers.pubsub.lease.SETTLE_LIMIT", 0.3)
    server.to_pull = [message(0)]
    async with consuming(server) as (queue, deliveries):
        delivery = await come(deliveries)
        server.gates = {method: asyncio.Event()}
        with pytest.raises(PgbridgeError):
            await asyncio.wait_for(verb(delivery), 5.0)
        server.gates.pop(method).set()
        await queue.close()
        assert server.leases[-1] == ("0", 0)


async def test_one_settlement_wakes_whoever_waits_for_the_next_and_the_pull(server: ScriptedPubSub) -> None:
    server.to_pull = [message(n, key="a" if n % 3 else f"k{n}") for n in range(300)]
    async with consuming(server, prefetch=1) as (queue, deliveries):
        # Each is acknowledged once the next is waited for already.
        acks = [asyncio.ensure_future((await come(deliveries)).ack()) for _ in range(300)]
        await asyncio.gather(*acks)
        await in_hand(queue, 0)
