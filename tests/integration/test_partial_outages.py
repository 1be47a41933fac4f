"""One sink or queue of two in trouble: the other goes on, and what waits is named, kept, and brought later."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aio_pika
import nats
import pytest
from nats.js.api import DiscardPolicy, RetentionPolicy, StreamConfig

from bridge.brokers.nats.settings import NatsSettings
from bridge.brokers.nats.sink import NatsSink
from tests.support.commands import command, json_of
from tests.support.daemons import Daemon
from tests.support.messages import Messages, drain, execute, settings
from tests.support.metrics import get
from tests.support.servers import NatsServer, RabbitMQServer, free_port
from tests.support.until import rows_become, until
from tests.support.unwrapped import unwrapped

EMIT = "select bridge.emit(%s, n::text, %s || n %% 5) from generate_series(%s::int, %s::int) n order by n"


@dataclass
class Queues:
    """Two queues of one exchange: `free.#` takes everything, `full.#` holds one message and refuses more."""

    free: aio_pika.abc.AbstractQueue
    full: aio_pika.abc.AbstractQueue

    async def take(self, queue: aio_pika.abc.AbstractQueue, count: int) -> list[int]:
        """The numbers of the next `count` messages; a queue that is full has room again after each."""
        numbers: list[int] = []
        async with asyncio.timeout(60), queue.iterator() as messages:
            async for message in messages:
                await message.ack()
                numbers.append(int(message.body))
                if len(numbers) >= count:
                    break
        return numbers


@asynccontextmanager
async def two_queues(url: str, exchange_name: str) -> AsyncIterator[Queues]:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.set_qos(1000)
        exchange = await channel.declare_exchange(exchange_name, aio_pika.ExchangeType.TOPIC, durable=True)
        free = await channel.declare_queue(f"{exchange_name}-free", durable=True)
        await free.bind(exchange, "free.#")
        bounds: dict[str, aio_pika.abc.FieldValue] = {"x-max-length": 1, "x-overflow": "reject-publish"}
        full = await channel.declare_queue(f"{exchange_name}-full", durable=True, arguments=bounds)
        await full.bind(exchange, "full.#")
        yield Queues(free, full)


def by_key(numbers: list[int]) -> list[list[int]]:
    return [[number for number in numbers if number % 5 == key] for key in range(5)]


async def test_a_full_queue_stops_its_keys_and_nothing_else_and_is_named(
    bridge_database: str, rabbitmq: RabbitMQServer, unique: str, tmp_path: Path
) -> None:
    port = free_port()
    async with two_queues(rabbitmq.url, unique) as queues:
        text = settings(
            bridge_database,
            Messages(rabbitmq.url, unique),
            f'[relay]\nretry_max = "200ms"\n[observe]\nlisten = "127.0.0.1:{port}"',
        )
        with Daemon(tmp_path, text) as bridge:
            bridge.wait_for("bridge.leading")
            await execute(bridge_database, EMIT, "full.a", "full", 1, 100)
            bridge.wait_for("sink.refusing")
            await execute(bridge_database, EMIT, "free.a", "free", 1, 20_000)
            assert by_key(await queues.take(queues.free, 20_000)) == by_key(list(range(1, 20_001)))

            # What waits is named, since when and why.
            async def is_named() -> bool:
                status, body = await get(port, "/health")
                return status == 503 and "events are held, of the topic 'full.a', since 20" in body

            await until(is_named)
            await rows_become(
                bridge_database,
                "select held > 90, problem like '%%are held, of the topic ''full.a''%%', problem_since is not null "
                "from bridge.status()",
                [(True, True, True)],
            )
            (told,) = (await json_of("status", "--config", str(bridge.config)))["bridges"]
            assert told["sinks"][0]["mark"] > 20_000
            text, _ = await command("status", "--config", str(bridge.config))
            assert "of them held" in text
            assert "a queue is full" in text
            _, metrics = await get(port, "/metrics")
            held = next(line for line in metrics.splitlines() if line.startswith("pgbridge_events_held{"))
            assert float(held.split()[-1]) > 90

            taken = await queues.take(queues.full, 100)
            await rows_become(bridge_database, "select held, backlog from bridge.status()", [(0, 0)])
            await until(lambda: any(line["action"] == "sink.restored" for line in bridge.lines()))
            assert bridge.stop() == 0
        # What was in flight together when the first was refused may have overtaken; all that came later did not.
        assert sorted(taken) == list(range(1, 101))


STUCK_SINK = """
[sinks.stuck]
type = "rabbitmq"
url = "{url}"
exchange = "{exchange}"
[[routes]]
topic = "stuck.#"
sink = "stuck"
[observe]
listen = "127.0.0.1:{port}"
"""


async def test_a_queue_that_never_answers_holds_up_only_the_sink_that_its_topic_has(
    bridge_database: str, rabbitmq: RabbitMQServer, unique: str, tmp_path: Path
) -> None:
    """As a quorum queue without a majority: RabbitMQ stops reading a connection that publishes to it."""
    port = free_port()
    async with await aio_pika.connect(rabbitmq.url) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(unique, aio_pika.ExchangeType.TOPIC, durable=True)
        queues = []
        for name in ("free", "stuck"):
            queue = await channel.declare_queue(f"{unique}-{name}", durable=True, arguments={"x-queue-type": "quorum"})
            await queue.bind(exchange, f"{name}.#")
            queues.append(queue)
        both = Queues(*queues)
        text = settings(
            bridge_database,
            Messages(rabbitmq.url, unique),
            STUCK_SINK.format(url=rabbitmq.url, exchange=unique, port=port),
        )
        text = text.replace('topic = "#"', 'topic = "free.#"')
        with Daemon(tmp_path, text) as bridge:
            bridge.wait_for("bridge.leading")
            await asyncio.to_thread(queue_process, rabbitmq, f"{unique}-stuck", "suspend")
            try:
                await execute(bridge_database, EMIT, "stuck.a", "stuck", 1, 2_000)
                await execute(bridge_database, EMIT, "free.a", "free", 1, 20_000)
                assert by_key(await both.take(both.free, 20_000)) == by_key(list(range(1, 20_001)))
                await rows_become(
                    bridge_database,
                    "select sink, backlog > 0, problem like '%%confirmed nothing for%%' from bridge.status() "
                    "where sink <> '' order by sink",
                    [("events", False, None), ("stuck", True, True)],
                )
                status, body = await get(port, "/health")
                assert (status, "RabbitMQ has confirmed nothing for" in body) == (503, True)
            finally:
                await asyncio.to_thread(queue_process, rabbitmq, f"{unique}-stuck", "resume")
            assert by_key(await both.take(both.full, 2_000)) == by_key(list(range(1, 2_001)))
            await rows_become(bridge_database, "select distinct backlog, problem from bridge.status()", [(0, None)])
            assert bridge.stop() == 0


def queue_process(server: RabbitMQServer, queue: str, verb: str) -> None:
    """Suspends or resumes the process of a queue: it takes messages and answers nothing."""
    server.ctl(
        "eval",
        f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{queue}">>)), '
        f"sys:{verb}(amqqueue:get_pid(Q)).",
    )


async def test_where_a_keys_events_go_one_by_one_not_even_the_first_refusal_lets_one_overtake(
    bridge_database: str, rabbitmq: RabbitMQServer, unique: str, tmp_path: Path
) -> None:
    async with two_queues(rabbitmq.url, unique) as queues:
        text = settings(bridge_database, Messages(rabbitmq.url, unique), '[relay]\nretry_max = "100ms"')
        text = text.replace(f'exchange = "{unique}"', f'exchange = "{unique}"\npipelined = false')
        with Daemon(tmp_path, text) as bridge:
            bridge.wait_for("bridge.leading")
            await execute(bridge_database, EMIT, "full.a", "full", 1, 200)
            taken = await queues.take(queues.full, 200)
            assert by_key(taken) == by_key(list(range(1, 201)))
            assert bridge.stop() == 0


async def test_what_is_held_survives_a_crash_and_comes_before_what_follows_in_its_key(
    bridge_database: str, rabbitmq: RabbitMQServer, unique: str, tmp_path: Path
) -> None:
    async with two_queues(rabbitmq.url, unique) as queues:
        text = settings(bridge_database, Messages(rabbitmq.url, unique), '[relay]\nretry_max = "100ms"')
        text = text.replace(f'exchange = "{unique}"', f'exchange = "{unique}"\npipelined = false')
        with Daemon(tmp_path, text) as bridge:
            bridge.wait_for("bridge.leading")
            await execute(bridge_database, EMIT, "full.a", "full", 1, 50)
            await execute(bridge_database, EMIT, "free.a", "free", 1, 100)
            await queues.take(queues.free, 100)
            await rows_become(bridge_database, "select held >= 45, mark = 150 from bridge.status()", [(True, True)])
            bridge.kill()
            await execute(bridge_database, EMIT, "full.a", "full", 51, 60)
            bridge.start()
            bridge.wait_for("bridge.leading")
            taken = await queues.take(queues.full, 60)
            assert by_key(list(dict.fromkeys(taken))) == by_key(list(range(1, 61)))
            # The 100 others are behind the position: none of them comes again.
            await rows_become(bridge_database, "select held, backlog from bridge.status()", [(0, 0)])
            assert await drain(queues.free) == []
            assert bridge.stop() == 0


async def test_a_nats_stream_at_its_limit_gets_every_key_in_order_without_being_told(
    bridge_database: str, nats_server: NatsServer, unique: str, tmp_path: Path
) -> None:
    """It refuses one event and takes a later one as soon as there is room: 11,984 of 20,000 were out of order."""
    client = await nats.connect(nats_server.url)
    try:
        jetstream = client.jetstream()
        await jetstream.add_stream(
            StreamConfig(
                name=unique,
                subjects=[f"{unique}.>"],
                max_msgs=20,
                discard=DiscardPolicy.NEW,
                retention=RetentionPolicy.WORK_QUEUE,
            )
        )
        text = f"""
name = "test"
[postgres]
dsn = "{bridge_database}"
[relay]
retry_initial = "5ms"
retry_max = "50ms"
[sinks.events]
type = "nats"
url = "{nats_server.url}"
stream = "{unique}"
[[routes]]
topic = "#"
sink = "events"
"""
        with Daemon(tmp_path, text) as bridge:
            bridge.wait_for("bridge.leading")
            await execute(bridge_database, EMIT, "a", "key", 1, 2000)
            consumer = await jetstream.pull_subscribe(f"{unique}.>", durable="reader")
            taken: list[int] = []
            async with asyncio.timeout(60):
                while len(taken) < 2000:
                    for message in await consumer.fetch(10, timeout=20):
                        taken.append(int(message.data))
                        await message.ack_sync()
            assert by_key(taken) == by_key(list(range(1, 2001)))
            assert any(line["action"] == "sink.refusing" for line in bridge.lines()), "the limit must have been met"
            assert bridge.stop() == 0
    finally:
        await client.close()


TWO_SINKS = """
[relay]
events_in_flight = 500
held_events = 500
[sinks.other]
type = "nats"
url = "{url}"
stream = "{stream}"
publish_timeout = "2s"
[[routes]]
topic = "#"
sink = "other"
"""


async def stored(server: NatsServer, stream: str) -> int:
    """Messages in a stream."""
    client = await nats.connect(server.url)
    try:
        return int((await client.jetstream().stream_info(stream)).state.messages)
    finally:
        await client.close()


async def test_a_dead_sink_holds_up_no_other_also_through_a_restart_and_gets_everything_later(
    bridge_database: str, messages: Messages, server_folder: Path, unique: str, tmp_path: Path
) -> None:
    """Through many times the events that may be in flight."""
    with NatsServer(server_folder) as other:
        await NatsSink(NatsSettings(type="nats", url=other.url, stream=unique)).topology(apply=True)
        text = settings(bridge_database, messages, TWO_SINKS.format(url=other.url, stream=unique))
        with Daemon(tmp_path, text) as bridge:
            bridge.wait_for("bridge.leading")
            await execute(bridge_database, EMIT, "a", "key", 1, 100)
            await messages.take(100)
            await asyncio.to_thread(other.kill)
            await execute(bridge_database, EMIT, "a", "key", 101, 6_000)
            taken = await messages.take(5_900)
            assert by_key([int(message.body) for message in taken]) == by_key(list(range(101, 6_001)))
            bridge.kill()
            # It starts with whatever sinks are there.
            bridge.start()
            bridge.wait_for("bridge.leading")
            bridge.wait_for("sink.lost")
            await execute(bridge_database, EMIT, "a", "key", 6_001, 6_100)
            taken = await messages.take_distinct(100)
            assert max(int(message.body) for message in taken) == 6_100
            await rows_become(
                bridge_database,
                "select sink, backlog > 0, problem is not null from bridge.status() order by sink",
                [("events", False, False), ("other", True, True)],
            )
            await asyncio.to_thread(other.start)
            await rows_become(bridge_database, "select backlog from bridge.status()", [(0,), (0,)])
            assert await stored(other, unique) >= 6_100
            assert bridge.stop() == 0


async def test_a_start_without_any_sink_fails_and_says_why(bridge_database: str, unique: str, tmp_path: Path) -> None:
    text = settings(bridge_database, Messages(f"amqp://guest:guest@127.0.0.1:{free_port()}/", unique))
    config = str(Daemon(tmp_path, text).config)
    _, said = await command("run", "--config", config, expect=69)
    assert "sinks.events.url" in said


async def test_a_start_without_any_sink_goes_on_where_channels_would_be_missed(
    bridge_database: str, rabbitmq: RabbitMQServer, unique: str, tmp_path: Path
) -> None:
    dead = Messages(f"amqp://guest:guest@127.0.0.1:{free_port()}/", unique)
    with Daemon(tmp_path, settings(bridge_database, dead, '[channels]\nlisten = ["orders"]')) as bridge:
        bridge.wait_for("channels.listening")
        await execute(bridge_database, "select pg_notify('orders', 'heard')")
        await rows_become(bridge_database, "select payload from bridge.outbox", [("heard",)])


# Positions and routes


async def positions(dsn: str) -> dict[object, object]:
    rows = await execute(dsn, "select sink, mark from bridge.cursor order by sink")
    return dict(rows)  # type: ignore[arg-type]


def routes(dsn: str, messages: Messages, *pairs: tuple[str, str], sinks: dict[str, str], more: str = "") -> str:
    """Settings with these sinks (name: more lines) on one exchange, and these routes."""
    parts = [f'name = "test"\n{more}\n[postgres]\ndsn = "{dsn}"\n']
    for name, lines in sinks.items():
        parts.append(
            f'[sinks.{name}]\ntype = "rabbitmq"\nurl = "{messages.url}"\nexchange = "{messages.exchange}"\n{lines}\n'
        )
    parts += [f'[[routes]]\ntopic = "{topic}"\nsink = "{sink}"\n' for topic, sink in pairs]
    return "".join(parts)


@pytest.mark.parametrize(
    ("start", "expected"),
    [("", []), ('start = "now"', []), ('start = "beginning"', list(range(1, 11)))],
    ids=["default", "now", "beginning"],
)
async def test_a_new_sink_of_a_known_bridge_starts_where_it_is_told(
    bridge_database: str, messages: Messages, tmp_path: Path, start: str, expected: list[int]
) -> None:
    with Daemon(tmp_path / "one", routes(bridge_database, messages, ("#", "one"), sinks={"one": ""})) as bridge:
        bridge.wait_for("bridge.leading")
        # A new bridge begins at the beginning.
        await execute(bridge_database, EMIT, "a", "key", 1, 10)
        await messages.take(10)
        assert bridge.stop() == 0
    text = routes(bridge_database, messages, ("#", "one"), ("#", "two"), sinks={"one": "", "two": start})
    with Daemon(tmp_path / "two", text) as bridge:
        said = bridge.wait_for("outbox.position")
        assert said["sink"] == "two"
        bridge.wait_for("bridge.leading")
        await execute(bridge_database, EMIT, "a", "key", 11, 20)
        taken = [int(message.body) for message in await messages.take(20 + len(expected))]
        assert sorted(taken) == sorted([*expected, *range(11, 21), *range(11, 21)])
        assert bridge.stop() == 0


async def test_a_sink_whose_position_was_removed_by_hand_begins_at_the_beginning(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    """It is not new: what it had not published would be skipped."""
    text = routes(bridge_database, messages, ("a", "one"), ("b", "two"), sinks={"one": "", "two": ""})
    with Daemon(tmp_path, text) as bridge:
        bridge.wait_for("bridge.leading")
        await execute(bridge_database, EMIT, "a", "key", 1, 5)
        await messages.take(5)
        assert bridge.stop() == 0
        await execute(bridge_database, "delete from bridge.cursor where sink = 'two'")
        await execute(bridge_database, EMIT, "b", "key", 6, 10)
        bridge.start()
        said = bridge.wait_for("outbox.position")
        assert (said["sink"], said["begins"]) == ("two", "removed")
        assert [int(message.body) for message in await messages.take(5)] == list(range(6, 11))
        assert bridge.stop() == 0


async def test_a_sink_with_a_new_name_goes_on_where_the_old_one_was(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    with Daemon(tmp_path / "one", routes(bridge_database, messages, ("#", "one"), sinks={"one": ""})) as bridge:
        bridge.wait_for("bridge.leading")
        await execute(bridge_database, EMIT, "a", "key", 1, 10)
        await messages.take(10)
        assert bridge.stop() == 0
    await execute(bridge_database, EMIT, "a", "key", 11, 20)
    with Daemon(tmp_path / "two", routes(bridge_database, messages, ("#", "two"), sinks={"two": ""})) as bridge:
        assert bridge.wait_for("outbox.position")["begins"] == "renamed"
        assert [int(message.body) for message in await messages.take(10)] == list(range(11, 21))
        assert bridge.stop() == 0


async def test_a_topic_that_moves_to_another_sink_is_not_lost_on_the_way(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    """Its old sink had not published it, and its new one has read past it."""
    dead = f"amqp://guest:guest@127.0.0.1:{free_port()}/"
    text = routes(bridge_database, messages, ("a", "one"), ("b", "two"), sinks={"one": "", "two": ""})
    broken = text.replace(messages.url, dead, 1)
    with Daemon(tmp_path / "before", broken) as bridge:
        bridge.wait_for("bridge.leading")
        await execute(bridge_database, EMIT, "a", "key", 1, 10)
        await execute(bridge_database, EMIT, "b", "key", 11, 20)
        assert [int(message.body) for message in await messages.take(10)] == list(range(11, 21))
        await rows_become(bridge_database, "select mark from bridge.cursor where sink = 'two'", [(20,)])
        bridge.kill()
    moved = routes(bridge_database, messages, ("a", "two"), ("b", "two"), sinks={"one": "", "two": ""})
    with Daemon(tmp_path / "after", moved.replace(messages.url, dead, 1)) as bridge:
        said = bridge.wait_for("outbox.position")
        assert (said["sink"], said["begins"]) == ("two", "routes")
        # Repeats rather than loses: what `two` had published is published again.
        taken = [int(message.body) for message in await messages.take_distinct(20)]
        assert set(taken) == set(range(1, 21))
        bridge.kill()


async def test_what_no_route_takes_is_dead_lettered_once(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    text = routes(bridge_database, messages, ("a.#", "one"), ("*.b", "two"), sinks={"one": "", "two": ""})
    with Daemon(tmp_path, text.replace('name = "test"\n', 'name = "test"\n')) as bridge:
        bridge.wait_for("bridge.leading")
        for topic in ("a", "a.x", "c.b", "c", "a.b", "b.c.d"):
            await execute(bridge_database, "select bridge.emit(%s, 'x'::text)", topic)
        taken = sorted(str(message.routing_key) for message in await messages.take(5))
        assert taken == ["a", "a.b", "a.b", "a.x", "c.b"]
        letters = "select topic, sink, code from bridge.dead_letter order by topic"
        await rows_become(bridge_database, letters, [("b.c.d", None, "no_route"), ("c", None, "no_route")])
        assert bridge.stop() == 0
        bridge.start()
        bridge.wait_for("bridge.leading")
        await rows_become(bridge_database, letters, [("b.c.d", None, "no_route"), ("c", None, "no_route")])
        assert bridge.stop() == 0


async def test_a_bridge_of_the_version_before_goes_on_with_every_sink_where_it_was(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    await execute(bridge_database, EMIT, "a", "key", 1, 10)
    await execute(
        bridge_database,
        "insert into bridge.cursor (name, sink, mark, gaps, horizon, system_identifier) "
        "select 'test', '*', 7, '{[3,4)}', '3', system_identifier from pg_control_system()",
    )
    text = routes(bridge_database, messages, ("a", "one"), ("a", "two"), sinks={"one": "", "two": ""})
    with Daemon(tmp_path, text) as bridge:
        taken = sorted(int(message.body) for message in await messages.take(8))
        assert taken == [3, 3, 8, 8, 9, 9, 10, 10]
        await rows_become(bridge_database, "select sink from bridge.cursor order by sink", [("",), ("one",), ("two",)])
        assert bridge.stop() == 0


# The sequence


async def test_a_log_that_was_emptied_and_numbers_anew_is_read_from_its_beginning(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    with Daemon(tmp_path, settings(bridge_database, messages)) as bridge:
        bridge.wait_for("bridge.leading")
        await execute(bridge_database, EMIT, "a", "key", 1, 50)
        await messages.take(50)
        assert bridge.stop() == 0
        await execute(bridge_database, "truncate bridge.outbox restart identity")
        await execute(bridge_database, EMIT, "a", "key", 101, 110)
        bridge.start()
        assert bridge.wait_for("outbox.position")["begins"] == "restarted"
        assert [int(message.body) for message in await messages.take(10)] == list(range(101, 111))
        await execute(bridge_database, EMIT, "a", "key", 111, 120)
        assert [int(message.body) for message in await messages.take(10)] == list(range(111, 121))
        assert bridge.stop() == 0


async def test_a_sequence_behind_its_log_is_told_with_its_mend_and_nothing_is_lost(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    """As after logical replication to a new server, which carries no sequences."""
    config = Daemon(tmp_path, settings(bridge_database, messages)).config
    await execute(bridge_database, EMIT, "a", "key", 1, 50)
    await execute(bridge_database, "select setval('bridge.outbox_id_seq', 20)")
    for name in ("run", "check"):
        out, said = await command(name, "--config", str(config), expect=69)
        out = unwrapped(out)
        assert "the sequence bridge.outbox_id_seq is at 20, and the log already has the id 50" in out + said
        assert "select setval('bridge.outbox_id_seq', 50)" in out + said
    await execute(bridge_database, "select setval('bridge.outbox_id_seq', 50)")
    await execute(bridge_database, EMIT, "a", "key", 51, 60)
    with Daemon(tmp_path, settings(bridge_database, messages)) as bridge:
        assert [int(message.body) for message in await messages.take(60)] == list(range(1, 61))
        assert bridge.stop() == 0


async def test_a_position_that_is_removed_under_a_running_bridge_ends_its_session_with_that_reason(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    with Daemon(tmp_path, settings(bridge_database, messages)) as bridge:
        bridge.wait_for("bridge.leading")
        await execute(bridge_database, "delete from bridge.cursor")
        await execute(bridge_database, EMIT, "a", "key", 1, 10)
        said = bridge.wait_for("postgres.refusing")
        assert "somebody removed the position of the sink 'events'" in said["reason"]
        taken = await messages.take_distinct(10)
        assert {int(message.body) for message in taken} == set(range(1, 11))
        assert bridge.stop() == 0
