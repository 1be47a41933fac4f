"""Unconfirmed batches against a naive model, and the reader against bytes that come in any pieces."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import body, commands, frame, header

from bridge.brokers.contract import CONFIRMED, Never, NotSent, Unknown
from bridge.brokers.rabbitmq.confirms import NACKED, Batch, UnconfirmedBatches
from bridge.brokers.rabbitmq.reader import BrokenStreamError, FrameReader
from bridge.event import Event
from tests.support.events import make_event

REFUSED = Never("too_large", "refused before sending")
RETURNED = Never("unroutable", "came back")
LOST = Unknown("lost")
UNSENT = NotSent("unsent")


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def write(
    unconfirmed: UnconfirmedBatches[Event],
    loop: asyncio.AbstractEventLoop,
    events: list[Event],
    refused: set[int] | None = None,
) -> Batch[Event]:
    """A batch that is written in chunks of three; `refused` are indexes that are not sent."""
    batch = Batch(events, loop.create_future())
    for start in range(0, len(events), 3):
        indexes = range(start, min(start + 3, len(events)))
        unconfirmed.wrote(batch, indexes, {index: REFUSED for index in indexes if index in (refused or set())})
    unconfirmed.seal(batch)
    return batch


batches = st.lists(
    st.integers(0, 9).flatmap(lambda size: st.tuples(st.just(size), st.sets(st.integers(0, max(0, size - 1))))),
    min_size=1,
    max_size=5,
)


@given(batches, st.data())
def test_each_event_gets_the_answer_of_its_own_tag(
    loop: asyncio.AbstractEventLoop, shapes: list[tuple[int, set[int]]], data: st.DataObject
) -> None:
    unconfirmed = UnconfirmedBatches[Event]()
    written: list[Batch[Event]] = []
    expected: list[list[Any]] = []
    place_of_tag: list[tuple[int, int]] = []
    for size, refused in shapes:
        refused = {index for index in refused if index < size}
        place_of_tag += [(len(written), index) for index in range(size) if index not in refused]
        expected.append([REFUSED if index in refused else None for index in range(size)])
        written.append(write(unconfirmed, loop, [make_event(n) for n in range(size)], refused))
    waiting = set(range(1, len(place_of_tag) + 1))
    for _ in range(data.draw(st.integers(0, 12), label="confirms")):
        if not waiting:
            break
        tag = data.draw(st.sampled_from(sorted(waiting)), label="tag")
        multiple, nacked = data.draw(st.booleans(), label="multiple"), data.draw(st.booleans(), label="nacked")
        unconfirmed.settled(tag, multiple, nacked)
        for settled in [each for each in waiting if each == tag or (multiple and each < tag)]:
            waiting.remove(settled)
            batch, index = place_of_tag[settled - 1]
            expected[batch][index] = NACKED if nacked else CONFIRMED
        assert [batch.done.done() for batch in written] == [None not in answers for answers in expected]
    unconfirmed.give_up(LOST, UNSENT)
    assert [batch.outcomes() for batch in written] == [
        [LOST if answer is None else answer for answer in answers] for answers in expected
    ]


def test_confirms_for_what_is_no_longer_known_are_ignored(loop: asyncio.AbstractEventLoop) -> None:
    unconfirmed = UnconfirmedBatches[Event]()
    unconfirmed.settled(7, False, False)
    batch = write(unconfirmed, loop, [make_event(), make_event()])
    for tag in (1, 1, 99):
        unconfirmed.settled(tag, False, True)
    unconfirmed.settled(2, False, False)
    unconfirmed.settled(2, True, True)
    assert batch.outcomes() == [NACKED, CONFIRMED]


def test_a_return_for_one_of_two_copies_makes_both_unknown(loop: asyncio.AbstractEventLoop) -> None:
    unconfirmed = UnconfirmedBatches[Event]()
    event = make_event()
    first, second = write(unconfirmed, loop, [event]), write(unconfirmed, loop, [make_event(), event])
    unconfirmed.returned(event.id, event.topic, RETURNED)
    unconfirmed.settled(3, True, False)
    assert isinstance(first.outcomes()[0], Unknown)
    assert second.outcomes()[0] is CONFIRMED
    assert isinstance(second.outcomes()[1], Unknown)


def test_as_many_returns_as_copies_are_certain_whatever_comes_between(loop: asyncio.AbstractEventLoop) -> None:
    unconfirmed = UnconfirmedBatches[Event]()
    event = make_event()
    batch = write(unconfirmed, loop, [event, event])
    unconfirmed.returned(event.id, event.topic, RETURNED)
    unconfirmed.settled(1, False, False)
    unconfirmed.returned(event.id, event.topic, RETURNED)
    unconfirmed.settled(2, False, False)
    assert batch.outcomes() == [RETURNED, RETURNED]


def test_a_copy_that_was_confirmed_before_the_return_is_not_the_one_that_came_back(
    loop: asyncio.AbstractEventLoop,
) -> None:
    unconfirmed = UnconfirmedBatches[Event]()
    event = make_event()
    batch = write(unconfirmed, loop, [event, event])
    unconfirmed.settled(1, False, False)
    unconfirmed.returned(event.id, event.topic, RETURNED)
    unconfirmed.settled(2, False, False)
    assert batch.outcomes() == [CONFIRMED, RETURNED]


def test_a_batch_whose_call_was_cancelled_counts_until_its_confirms_come(loop: asyncio.AbstractEventLoop) -> None:
    unconfirmed = UnconfirmedBatches[Event]()
    batch = write(unconfirmed, loop, [make_event() for _ in range(4)])
    unconfirmed.settled(2, False, False)
    batch.give_up(LOST, UNSENT)
    assert unconfirmed.outstanding() == 3
    unconfirmed.settled(4, True, False)
    assert unconfirmed.outstanding() == 0
    assert unconfirmed.batches == []
    assert batch.outcomes() == [LOST, CONFIRMED, LOST, LOST]


def test_a_batch_that_is_cancelled_half_written_is_gone_with_the_last_confirm_of_what_was_written(
    loop: asyncio.AbstractEventLoop,
) -> None:
    unconfirmed = UnconfirmedBatches[Event]()
    batch = Batch([make_event() for _ in range(4)], loop.create_future())
    unconfirmed.wrote(batch, range(2), {})
    unconfirmed.settled(1, False, False)
    unconfirmed.settled(2, False, False)
    batch.give_up(LOST, UNSENT)
    unconfirmed.seal(batch)
    assert unconfirmed.batches == []
    assert batch.outcomes() == [CONFIRMED, CONFIRMED, UNSENT, UNSENT]


def test_the_reader_says_whether_a_confirm_was_among_what_came() -> None:
    reader = FrameReader(lambda *_: None, lambda *_: None, lambda *_: None)
    ack, heartbeat = frame.marshal(commands.Basic.Ack(1, False), 1), b"\x08\0\0\0\0\0\0\xce"
    assert [
        reader.feed(data)
        for data in (heartbeat, heartbeat + ack[:-1], ack[-1:] + heartbeat, b"", heartbeat + ack + heartbeat)
    ] == [False, False, True, False, True]


@given(st.data())
def test_frames_are_read_alike_in_whatever_pieces_they_come(data: st.DataObject) -> None:
    seen: list[Any] = []
    reader = FrameReader(
        on_confirm=lambda tag, multiple, nacked: seen.append(("nack" if nacked else "ack", tag, multiple)),
        on_method=lambda channel, method: seen.append((channel, method.name)),
        on_return=lambda method, message_id: seen.append((method.reply_text, message_id)),
    )
    stream = b"".join(
        frame.marshal(each, channel)
        for channel, each in (
            (1, commands.Basic.Ack(1, False)),
            (1, commands.Basic.Ack(9, True)),
            (0, commands.Connection.Blocked("low on memory")),
            (1, commands.Basic.Return(312, "NO_ROUTE", "events", "topic")),
            (1, header.ContentHeader(0, 20, commands.Basic.Properties(message_id="id-1"))),
            (1, body.ContentBody(bytes(20))),
            (1, commands.Basic.Nack(10, True, True)),
            (1, commands.Basic.Nack(2**40, False, False)),
            (1, commands.Basic.Ack(2**40 + 1, False)),
        )
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1))))
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        reader.feed(stream[start:stop])
    assert seen == [
        ("ack", 1, False),
        ("ack", 9, True),
        (0, "Connection.Blocked"),
        ("NO_ROUTE", "id-1"),
        ("nack", 10, True),
        ("nack", 2**40, False),
        ("ack", 2**40 + 1, False),
    ]


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request",
        b"AMQP\x00\x00\x09\x01",
        b"\x01\x00\x00\xff\xff\xff\xff\x00",
        b"\x01\x00\x00\x00\x00\x00\x04\x00\x3c\x00\x50\x00",
    ],
    ids=["HTTP", "other version", "huge frame", "no frame end"],
)
def test_bytes_that_are_not_frames_are_told(data: bytes) -> None:
    reader = FrameReader(lambda *_: None, lambda *_: None, lambda *_: None)
    with pytest.raises(BrokenStreamError):
        reader.feed(data)
