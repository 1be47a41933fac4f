"""RabbitMQ's own ways with a publisher: returns, alarms, closed channels, lost connections, TLS."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aio_pika
import pytest
import uvloop
from pydantic import SecretStr

from bridge.brokers.contract import CONFIRMED, Never, NotSent, Refused, Unknown
from bridge.brokers.rabbitmq import publisher
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
    assert all(isinstance(outcomes[n], Unknown) or outcomes[n] is CONFIRMED for n in (0, 1, 3, 4))
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


async def test_a_time_out_while_blocked_leaves_the_unsent_not_sent_and_the_sent_unknown(
    node: TlsRabbitMQServer, unique: str, open_sink: Any, bind: Any
) -> None:
    sink = await open_sink(node.url, publish_timeout=1.0)
    queue = await bind(node.url, unique)
    sent, unsent = make_event(), make_event()
    node.alarm(True)
    try:
        first = asyncio.create_task(sink.publish([sent]))
        await until(lambda: sink._connection.blocked is not None, "RabbitMQ says that it blocks")
        second = await sink.publish([unsent])
        assert isinstance(second[0], NotSent)
        assert "memory" in second[0].reason
        assert isinstance((await first)[0], Unknown)
        assert sink.is_open
    finally:
        node.alarm(False)
    await until(lambda: sink._connection.blocked is None, "RabbitMQ says that it goes on")
    assert await sink.publish([unsent]) == [CONFIRMED]
    assert ids(await drain(queue)) == [sent.id, unsent.id]


async def test_a_broker_that_reads_nothing_stops_the_writer_and_time_runs_out(
    rabbitmq: RabbitMQServer, unique: str, open_sink: Any, bind: Any
) -> None:
    await RabbitMQSink(settings_for(rabbitmq.url, unique)).topology(apply=True)
    await bind(rabbitmq.url, unique)
    async with Proxy(rabbitmq.host, rabbitmq.port) as proxy:
        sink = await open_sink(f"amqp://guest:guest@127.0.0.1:{proxy.port}/", publish_timeout=1.0)
        proxy.blackhole = True
        batches = [[make_event(n, payload=bytes(1_000_000)) for n in range(50)] for _ in range(4)]
        outcomes = await asyncio.gather(*(sink.publish(batch) for batch in batches))
        assert isinstance(outcomes[0][0], Unknown)
        assert isinstance(outcomes[3][49], NotSent)
        assert sink._connection._transport.get_write_buffer_size() < 3_000_000


async def test_publishes_that_are_never_confirmed_are_bounded_by_dropping_the_connection(
    rabbitmq: RabbitMQServer, unique: str, open_sink: Any, bind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "UNCONFIRMED_LIMIT", 25)
    await RabbitMQSink(settings_for(rabbitmq.url, unique)).topology(apply=True)
    await bind(rabbitmq.url, unique)
    async with Proxy(rabbitmq.host, rabbitmq.port) as proxy:
        sink = await open_sink(f"amqp://guest:guest@127.0.0.1:{proxy.port}/", publish_timeout=0.1)
        proxy.blackhole = True
        events = make_events(10)
        for tries in range(3):
            assert sink.is_open, tries
            assert all(isinstance(outcome, Unknown) for outcome in await sink.publish(events))
        assert not sink.is_open


async def test_a_late_return_of_a_publish_that_timed_out_is_not_taken_for_its_retry(
    rabbitmq: RabbitMQServer, unique: str, open_sink: Any
) -> None:
    async with Proxy(rabbitmq.host, rabbitmq.port) as proxy:
        sink = await open_sink(f"amqp://guest:guest@127.0.0.1:{proxy.port}/", publish_timeout=1.0)
        event = make_event()
        proxy.blackhole = True
        assert isinstance((await sink.publish([event]))[0], Unknown)
        retry = asyncio.create_task(sink.publish([event]))
        await asyncio.sleep(0)
        proxy.blackhole = False
        # Both copies come back: two returns for two copies, so each is certain.
        assert [getattr(outcome, "code", None) for outcome in await retry] == ["unroutable"]
        assert sink.is_open


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
    sink = await open_sink(url, tls=TlsSettings(ca_file=node.certificate.file))
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
