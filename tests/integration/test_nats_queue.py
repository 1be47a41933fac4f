"""What only a queue on NATS can meet: a server that is paused, filters wider than the patterns, a history, strange
headers and subjects. What every queue promises: tests/contract/."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import pytest
from nats.js import JetStreamContext
from pydantic import SecretStr

from bridge.brokers.contract import CONFIRMED, Delivery, Failure, Letter, Subscription, Verdict
from bridge.brokers.nats.dead import NatsDeadLetters
from bridge.brokers.nats.queue import NatsQueue
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.sink import NatsSink
from bridge.demo.servers import guard
from bridge.errors import BrokerUnavailableError, RefusedError
from bridge.event import Event
from tests.support.events import ids, make_event
from tests.support.proxy import Proxy
from tests.support.servers import NatsServer
from tests.support.until import LIMIT, until

FAILURE = Failure("error", "it failed")

ACK_WAIT = 3.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    """Its own, to be paused."""
    with NatsServer(tmp_path) as server:
        yield server


@pytest.fixture
async def jetstream(nats_server: NatsServer) -> AsyncIterator[JetStreamContext]:
    async with await nats.connect(nats_server.url) as client:
        yield client.jetstream()


def settings_of(server: NatsServer, stream: str) -> NatsSettings:
    return NatsSettings(type="nats", url=SecretStr(server.url), stream=stream)


def queue_of(
    server: NatsServer, name: str, *topics: str, prefetch: int = 10, ack_wait: float = ACK_WAIT, start: str = "now"
) -> NatsQueue:
    """The queue of a worker that is named as its stream is."""
    wanted = Subscription(name, topics or ["#"], prefetch, [1.0], 3, ack_wait, start)  # type: ignore[arg-type]
    return NatsQueue(settings_of(server, name), wanted)


@asynccontextmanager
async def consuming(queue: NatsQueue) -> AsyncIterator[AsyncIterator[Delivery]]:
    await queue.open()
    try:
        yield aiter(queue.deliveries())
    finally:
        await queue.close()


async def take(deliveries: AsyncIterator[Delivery], limit: float = LIMIT) -> Delivery:
    return await asyncio.wait_for(anext(deliveries), limit)


def id_of(delivery: Delivery) -> str:
    assert isinstance(delivery.event, Event), delivery.event
    return delivery.event.id


async def publish(server: NatsServer, stream: str, events: Sequence[Event]) -> None:
    sink = NatsSink(settings_of(server, stream))
    await sink.open()
    assert list(await sink.publish(events)) == [CONFIRMED] * len(events)
    await sink.close()


async def publish_raw(server: NatsServer, subject: bytes, headers: bytes, payload: bytes) -> None:
    """A message whose headers, written as they stand, no client would write."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    block = b"NATS/1.0\r\n" + headers + b"\r\n"
    writer.write(b'CONNECT {"verbose": false, "headers": true}\r\n')
    writer.write(b"HPUB %b %d %d\r\n%b%b\r\nPING\r\n" % (subject, len(block), len(block + payload), block, payload))
    while await asyncio.wait_for(reader.readline(), LIMIT) != b"PONG\r\n":
        pass
    writer.close()


async def left(server: NatsServer, name: str) -> tuple[int, int]:
    """Messages that the worker has not been given, and those that it has not settled."""
    async with await nats.connect(server.url) as client:
        state = await client.jetstream().consumer_info(name, name)
    return state.num_pending or 0, state.num_ack_pending or 0


async def nothing_is_left(server: NatsServer, name: str) -> bool:
    return await left(server, name) == (0, 0)


async def letters(server: NatsServer, name: str, verdict: Verdict = "keep") -> list[Letter]:
    found: list[Letter] = []

    async def decide(letter: Letter) -> Verdict:
        found.append(letter)
        return verdict

    await asyncio.wait_for(NatsDeadLetters(settings_of(server, name), name).walk(decide), LIMIT)
    return found


async def freeze(server: NatsServer) -> None:
    """Returns once every thread of it stands still, for which SIGSTOP takes a moment."""
    server.freeze()
    states = [stat for pid in guard.tree(server.pid) for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    await until(lambda: all(each.read_text().rpartition(")")[2].split()[0] == "T" for each in states))


async def outcome_and_time(verb: asyncio.Task[None]) -> tuple[BaseException | None, float]:
    began = time.monotonic()
    await asyncio.wait([verb], timeout=LIMIT)
    return verb.exception(), time.monotonic() - began


@pytest.mark.parametrize("pause", [6.0, 12.0])
async def test_what_was_being_settled_while_the_server_was_paused_is_settled_or_comes_again(
    server: NatsServer, unique: str, pause: float
) -> None:
    """As a worker goes about it: a verb raises, so the queue is closed and another one opened."""
    events = [make_event(number) for number in range(4)]
    queue = queue_of(server, unique, prefetch=4)
    await queue.topology(apply=True)
    await publish(server, unique, events)
    await queue.open()
    deliveries = aiter(queue.deliveries())
    acked, retried, dead, given_back = [await take(deliveries) for _ in events]
    await freeze(server)
    thaw = asyncio.get_running_loop().call_later(pause, server.thaw)
    try:
        verbs = [acked.ack(), retried.retry(0.1), dead.dead_letter(FAILURE), given_back.give_back()]
        for error, took in await asyncio.gather(*[outcome_and_time(asyncio.create_task(verb)) for verb in verbs]):
            assert isinstance(error, BrokerUnavailableError)
            assert took < 8.0
        began = time.monotonic()
        await queue.close()
        assert time.monotonic() - began < 4.0
        another = queue_of(server, unique, prefetch=4)

        async def opens() -> bool:
            began = time.monotonic()
            try:
                await another.open()
            except BrokerUnavailableError:
                assert time.monotonic() - began < 16.0
                return False
            return True

        await until(opens)
    finally:
        thaw.cancel()
        server.thaw()
    again: set[str] = set()
    deliveries = aiter(another.deliveries())
    while {id_of(retried), id_of(given_back)} - again or not await nothing_is_left(server, unique):
        delivery = await take(deliveries)
        again.add(id_of(delivery))
        await delivery.ack()
    await another.close()
    assert id_of(dead) in again | {letter.event_id for letter in await letters(server, unique)}


async def test_a_stop_while_the_server_is_paused_leaves_a_connection_on_which_can_be_settled(
    server: NatsServer, unique: str
) -> None:
    queue = queue_of(server, unique)
    await queue.topology(apply=True)
    await publish(server, unique, [make_event()])
    async with consuming(queue) as deliveries:
        delivery = await take(deliveries)
        await freeze(server)
        try:
            with pytest.raises(BrokerUnavailableError):
                await asyncio.wait_for(queue.stop(), 8.0)
        finally:
            server.thaw()
        with pytest.raises(StopAsyncIteration):
            await take(deliveries)
        await delivery.ack()
        assert await nothing_is_left(server, unique)


async def test_a_close_while_the_server_is_paused_takes_nothing_from_who_gets_it_next(
    server: NatsServer, unique: str
) -> None:
    # No request is open, which could get it in the moment of the thaw.
    queue, other = (queue_of(server, unique, prefetch=1, ack_wait=1.0) for _ in range(2))
    await queue.topology(apply=True)
    await publish(server, unique, [make_event()])
    await queue.open()
    first = await take(aiter(queue.deliveries()))
    await freeze(server)
    try:
        began = time.monotonic()
        await queue.close()
        assert 1.0 < time.monotonic() - began < 4.0
    finally:
        server.thaw()
    async with consuming(other) as deliveries:
        second = await take(deliveries)
        assert (first.attempt, second.attempt) == (1, 2)
        with pytest.raises(TimeoutError):
            await take(deliveries, 2.5)
        await second.ack()
        assert await nothing_is_left(server, unique)


async def test_what_came_after_a_long_quiet_goes_back_at_once(nats_server: NatsServer, unique: str) -> None:
    queue, other = (queue_of(nats_server, unique, ack_wait=4.0) for _ in range(2))
    await queue.topology(apply=True)
    async with consuming(queue) as deliveries:
        await asyncio.sleep(4.5)
        await publish(nats_server, unique, [make_event()])
        await take(deliveries)
    async with consuming(other) as deliveries:
        await (await take(deliveries, 3.0)).ack()


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"max_msg_size": 100}, "exceeds maximum"),
        ({"max_msgs": 1}, "maximum messages"),
        ({"max_bytes": 500}, "maximum"),
    ],
    ids=["too large", "full by number", "full by size"],
)
async def test_a_letter_that_is_refused_stays_in_hand_for_another_verb(
    nats_server: NatsServer, jetstream: JetStreamContext, unique: str, limit: dict[str, int], reason: str
) -> None:
    queue = queue_of(nats_server, unique, prefetch=1, ack_wait=1.0)
    await queue.topology(apply=True)
    stream = f"{unique}_dead"
    await jetstream.publish(f"{stream}.other", b"the first")
    await jetstream.update_stream((await jetstream.stream_info(stream)).config.evolve(**limit))
    await publish(nats_server, unique, [make_event(payload=bytes(1000))])
    async with consuming(queue) as deliveries:
        delivery = await take(deliveries)
        with pytest.raises(RefusedError, match=reason):
            await delivery.dead_letter(FAILURE)
        # Still extended: otherwise it would come again after ack_wait.
        with pytest.raises(TimeoutError):
            await take(deliveries, 2.5)
        deliveries = aiter(queue.deliveries())
        await delivery.retry(0.01)
        again = await take(deliveries)
        assert again.attempt == 2
        await again.ack()
        assert await nothing_is_left(nats_server, unique)


async def test_thousands_that_no_pattern_takes_do_not_stop_the_few_that_one_does(
    nats_server: NatsServer, unique: str
) -> None:
    events = [make_event(number, topic=f"shop.a.{'paid' if number % 700 == 0 else 'lost'}") for number in range(9000)]
    queue = queue_of(nats_server, unique, "shop.#.paid", prefetch=2)
    await queue.topology(apply=True)
    await publish(nats_server, unique, events)
    seen = []
    async with consuming(queue) as deliveries:
        for _ in events[::700]:
            delivery = await take(deliveries)
            seen.append(id_of(delivery))
            await delivery.ack()
        await until(lambda: nothing_is_left(nats_server, unique), "what no pattern takes is acknowledged")
    assert seen == ids(events[::700])


async def test_the_answer_to_the_acknowledgement_of_what_no_pattern_takes_is_not_waited_for(
    nats_server: NatsServer, unique: str
) -> None:
    async with Proxy(nats_server.host, nats_server.port) as proxy:
        url = SecretStr(f"nats://127.0.0.1:{proxy.port}")
        wanted = Subscription(unique, ["shop.#.paid"], 1, [1.0], 3, 30.0)
        queue = NatsQueue(NatsSettings(type="nats", url=url, stream=unique), wanted)
        await queue.topology(apply=True)
        async with consuming(queue) as deliveries:
            proxy.delay_to_client = 6.0
            await publish(nats_server, unique, [make_event(topic="shop.a.lost"), make_event(topic="shop.a.paid")])
            delivery = await take(deliveries)
            proxy.delay_to_client = 0.0
            await delivery.ack()
            assert await nothing_is_left(nats_server, unique)


@pytest.mark.parametrize("payload", [b"", b"x"], ids=["empty", "payload"])
@pytest.mark.parametrize("status", [100, 404, 408, 409, 503])
async def test_a_strangers_message_with_a_header_named_status_is_handled_and_can_be_a_dead_letter(
    nats_server: NatsServer, unique: str, status: int, payload: bytes
) -> None:
    queue = queue_of(nats_server, unique)
    await queue.topology(apply=True)
    headers = b"Status: %d\r\nDescription: Consumer Deleted\r\n" % status
    await publish_raw(nats_server, f"{unique}.shop.strange".encode(), headers, payload)
    await publish(nats_server, unique, [make_event()])
    async with consuming(queue) as deliveries:
        for _ in range(2):
            await (await take(deliveries)).dead_letter(FAILURE)
        found = await letters(nats_server, unique, "replay")
        assert [letter.payload == payload for letter in found] == [True, False]
        for _ in range(2):
            await (await take(deliveries)).ack()
    assert await letters(nats_server, unique) == []


async def test_a_subject_that_is_not_utf_8_ends_no_connection(nats_server: NatsServer, unique: str) -> None:
    queue = queue_of(nats_server, unique)
    await queue.topology(apply=True)
    await publish_raw(nats_server, unique.encode() + b".shop.\xff", b"", b"x")
    await publish(nats_server, unique, [make_event()])
    async with consuming(queue) as deliveries:
        await (await take(deliveries)).dead_letter(FAILURE)
        await (await take(deliveries)).ack()
    assert [letter.payload for letter in await letters(nats_server, unique)] == [b"x"]


async def test_more_letters_than_are_read_at_once_are_walked_once_each(nats_server: NatsServer, unique: str) -> None:
    events = [make_event(number) for number in range(250)]
    queue = queue_of(nats_server, unique, prefetch=250)
    await queue.topology(apply=True)
    await publish(nats_server, unique, events)
    async with consuming(queue) as deliveries:
        for _ in events:
            await (await take(deliveries)).dead_letter(FAILURE)
    assert [letter.event_id for letter in await letters(nats_server, unique)] == ids(events)
    assert [letter.event_id for letter in await letters(nats_server, unique, "discard")] == ids(events)
    assert await letters(nats_server, unique) == []


@pytest.mark.parametrize("start", ["now", "beginning"])
async def test_a_new_worker_begins_when_it_is_declared_or_with_the_history(
    nats_server: NatsServer, unique: str, start: str
) -> None:
    old, between, new = (make_event(number) for number in range(3))
    await NatsSink(settings_of(nats_server, unique)).topology(apply=True)
    await publish(nats_server, unique, [old])
    queue = queue_of(nats_server, unique, start=start)
    await queue.topology(apply=True)
    await publish(nats_server, unique, [between])
    async with consuming(queue) as deliveries:
        await publish(nats_server, unique, [new])
        for event in (between, new) if start == "now" else (old, between, new):
            delivery = await take(deliveries)
            assert delivery.event == event
            await delivery.ack()
    assert await nothing_is_left(nats_server, unique)


async def test_where_a_worker_begins_is_never_changed(nats_server: NatsServer, unique: str) -> None:
    await NatsSink(settings_of(nats_server, unique)).topology(apply=True)
    old, new = make_event(1), make_event(2)
    await publish(nats_server, unique, [old])
    await queue_of(nats_server, unique, start="beginning").topology(apply=True)
    changed = queue_of(nats_server, unique, start="now")
    assert {each.state for each in await changed.topology(apply=False)} == {"present"}
    narrower = queue_of(nats_server, unique, "shop.#", start="now")
    assert "declared" in {each.state for each in await narrower.topology(apply=True)}
    await publish(nats_server, unique, [new])
    async with consuming(narrower) as deliveries:
        for event in (old, new):
            delivery = await take(deliveries)
            assert delivery.event == event
            await delivery.ack()
