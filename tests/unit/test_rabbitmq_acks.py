"""Acknowledgements over one channel, against what RabbitMQ would have settled."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aio_pika.exceptions import ChannelInvalidStateError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from bridge.brokers.rabbitmq.acks import Acks
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.errors import BrokerUnavailableError


class Channel:
    """Keeps the account that RabbitMQ keeps: which deliveries are open, and what each frame settled."""

    def __init__(self, deliveries: int) -> None:
        self.open = set(range(1, deliveries + 1))
        self.acked: set[int] = set()
        self.frames = 0
        self.raises: BaseException | None = None
        self.room = asyncio.Event()
        self.room.set()

    async def basic_ack(self, tag: int, *, multiple: bool, wait: bool) -> None:
        if self.raises is not None:
            raise self.raises
        await self.room.wait()
        assert tag in self.open, "RabbitMQ closes the channel for a tag that it does not know"
        settled = {each for each in self.open if each <= tag} if multiple else {tag}
        self.open -= settled
        self.acked |= settled
        self.frames += 1
        await asyncio.sleep(0)

    async def basic_nack(self, tag: int, *, requeue: bool) -> None:
        await self.room.wait()
        assert requeue
        self.open.remove(tag)
        await asyncio.sleep(0)


def acks_of(channel: Any) -> Acks:
    url = SecretStr("amqp://guest:guest@127.0.0.1/")
    return Acks(channel, RabbitMQSettings(type="rabbitmq", url=url, publish_timeout=0.1))


def message(tag: int) -> Any:
    return SimpleNamespace(delivery_tag=tag)


@given(st.permutations(range(1, 13)), st.sets(st.integers(1, 12)), st.sets(st.integers(1, 12)), st.data())
def test_exactly_what_was_acknowledged_is_settled(
    order: list[int], returned: set[int], kept: set[int], data: st.DataObject
) -> None:
    async def run() -> Channel:
        channel = Channel(12)
        acks = acks_of(channel)
        tasks = []
        for tag in order:
            if tag in kept:
                continue
            settle = acks.give_back if tag in returned else acks.ack
            tasks.append(asyncio.create_task(settle(message(tag))))
            for _ in range(data.draw(st.integers(0, 3))):
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        return channel

    channel = asyncio.run(run())
    assert channel.open == kept
    assert channel.acked == set(order) - kept - returned


async def test_those_that_end_together_share_a_frame() -> None:
    channel = Channel(100)
    acks = acks_of(channel)
    await asyncio.gather(*(acks.ack(message(tag)) for tag in range(100, 0, -1)))
    assert (channel.frames, channel.open) == (1, set())


@pytest.mark.parametrize(
    "error",
    [ChannelInvalidStateError("closed"), asyncio.CancelledError()],
    ids=["closed", "left by aiormq, which hands on the cancellation of its own reader"],
)
async def test_a_channel_that_is_gone_is_told_to_each_who_asked(error: BaseException) -> None:
    channel = Channel(3)
    channel.raises = error
    acks = acks_of(channel)
    told = await asyncio.gather(*(acks.ack(message(tag)) for tag in (1, 2, 3)), return_exceptions=True)
    assert [type(each) for each in told] == [BrokerUnavailableError] * 3
    with pytest.raises(BrokerUnavailableError):
        await acks.ack(message(3))


async def test_an_acknowledgement_that_finds_no_room_on_the_connection_ends_after_the_time_out() -> None:
    channel = Channel(2)
    channel.room.clear()
    acks = acks_of(channel)
    async with asyncio.timeout(10):
        told = await asyncio.gather(acks.ack(message(1)), acks.give_back(message(2)), return_exceptions=True)
    assert [type(each) for each in told] == [BrokerUnavailableError] * 2
