"""A slow, frozen or silent NATS server, and a bridge that stood still itself: late is not lost.

Events are marked as replays, so they carry no id that JetStream knows again: what was sent twice is stored twice.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event as Flag
from threading import Thread
from typing import Any

import nats
import pytest
from pydantic import SecretStr

from bridge.brokers.contract import CONFIRMED, NotSent, Outcome, Unknown
from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.sink import NatsSink
from bridge.event import REPLAYED, Event
from tests.support.events import make_event
from tests.support.proxy import Proxy
from tests.support.servers import NatsServer, Server
from tests.support.until import LIMIT, until

MARK = {REPLAYED: "true"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with NatsServer(tmp_path) as server:
        yield server


@pytest.fixture
async def proxy(server: NatsServer) -> AsyncIterator[Proxy]:
    async with Proxy(server.host, server.port) as proxy:
        yield proxy


@pytest.fixture
async def sink(proxy: Proxy, unique: str) -> AsyncIterator[NatsSink]:
    """Open, behind the proxy, on a stream of its own; it gives up after a second of silence."""
    sink = await opened(f"nats://127.0.0.1:{proxy.port}", unique, publish_timeout=1.0)
    yield sink
    await sink.close()


async def opened(url: str, stream: str, **changes: Any) -> NatsSink:
    sink = NatsSink(NatsSettings(type="nats", url=SecretStr(url), stream=stream, **changes))
    await sink.topology(apply=True)
    await sink.open()
    return sink


def marked(count: int, **changes: Any) -> list[Event]:
    return [make_event(number, headers=MARK, **changes) for number in range(count)]


async def stored(server: NatsServer, stream: str) -> int:
    async with await nats.connect(server.url) as client:
        return (await client.jetstream().stream_info(stream)).state.messages


@contextmanager
def frozen_most_of_each_second(server: Server) -> Iterator[None]:
    """Frozen for 0.95 s, then running for 150 ms of processor time, by a thread: the loop may be busy meanwhile."""
    done = Flag()

    def freeze_and_thaw() -> None:
        while not done.is_set():
            server.freeze()
            time.sleep(0.95)
            server.thaw_for(0.15)

    thread = Thread(target=freeze_and_thaw)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


async def test_a_server_that_is_frozen_most_of_the_time_gets_every_event_once(server: NatsServer, unique: str) -> None:
    # Each time a busy server may not come to its first confirm, so the time-out spans some of them.
    sink = await opened(server.url, unique, publish_timeout=5.0)
    with frozen_most_of_each_second(server):
        calls = [asyncio.create_task(sink.publish(marked(5000, payload=bytes(2000)))) for _ in range(8)]
        outcomes = await asyncio.gather(*calls)
    # Counted, since pytest would compare long lists for a quarter of an hour.
    assert Counter(outcome for each in outcomes for outcome in each) == {CONFIRMED: 40_000}
    assert await stored(server, unique) == 40_000
    await sink.close()


async def test_confirms_that_come_slower_than_the_time_out_settle_their_events(
    server: NatsServer, proxy: Proxy, sink: NatsSink, unique: str
) -> None:
    proxy.rate_to_client = 50_000
    outcomes = await sink.publish(marked(2000))
    assert list(outcomes) == [CONFIRMED] * 2000
    assert sink.is_open
    assert await stored(server, unique) == 2000


async def test_a_server_whose_answers_never_come_is_left_and_says_why(
    server: NatsServer, proxy: Proxy, sink: NatsSink, unique: str
) -> None:
    proxy.delay_to_client = 3600.0
    began = time.monotonic()
    outcomes = await asyncio.wait_for(sink.publish(marked(10)), LIMIT)
    assert 1.0 <= time.monotonic() - began < 4.0
    assert outcomes == [outcomes[0]] * 10
    assert isinstance(outcomes[0], Unknown)
    assert "has confirmed nothing for 1 s" in outcomes[0].reason
    assert not outcomes[0].poisoned
    assert not sink.is_open
    assert [type(each) for each in await sink.publish(marked(2))] == [NotSent] * 2


async def test_what_was_confirmed_before_the_answers_ended_is_counted(
    server: NatsServer, proxy: Proxy, sink: NatsSink
) -> None:
    first = asyncio.create_task(sink.publish(marked(10)))
    await first
    both = [asyncio.create_task(sink.publish(marked(10)))]
    await asyncio.sleep(0.3)
    proxy.delay_to_client = 3600.0
    both.append(asyncio.create_task(sink.publish(marked(10))))
    confirmed, silent = await asyncio.wait_for(asyncio.gather(*both), LIMIT)
    assert list(confirmed) == [CONFIRMED] * 10
    assert all(isinstance(each, Unknown) for each in silent)


async def test_a_call_that_begins_during_the_silence_does_not_begin_it_again(proxy: Proxy, sink: NatsSink) -> None:
    proxy.delay_to_client = 3600.0
    calls: list[asyncio.Task[Any]] = []
    began = time.monotonic()
    while sink.is_open and time.monotonic() - began < 5.0:
        calls.append(asyncio.create_task(sink.publish(marked(1))))
        await asyncio.sleep(0.1)
    assert time.monotonic() - began < 3.0
    await asyncio.gather(*calls)


async def test_one_answer_that_never_comes_is_not_waited_for_while_later_ones_do(
    server: NatsServer, sink: NatsSink, unique: str
) -> None:
    """As in a cluster whose leader changes: core NATS may lose a message, or its confirm."""
    async with await nats.connect(server.url) as other:
        # Takes the message and answers nothing, as a lost confirm looks: no stream takes this topic.
        jetstream = other.jetstream()
        await other.subscribe(f"{unique}.lost")
        config = (await jetstream.stream_info(unique)).config
        await jetstream.update_stream(config.evolve(subjects=[f"{unique}.shop.>"]))
        lost = asyncio.create_task(sink.publish(marked(1, topic="lost")))
        began = time.monotonic()
        while not lost.done() and time.monotonic() - began < LIMIT:
            await sink.publish(marked(1, topic="shop.a"))
        (outcome,) = await lost
    assert isinstance(outcome, Unknown)
    assert "later ones" in outcome.reason
    assert not sink.is_open


async def test_a_bridge_that_stood_still_reads_what_came_before_it_judges(
    server: NatsServer, sink: NatsSink, unique: str
) -> None:
    for _ in range(3):
        call = asyncio.create_task(sink.publish(marked(300)))
        # Up to where the silence counts nearly to its end; then the loop is blocked, and the answers wait unread.
        await asyncio.sleep(0)
        time.sleep(2.5)
        assert list(await call) == [CONFIRMED] * 300
    assert sink.is_open
    assert await stored(server, unique) == 900


async def test_stalled_says_that_nothing_is_confirmed_and_ends_with_the_wait(server: NatsServer, unique: str) -> None:
    sink = await opened(server.url, unique)
    assert sink.stalled is None
    server.freeze()
    try:
        assert sink.stalled is None
        call = asyncio.create_task(sink.publish(marked(10)))
        await asyncio.sleep(0.3)
        assert sink.stalled is None
        await until(lambda: sink.stalled is not None)
        assert "has confirmed nothing for" in str(sink.stalled)
        assert sink.is_open
    finally:
        server.thaw()
    assert list(await call) == [CONFIRMED] * 10
    assert sink.stalled is None
    await sink.close()


async def test_an_idle_connection_that_is_dead_is_noticed(
    proxy: Proxy, sink: NatsSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.brokers.nats.sink.PING_INTERVAL", 0.5)
    await asyncio.sleep(2.0)
    assert sink.is_open
    proxy.delay_to_client = 3600.0
    await until(lambda: not sink.is_open, limit=6.0)


async def test_an_answer_that_is_not_jetstreams_is_no_answer(server: NatsServer, sink: NatsSink, unique: str) -> None:
    async with await nats.connect(server.url) as other:

        async def answer(message: Any) -> None:
            await message.respond(b"thank you")
            await message.respond(b'{"stream": "s", "seq": 1}')

        config = (await other.jetstream().stream_info(unique)).config
        await other.jetstream().update_stream(config.evolve(subjects=[f"{unique}.shop.>"]))
        await other.subscribe(f"{unique}.mine", cb=answer)
        # nats-py writes a ping ahead of what it has buffered.
        for _ in range(2):
            await other.flush()
        outcomes: list[Outcome] = list(await sink.publish(marked(20, topic="mine")))
    assert outcomes == [CONFIRMED] * 20
