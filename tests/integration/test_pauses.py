"""`pgbridge pause` and `resume` of a sink, on real servers: what is paused waits and keeps its order, others go on."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.commands import command, json_of
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings
from tests.support.metrics import get
from tests.support.servers import RabbitMQServer, free_port
from tests.support.until import rows_become, until

EMIT = "select bridge.emit('a', n::text, 'key-' || n %% 7) from generate_series(%s::int, %s::int) n order by n"


@pytest.fixture
async def other(rabbitmq: RabbitMQServer, unique: str) -> AsyncIterator[Messages]:
    """What a second sink fills."""
    messages = Messages(rabbitmq.url, f"{unique}-other")
    await messages.open()
    yield messages
    await messages.connection.close()


def two_sinks(dsn: str, messages: Messages, other: Messages, more: str = "") -> str:
    return settings(
        dsn,
        messages,
        f'[sinks.other]\ntype = "rabbitmq"\nurl = "{other.url}"\nexchange = "{other.exchange}"\n'
        f'[[routes]]\ntopic = "#"\nsink = "other"\n[outbox]\npoll_interval = "30s"\n{more}',
    )


def by_key(numbers: list[int]) -> dict[int, list[int]]:
    found = defaultdict(list)
    for number in numbers:
        found[number % 7].append(number)
    return found


async def numbers(messages: Messages, count: int) -> list[int]:
    return [int(message.body) for message in await messages.take(count)]


async def health(port: int) -> dict[str, object]:
    _, text = await get(port, "/health")
    body: dict[str, object] = json.loads(text)
    return body


async def test_a_sink_paused_under_load_reads_no_more_and_loses_and_reorders_nothing_while_another_works_on(
    bridge_database: str, messages: Messages, other: Messages, tmp_path: Path
) -> None:
    port = free_port()
    text = two_sinks(bridge_database, messages, other, f'[observe]\nlisten = "127.0.0.1:{port}"')
    with Daemon(tmp_path, text) as bridge:
        config = ("--config", str(bridge.config))
        bridge.wait_for("bridge.leading")
        emitted = 0

        async def emit() -> None:
            nonlocal emitted
            while emitted < 20_000:
                await execute(bridge_database, EMIT, emitted + 1, emitted + 500)
                emitted += 500

        emitting = asyncio.create_task(emit())
        before = await numbers(messages, 500)
        await command("pause", "--sink", "events", "--why", "the broker moves", *config)
        await asyncio.to_thread(bridge.wait_for, "sink.paused")
        # What was in flight is drained, and then its position stays, whatever else is emitted.
        await until(lambda: settled(port), "what was in flight is settled")
        await emitting
        assert by_key(await numbers(other, 20_000)) == by_key(list(range(1, 20_001))), "the other sink works on"
        await rows_become(bridge_database, "select mark from bridge.cursor where sink = 'other'", [(20_000,)])
        [(mark,)] = await execute(bridge_database, "select mark from bridge.cursor where sink = 'events'")
        assert isinstance(mark, int)
        assert mark < 20_000
        await execute(bridge_database, EMIT, 20_001, 20_500)
        assert by_key(await numbers(other, 500)) == by_key(list(range(20_001, 20_501)))
        await rows_become(bridge_database, "select mark from bridge.cursor where sink = 'other'", [(20_500,)])
        told = await json_of("status", *config)
        sinks = {sink["sink"]: sink for sink in told["bridges"][0]["sinks"]}
        assert sinks["events"]["paused"]["why"] == "the broker moves"
        assert (sinks["other"]["paused"], sinks["other"]["backlog"]) == (None, 0)
        assert sinks["events"]["mark"] == mark
        said = await health(port)
        assert (said["status"], said["problems"]) == ("ok", [])
        assert "sink events: paused since" in str(said["paused"])

        await command("resume", "--sink", "events", *config)
        await asyncio.to_thread(bridge.wait_for, "sink.resumed")
        assert by_key(before + await numbers(messages, 20_000)) == by_key(list(range(1, 20_501)))
        assert (await health(port))["paused"] == []
        assert bridge.stop() == 0


async def settled(port: int) -> bool:
    _, metrics = await get(port, "/metrics")
    return 'pgbridge_events_in_flight{bridge="test",sink="events"} 0.0' in metrics


async def test_a_pause_outlasts_the_bridge_and_its_successor(
    bridge_database: str, messages: Messages, other: Messages, tmp_path: Path
) -> None:
    text = two_sinks(bridge_database, messages, other)
    bridge = Daemon(tmp_path, text)
    config = ("--config", str(bridge.config))
    _, said = await command("pause", "--sink", "events", *config)
    assert "The sink events is paused" in said
    _, said = await command("pause", "--sink", "events", *config)
    assert "was paused already" in said
    for start in range(2):
        with bridge:
            bridge.wait_for("sink.paused")
            bridge.wait_for("bridge.leading")
            await execute(bridge_database, EMIT, start * 100 + 1, start * 100 + 100)
            assert by_key(await numbers(other, 100)) == by_key(list(range(start * 100 + 1, start * 100 + 101)))
            # Else what the other sink had settled comes again after the kill.
            await rows_become(
                bridge_database, "select mark from bridge.cursor where sink = 'other'", [(start * 100 + 100,)]
            )
            bridge.kill()
    [(mark,)] = await execute(bridge_database, "select mark from bridge.cursor where sink = 'events'")
    assert mark == 0
    await command("resume", "--sink", "events", *config)
    with bridge:
        assert by_key(await numbers(messages, 200)) == by_key(list(range(1, 201)))
        await rows_become(bridge_database, "select count(*) from bridge.pause", [(0,)])


async def test_what_cannot_be_paused_is_refused_with_what_can_be(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    config = ("--config", str(Daemon(tmp_path, settings(bridge_database, messages)).config))
    _, said = await command("pause", "--sink", "evnets", *config, expect=2)
    assert "there is no sink 'evnets'; the settings have: events" in said
    _, said = await command("pause", "--worker", "nobody", *config, expect=2)
    assert "there is no worker 'nobody'; the settings have: none" in said
    _, said = await command("pause", *config, expect=2)
    assert "name either --sink or --worker" in said
    _, said = await command("resume", "--sink", "gone", *config)
    assert "The sink gone was not paused" in said
