"""Acknowledgements over one channel, against what RabbitMQ would have settled."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, frame

from bridge.brokers.rabbitmq.acks import Acks
from bridge.brokers.rabbitmq.closure import ClosedError, Closure


class Broker:
    """Keeps the account that RabbitMQ keeps: which deliveries are open, and what each frame settled."""

    def __init__(self, deliveries: int) -> None:
        self.open = set(range(1, deliveries + 1))
        self.acked: set[int] = set()
        self.frames = 0
        self.has_room = True
        self.lost: Closure | None = None

    def write(self, data: bytes) -> None:
        while data:
            size, _, method = frame.unmarshal(data)
            data = data[size:]
            assert isinstance(method, commands.Basic.Ack | commands.Basic.Nack)
            tag = method.delivery_tag or 0
            assert tag in self.open, "RabbitMQ closes the channel for a tag that it does not know"
            settled = {each for each in self.open if each <= tag} if method.multiple else {tag}
            self.open -= settled
            self.frames += 1
            if isinstance(method, commands.Basic.Ack):
                self.acked |= settled
            else:
                assert method.requeue
                assert not method.multiple


def acks_of(broker: Broker, timeout: float = 10.0) -> Acks:
    return Acks(broker, 1, timeout)  # type: ignore[arg-type]


@given(st.permutations(range(1, 13)), st.sets(st.integers(1, 12)), st.sets(st.integers(1, 12)), st.data())
def test_exactly_what_was_acknowledged_is_settled(
    order: list[int], returned: set[int], kept: set[int], data: st.DataObject
) -> None:
    async def run() -> Broker:
        broker = Broker(12)
        acks = acks_of(broker)
        for tag in order:
            if tag in kept:
                continue
            await (acks.give_back(tag) if tag in returned else acks.ack(tag))
            for _ in range(data.draw(st.integers(0, 1))):
                await asyncio.sleep(0)
        acks.flush()
        return broker

    broker = asyncio.run(run())
    assert broker.open == kept
    assert broker.acked == set(order) - kept - returned


async def test_those_of_one_turn_share_a_frame() -> None:
    broker = Broker(100)
    acks = acks_of(broker)
    for tag in range(100, 0, -1):
        await acks.ack(tag)
    assert broker.frames == 0
    await asyncio.sleep(0)
    assert (broker.frames, broker.open) == (1, set())


async def test_a_connection_that_is_lost_is_told_to_each_who_asks() -> None:
    broker = Broker(2)
    broker.has_room, broker.lost = False, Closure("gone")
    acks = acks_of(broker)
    for settle in (acks.ack(1), acks.give_back(2)):
        with pytest.raises(ClosedError, match="gone"):
            await settle


async def test_who_waits_for_room_goes_on_when_there_is_some() -> None:
    broker = Broker(2)
    broker.has_room = False
    acks = acks_of(broker)
    waiting = [asyncio.create_task(settle) for settle in (acks.ack(1), acks.give_back(2))]
    await asyncio.sleep(0)
    assert broker.open == {1, 2}
    broker.has_room = True
    acks.has_room()
    await asyncio.gather(*waiting)
    acks.flush()
    assert (broker.open, broker.acked) == (set(), {1})


async def test_who_waits_for_room_hears_of_the_connection_s_end() -> None:
    broker = Broker(1)
    broker.has_room = False
    acks = acks_of(broker)
    waiting = asyncio.create_task(acks.ack(1))
    await asyncio.sleep(0)
    broker.lost = Closure("gone")
    acks.has_room()
    with pytest.raises(ClosedError, match="gone"):
        await waiting


async def test_an_acknowledgement_that_finds_no_room_on_the_connection_ends_after_the_time_out() -> None:
    broker = Broker(2)
    broker.has_room = False
    acks = acks_of(broker, timeout=0.1)
    told = await asyncio.gather(acks.ack(1), acks.give_back(2), return_exceptions=True)
    assert [type(each) for each in told] == [ClosedError] * 2
