"""RabbitMQ's own ways with a publisher: returns, alarms, slowness, closed channels, lost connections, TLS."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aio_pika
import pytest
import uvloop
from pydantic import SecretStr

from bridge.brokers.contract import CONFIRMED, Never, NotSent, Refused, Unknown
from bridge.brokers.rabbitmq import frames
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.sink import RabbitMQSink
from bridge.errors import BrokerUnavailableError, TopologyError
from bridge.event import Event
from bridge.settings import TlsSettings
from tests.support.events import ids, make_event, make_events
from tests.support.messages import drain
from tests.support.proxy import Proxy
from tests.support.servers import RabbitMQServer
from tests.support.tls_rabbitmq import BROKER_LIMIT, TlsRabbitMQServer
from tests.support.until import until

pytestmark = pytest.mark.rabbitmq


@pytest.fixture(scope="module")
def node(rabbitmq: RabbitMQServer, server_folder: Path) -> Iterator[TlsRabbitMQServer]:
    """A server of this module's own, to be frozen, restarted and alarmed. `rabbitmq` skips where none is installed."""
    with TlsRabbitMQServer(server_folder) as server:
        yield server


def settings_for(url: str, exchange: str, **changes: Any) -> RabbitMQSettings:
    return RabbitMQSettings(type="rabbitmq", url=SecretStr(url), exchange=exchange, **changes)


@pytest.fixture
async def open_sink(unique: str) -> AsyncIterator[Any]:
    """Makes sinks that publish to the exchange `unique`, and closes them at the end."""
    sinks: list[RabbitMQSink] = []

    async def make(url: str, **changes: Any) -> RabbitMQSink:
        sink = RabbitMQSink(settings_for(url, unique, **changes))
        sinks.append(sink)
        await sink.topology(apply=True)
        await sink.open()
        return sink

    yield make
    for sink in sinks:
        await sink.close()


@pytest.fixture
async def bind() -> AsyncIterator[Any]:
    """Makes durable queues, named after the exchange to which they are bound."""
    async with AsyncExitStack() as connections:

        async def make(url: str, exchange: str, pattern: str = "#", **arguments: Any) -> Any:
            connection = await connections.enter_async_context(await aio_pika.connect(url))
            return await bind_queue(connection, exchange, pattern, **arguments)

        yield make


async def bind_queue(connection: Any, exchange: str, pattern: str = "#", **arguments: Any) -> Any:
    """`arguments` with _ for -."""
    channel = await connection.channel()
    queue = await channel.declare_queue(
        exchange, durable=True, arguments={name.replace("_", "-"): value for name, value in arguments.items()}
    )
    await queue.bind(exchange, pattern)
    return queue


async def test_unroutable_events_are_found_among_confirmed_ones(
    rabbitmq: RabbitMQServer, unique: str, open_sink: Any, bind: Any
) -> None:
    sink = await open_sink(rabbitmq.url)
    queue = await bind(rabbitmq.url, unique, "shop.#")
    events = [make_event(n, topic="lost.topic" if n % 3 == 0 else "shop.order") for n in range(900)]
    outcomes = await sink.publish(events)
    for number, outcome in enumerate(outcomes):
        if number % 3:
            assert outcome is CONFIRMED
        else:
            assert isinstance(outcome, Never)
            assert outcome.code == "unroutable"
    assert unique in outcomes[0].reason
    assert "lost.topic" in outcomes[0].reason
    assert "NO_ROUTE" in outcomes[0].reason
    assert ids(await drain(queue)) == [event.id for event in events if event.topic == "shop.order"]


async def test_a_large_unroutable_message_that_comes_back_disturbs_nothing(
    rabbitmq: RabbitMQServer, unique: str, open_sink: Any, bind: Any
) -> None:
    sink = await open_sink(rabbitmq.url)
    await bind(rabbitmq.url, unique, "shop.#")
    events = [make_event(topic="lost", payload=bytes(700_000)), make_event(), make_event(topic="lost", payload=b"")]
    outcomes = await sink.publish(events)
    assert [getattr(outcome, "code", "confirmed") for outcome in outcomes] == ["unroutable", "confirmed", "unroutable"]


async def test_one_event_twice_in_a_batch_is_unroutable_twice(rabbitmq: RabbitMQServer, open_sink: Any) -> None:
    sink = await open_sink(rabbitmq.url)
    event = make_event()
    outcomes = await sink.publish([event, make_event(topic="other"), event])
    assert [getattr(outcome, "code", None) for outcome in outcomes] == ["unroutable"] * 3


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_a_full_queue_refuses_and_the_event_may_be_tried_again(
    rabbitmq: RabbitMQServer, unique: str, open_sink: Any, bind: Any, kind: str
) -> None:
    sink = await open_sink(rabbitmq.url)
    queue = await bind(rabbitmq.url, unique, x_queue_type=kind, x_max_length=10, x_overflow="reject-publish")
    events = make_events(500)
    outcomes = await sink.publish(events)
    refused = [outcome for outcome in outcomes if outcome is not CONFIRMED]
    assert refused
    assert {type(outcome) for outcome in refused} == {Refused}
    confirmed = [e.id for e, outcome in zip(events, outcomes, strict=True) if outcome is CONFIRMED]
    assert ids(await drain(queue)) == confirmed
    assert await sink.publish([make_event()]) == [CONFIRMED]


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_large_bodies_and_many_messages_pass_on_both_event_loops(
    rabbitmq: RabbitMQServer, unique: str, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def scenario() -> None:
        sink = RabbitMQSink(settings_for(rabbitmq.url, unique))
        await sink.topology(apply=True)
        connection = await aio_pika.connect(rabbitmq.url)
        queue = await bind_queue(connection, unique)
        await sink.open()
        batches = [[make_event(payload=bytes([n]) * 2_000_000), *make_events(1000)] for n in range(4)]
        outcomes = await asyncio.gather(*(sink.publish(batch) for batch in batches))
        assert [list(each) for each in outcomes] == [[CONFIRMED] * 1001] * 4
        assert await drain(queue) == [event for batch in batches for event in batch]
        await sink.close()
        await connection.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(scenario())


async def test_a_message_beyond_the_brokers_limit_is_found_and_the_others_go_again(
    node: TlsRabbitMQServer, unique: str, open_sink: Any, bind: Any
) -> None:
    sink = await open_sink(node.url)
    queue = await bind(node.url, unique)
    events = make_events(5)
    events[2] = make_event(payload=bytes(BROKER_LIMIT + 1))
    outcomes = await sink.publish(events)
    assert isinstance(outcomes[2], Never)
    assert outcomes[2].code == "too_large"
    assert str(BROKER_LIMIT) in outcomes[2].reason
    assert all(outcomes[n] is CONFIRMED or not outcomes[n].poisoned for n in (0, 1, 3, 4))
    assert not sink.is_open
    await sink.open()
    again = await sink.publish(events)
    assert [outcome is CONFIRMED for outcome in again] == [True, True, False, True, True]
    assert sink.is_open
    arrived = ids(await drain(queue))
    assert set(arrived) == {events[n].id for n in (0, 1, 3, 4)}


async def test_a_deleted_exchange_closes_the_sink_and_open_says_what_to_do(
    rabbitmq: RabbitMQServer, unique: str, open_sink: Any
) -> None:
    sink = await open_sink(rabbitmq.url)
    async with await aio_pika.connect(rabbitmq.url) as connection:
        await (await connection.channel()).exchange_delete(unique)
    outcomes = await sink.publish(make_events(3))
    assert all(isinstance(outcome, Unknown) and "NOT_FOUND" in outcome.reason for outcome in outcomes)
    assert not any(outcome.poisoned for outcome in outcomes)
    assert not sink.is_open
    with pytest.raises(TopologyError, match="pgbridge topology --apply"):
        await sink.open()
    await sink.topology(apply=True)
    await sink.open()
    assert sink.is_open


async def test_a_topic_that_the_user_may_not_write_is_refused_alone(
    node: TlsRabbitMQServer, unique: str, open_sink: Any, bind: Any
) -> None:
    node.ctl("add_user", unique, "secret")
    node.ctl("set_permissions", unique, ".*", ".*", ".*")
    node.ctl("set_topic_permissions", unique, unique, "^shop\\.", ".*")
    sink = await open_sink(f"amqp://{unique}:secret@127.0.0.1:{node.port}/")
    await bind(node.url, unique)
    events = [make_event(), make_event(topic="secret.topic"), make_event()]
    outcomes = await sink.publish(events)
    assert isinstance(outcomes[1], Never)
    assert outcomes[1].code == "access_refused"
    await sink.open()
    assert await sink.publish([events[0], events[2]]) == [CONFIRMED] * 2


async def test_a_blocked_connection_buffers_little_and_goes_on_when_the_alarm_ends(
    node: TlsRabbitMQServer, unique: str, open_sink: Any, bind: Any
) -> None:
    sink = await open_sink(node.url, publish_timeout=60.0)
    queue = await bind(node.url, unique)
    events = [[make_event(n, payload=bytes(10_000)) for n in range(1000)] for _ in range(4)]
    node.alarm(True)
    try:
        first = asyncio.create_task(sink.publish([make_event()]))
        connection = sink._connection
        await until(lambda: connection.blocked is not None, "RabbitMQ says that it blocks")
        calls = [asyncio.create_task(sink.publish(batch)) for batch in events]
        await asyncio.sleep(0)
        assert connection._transport.get_write_buffer_size() < 2_000_000
        assert not connection.has_room
        assert not any(call.done() for call in calls)
    finally:
        node.alarm(False)
    assert await first == [CONFIRMED]
    assert [list(each) for each in await asyncio.gather(*calls)] == [[CONFIRMED] * 1000] * 4
    assert ids(await drain(queue))[1:] == ids(event for batch in events for event in batch)


async def test_an_alarm_longer_than_the_time_out_neither_repeats_nor_reorders(
    node: TlsRabbitMQServer, unique: str, open_sink: Any, bind: Any
) -> None:
    sink = await open_sink(node.url, publish_timeout=1.0)
    queue = await bind(node.url, unique)
    events = make_events(1000)
    node.alarm(True)
    try:
        calls = [asyncio.create_task(sink.publish(events[:10]))]
        await until(lambda: sink._connection.blocked is not None, "RabbitMQ says that it blocks")
        calls += [asyncio.create_task(sink.publish(events[start : start + 10])) for start in range(10, 500, 10)]
        await asyncio.sleep(2.5)
        calls += [asyncio.create_task(sink.publish(events[start : start + 10])) for start in range(500, 1000, 10)]
        await asyncio.sleep(0.1)
        assert not any(call.done() for call in calls)
        assert sink.is_open
    finally:
        await asyncio.to_thread(node.alarm, False)
    outcomes = await asyncio.wait_for(asyncio.gather(*calls), 20.0)
    assert {outcome for each in outcomes for outcome in each} == {CONFIRMED}
    assert ids(await drain(queue)) == ids(events)


async def test_a_broker_that_is_frozen_most_of_the_time_gets_every_event_once(
    node: TlsRabbitMQServer, unique: str, open_sink: Any, bind: Any
) -> None:
    sink = await open_sink(node.url, publish_timeout=2.5)
    queue = await bind(node.url, unique, x_queue_type="quorum")
    stop = asyncio.Event()

    async def freeze_and_thaw() -> None:
        try:
            while not stop.is_set():
                await asyncio.to_thread(node.freeze)
                await asyncio.sleep(0.95)
                node.thaw()
                await asyncio.sleep(0.05)
        finally:
            node.thaw()

    freezing = asyncio.create_task(freeze_and_thaw())
    await asyncio.sleep(0.1)
    published: list[Event] = []
    started = asyncio.get_running_loop().time()
    try:
        # However fast the machine is in the moments between: for more than twice the time-out.
        while asyncio.get_running_loop().time() - started < 6.0:
            events = make_events(600)
            calls = [sink.publish(events[start : start + 200]) for start in range(0, 600, 200)]
            outcomes = await asyncio.wait_for(asyncio.gather(*calls), 60.0)
            assert [list(each) for each in outcomes] == [[CONFIRMED] * 200] * 3
            published += events
    finally:
        stop.set()
        await freezing
    assert ids(await drain(queue)) == ids(published)


@pytest.fixture
async def proxied(rabbitmq: RabbitMQServer, unique: str, open_sink: Any, bind: Any) -> AsyncIterator[Any]:
    """Makes a sink behind a proxy: (sink, proxy, queue)."""
    async with AsyncExitStack() as stack:

        async def make(**changes: Any) -> tuple[RabbitMQSink, Proxy, Any]:
            proxy = await stack.enter_async_context(Proxy(rabbitmq.host, rabbitmq.port))
            sink = await open_sink(f"amqp://guest:guest@127.0.0.1:{proxy.port}/", **changes)
            return sink, proxy, await bind(rabbitmq.url, unique)

        yield make


@pytest.mark.parametrize(("direction", "rate"), [("to_server", 250_000), ("to_client", 500)])
async def test_confirms_that_come_slowly_are_waited_for_and_nothing_is_sent_twice(
    proxied: Any, direction: str, rate: int
) -> None:
    sink, proxy, queue = await proxied(publish_timeout=1.5)
    setattr(proxy, f"rate_{direction}", rate)
    events = make_events(2000)
    began = asyncio.get_running_loop().time()
    calls = []

    async def publish_one_call(start: int) -> None:
        heard = proxy.heard_from_server
        calls.append(asyncio.create_task(sink.publish(events[start : start + 25])))
        if direction == "to_client":  # else one confirm of 21 bytes may stand for many calls
            await until(lambda: proxy.heard_from_server > heard, "RabbitMQ confirms the call")

    for start in range(0, 2000, 25):
        await publish_one_call(start)
    outcomes = await asyncio.gather(*calls)
    assert asyncio.get_running_loop().time() - began > 3.0, "faster than the time-out, so this shows nothing"
    assert [list(each) for each in outcomes] == [[CONFIRMED] * 25] * 80
    assert sink.is_open
    assert ids(await drain(queue)) == ids(events)


async def test_a_broker_whose_answers_do_not_come_is_left_after_the_time_out(proxied: Any) -> None:
    sink, proxy, queue = await proxied(publish_timeout=1.0)
    events = make_events(20)
    assert list(await sink.publish(events[:10])) == [CONFIRMED] * 10
    await asyncio.sleep(1.2)  # without anything on the way, silence means nothing
    assert sink.is_open
    proxy.delay_to_client = 3600.0
    started = asyncio.get_running_loop().time()
    outcomes = await sink.publish(events[10:])
    assert 1.0 <= asyncio.get_running_loop().time() - started < 2.5
    assert {type(outcome) for outcome in outcomes} == {Unknown}
    assert "confirmed nothing for 1 s (publish_timeout), with 10 messages unconfirmed" in outcomes[0].reason
    assert not any(outcome.poisoned for outcome in outcomes)
    assert not sink.is_open
    assert {type(outcome) for outcome in await sink.publish(events)} == {NotSent}
    assert ids(await drain(queue)) == ids(events)


async def test_a_broker_that_reads_nothing_is_left_after_the_time_out(proxied: Any) -> None:
    sink, proxy, _ = await proxied(publish_timeout=1.0)
    proxy.blackhole = True
    batches = [[make_event(n, payload=bytes(1_000_000)) for n in range(50)] for _ in range(4)]
    calls = [asyncio.create_task(sink.publish(batch)) for batch in batches]
    await asyncio.sleep(0.5)
    connection = sink._connection
    assert connection is not None
    assert connection._transport.get_write_buffer_size() < 3_000_000
    outcomes = await asyncio.wait_for(asyncio.gather(*calls), 5.0)
    assert isinstance(outcomes[0][0], Unknown)
    assert isinstance(outcomes[3][49], NotSent)
    assert not sink.is_open


async def test_a_process_that_did_nothing_for_longer_than_the_time_out_keeps_its_connection(proxied: Any) -> None:
    sink, _, queue = await proxied(publish_timeout=1.0)
    events = make_events(1000)
    calls = [asyncio.create_task(sink.publish(events[start : start + 100])) for start in range(0, 1000, 100)]
    for _ in range(3):
        await asyncio.sleep(0)
        time.sleep(1.5)
    outcomes = await asyncio.gather(*calls)
    assert [list(each) for each in outcomes] == [[CONFIRMED] * 100] * 10
    assert sink.is_open
    assert ids(await drain(queue)) == ids(events)


PUBLISH_UNTIL_TOLD = """
import asyncio, sys, uvloop
from pydantic import SecretStr
from bridge.brokers.contract import CONFIRMED
from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.sink import RabbitMQSink
from tests.support.events import make_event

async def main(url, exchange):
    settings = RabbitMQSettings(type="rabbitmq", url=SecretStr(url), exchange=exchange, publish_timeout=1.0)
    sink = RabbitMQSink(settings)
    await sink.open()
    told = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    print("publishing", flush=True)
    other = 0
    while not told.done():
        outcomes = await asyncio.gather(*(sink.publish([make_event()]) for _ in range(50)))
        other += sum(outcome is not CONFIRMED for (outcome,) in outcomes)
    print("not confirmed:", other, flush=True)
    await sink.close()

new_loop = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[sys.argv[3]]
with asyncio.Runner(loop_factory=new_loop) as runner:
    runner.run(main(*sys.argv[1:3]))
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_process_that_was_stopped_for_longer_than_the_time_out_keeps_its_connection(
    rabbitmq: RabbitMQServer, unique: str, bind: Any, loop: str
) -> None:
    await RabbitMQSink(settings_for(rabbitmq.url, unique)).topology(apply=True)
    await bind(rabbitmq.url, unique)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", PUBLISH_UNTIL_TOLD, rabbitmq.url, unique, loop),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert await process.stdout.readline() == b"publishing\n"
        for _ in range(2):
            await asyncio.sleep(0.2)
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(2.0)
            process.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.2)
        process.stdin.write(b"stop\n")
        assert await asyncio.wait_for(process.stdout.readline(), 10.0) == b"not confirmed: 0\n"
        await asyncio.wait_for(process.wait(), 10.0)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_it_says_that_it_waits_for_confirms_and_since_when(proxied: Any) -> None:
    sink, proxy, _ = await proxied(publish_timeout=10.0)
    assert sink.stalled is None
    await sink.publish(make_events(5))
    await asyncio.sleep(1.2)
    proxy.blackhole = True
    call = asyncio.create_task(sink.publish(make_events(40)))
    await asyncio.sleep(0)
    assert sink.stalled is None, "it was idle before, and no second has passed since"
    await until(lambda: sink.stalled is not None, "the sink says that nothing is confirmed", limit=3.0)
    assert sink.stalled == "RabbitMQ has confirmed nothing for 1 s; 40 messages wait"
    proxy.blackhole = False
    await call
    assert sink.stalled is None


async def test_it_says_that_rabbitmq_blocks_publishers(
    node: TlsRabbitMQServer, unique: str, open_sink: Any, bind: Any
) -> None:
    sink = await open_sink(node.url)
    await bind(node.url, unique)
    node.alarm(True)
    try:
        call = asyncio.create_task(sink.publish(make_events(3)))
        await until(lambda: sink.stalled is not None, "the sink says that it waits", limit=3.0)
        await until(lambda: sink._connection.blocked is not None, "RabbitMQ says that it blocks")
        assert sink.stalled == "RabbitMQ blocks publishers (low on memory)"
    finally:
        await asyncio.to_thread(node.alarm, False)
    assert list(await call) == [CONFIRMED] * 3
    assert sink.stalled is None


async def test_a_late_return_of_a_call_that_was_cancelled_is_not_taken_for_its_retry(
    rabbitmq: RabbitMQServer, unique: str, open_sink: Any
) -> None:
    async with Proxy(rabbitmq.host, rabbitmq.port) as proxy:
        sink = await open_sink(f"amqp://guest:guest@127.0.0.1:{proxy.port}/")
        event = make_event()
        proxy.blackhole = True
        cancelled = asyncio.create_task(sink.publish([event]))
        await asyncio.sleep(0)
        cancelled.cancel()
        retry = asyncio.create_task(sink.publish([event]))
        await asyncio.sleep(0)
        proxy.blackhole = False
        # Both copies come back: two returns for two copies, so each is certain.
        assert [getattr(outcome, "code", None) for outcome in await retry] == ["unroutable"]
        assert sink.is_open


@pytest.mark.parametrize("name", ["CC", "BCC"])
async def test_headers_by_which_rabbitmq_routes_are_malformed_and_nothing_is_sent(
    rabbitmq: RabbitMQServer, unique: str, open_sink: Any, bind: Any, name: str
) -> None:
    sink = await open_sink(rabbitmq.url)
    queue = await bind(rabbitmq.url, unique)
    events = make_events(5)
    events[2] = make_event(headers={name: "someone", "a": "b"})
    events[3] = make_event(headers={name.lower(): "someone", "b" + name: "x"})
    outcomes = await sink.publish(events)
    refused = outcomes[2]
    assert isinstance(refused, Never)
    assert refused.code == "malformed"
    assert f"the header '{name}'" in refused.reason
    assert [outcomes[n] for n in (0, 1, 3, 4)] == [CONFIRMED] * 4
    assert ids(await drain(queue)) == ids(events[:2] + events[3:])


async def test_what_closes_the_channel_for_its_content_is_called_poison_in_the_brokers_words(
    rabbitmq: RabbitMQServer, unique: str, open_sink: Any, bind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A header of which the encoder should know nothing yet.
    monkeypatch.setattr(frames, "ROUTING_HEADERS", frozenset())
    sink = await open_sink(rabbitmq.url)
    await bind(rabbitmq.url, unique)
    events = make_events(5)
    events[2] = make_event(headers={"CC": "someone"})
    outcomes = await sink.publish(events)
    assert not sink.is_open
    for outcome in outcomes[2:]:
        assert isinstance(outcome, Unknown)
        assert outcome.poisoned
        assert "unacceptable_type_in_header" in outcome.reason
    await sink.open()
    (alone,) = await sink.publish([events[2]])
    assert isinstance(alone, Unknown)
    assert alone.poisoned
    await sink.open()
    assert list(await sink.publish(events[3:])) == [CONFIRMED] * 2


async def test_connections_closed_by_an_operator_leave_true_outcomes(
    node: TlsRabbitMQServer, unique: str, open_sink: Any, bind: Any
) -> None:
    sink = await open_sink(node.url)
    queue = await bind(node.url, unique)
    await queue.channel.close()
    published: list[tuple[Event, Any]] = []

    async def publish_until_closed() -> None:
        while sink.is_open:
            events = make_events(200)
            published.extend(zip(events, await sink.publish(events), strict=True))

    closing = asyncio.create_task(asyncio.to_thread(node.ctl, "close_all_connections", "maintenance"))
    await asyncio.gather(*(publish_until_closed() for _ in range(4)))
    await closing
    assert not sink.is_open
    lost = [outcome for _, outcome in published if outcome is not CONFIRMED]
    assert lost
    assert all("maintenance" in outcome.reason for outcome in lost)
    assert not any(isinstance(outcome, Unknown) and outcome.poisoned for outcome in lost)
    await sink.open()
    arrived = set(ids(await drain(await bind(node.url, unique))))
    assert {event.id for event, outcome in published if outcome is CONFIRMED} <= arrived
    assert not {event.id for event, outcome in published if isinstance(outcome, NotSent | Refused)} & arrived


async def test_a_frozen_broker_is_noticed_by_its_missing_heartbeats(
    node: TlsRabbitMQServer, unique: str, open_sink: Any
) -> None:
    sink = await open_sink(node.url, heartbeat=1.0)
    # In a thread, so that our own heartbeats go on until the broker cannot hear them.
    await asyncio.to_thread(node.freeze)
    try:
        outcomes = await asyncio.wait_for(sink.publish(make_events(2)), 10.0)
    finally:
        node.thaw()
    # Not sent, if it took so long to freeze the broker that its silence was noticed before the publish.
    assert all(isinstance(outcome, Unknown | NotSent) and "heartbeat" in outcome.reason for outcome in outcomes)
    assert not sink.is_open


async def test_heartbeats_keep_an_idle_connection(
    rabbitmq: RabbitMQServer, unique: str, open_sink: Any, bind: Any
) -> None:
    sink = await open_sink(rabbitmq.url, heartbeat=1.0)
    await bind(rabbitmq.url, unique)
    # RabbitMQ drops a client whose heartbeats are missing for two intervals, and says nothing while they come.
    await asyncio.sleep(3.5)
    assert await sink.publish([make_event()]) == [CONFIRMED]


async def test_confirmed_events_survive_a_restart_of_the_broker(
    node: TlsRabbitMQServer, unique: str, open_sink: Any, bind: Any
) -> None:
    sink = await open_sink(node.url)
    await bind(node.url, unique)
    events = make_events(50)
    assert list(await sink.publish(events)) == [CONFIRMED] * 50
    # RabbitMQ 3.10 confirms a binding before its decision to commit it is on disk: one in 29 kills at once lost it.
    await asyncio.to_thread(node.ctl, "eval", "mnesia:dump_log().")
    node.kill()
    with pytest.raises(BrokerUnavailableError):
        await RabbitMQSink(settings_for(node.url, unique)).open()
    node.start()
    await until(lambda: not sink.is_open, "the sink notices")
    await sink.open()
    last = make_event()
    assert await sink.publish([last]) == [CONFIRMED]
    assert ids(await drain(await bind(node.url, unique))) == [*ids(events), last.id]


async def test_tls_with_a_trusted_certificate_carries_events(
    node: TlsRabbitMQServer, unique: str, open_sink: Any, bind: Any
) -> None:
    url = f"amqps://guest:guest@127.0.0.1:{node.tls_port}/"
    sink = await open_sink(url, tls=TlsSettings(ca_file=node.authority.file))
    queue = await bind(node.url, unique)
    events = [make_event(payload=bytes(500_000)), *make_events(2000)]
    assert list(await sink.publish(events)) == [CONFIRMED] * 2001
    assert await drain(queue) == events


async def test_topology_tells_an_exchange_of_another_kind(rabbitmq: RabbitMQServer, unique: str) -> None:
    async with await aio_pika.connect(rabbitmq.url) as connection:
        await (await connection.channel()).declare_exchange(unique, aio_pika.ExchangeType.FANOUT, durable=True)
    sink = RabbitMQSink(settings_for(rabbitmq.url, unique))
    for apply in (False, True):
        (declaration,) = await sink.topology(apply=apply)
        assert (declaration.state, declaration.name) == ("differs", unique)
        assert "fanout" in declaration.detail
