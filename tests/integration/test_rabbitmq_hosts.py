"""Several hosts of one RabbitMQ cluster in a URL: all that connect take the next one where one does not answer."""

import asyncio
import json
from pathlib import Path

import pytest
import structlog.testing

from bridge.brokers.rabbitmq.settings import RabbitMQSettings
from bridge.brokers.rabbitmq.sink import RabbitMQSink
from bridge.errors import BrokerUnavailableError, LoginError
from tests.support.daemons import run_command
from tests.support.proxy import Proxy
from tests.support.refusals import SINK, all_are_refused, everything_that_connects
from tests.support.servers import RabbitMQServer
from tests.support.until import until

pytestmark = pytest.mark.rabbitmq


def settings_of(hosts: str, exchange: str, login: str = "guest:guest") -> RabbitMQSettings:
    table = {"type": "rabbitmq", "url": f"amqp://{login}@{hosts}/", "exchange": exchange}
    return RabbitMQSettings.model_validate(table, context={"sink": SINK})


async def test_the_next_host_is_taken_by_all_that_connect(rabbitmq: RabbitMQServer, unique: str) -> None:
    settings = settings_of(f"127.0.0.1:1,127.0.0.1:{rabbitmq.port}", unique)
    uses = everything_that_connects(settings, unique, apply=True)
    with structlog.testing.capture_logs() as logs:
        for name in sorted(uses, key=lambda name: "topology" not in name):
            await uses[name]()
    passed_over = [line for line in logs if line["event"] == "rabbitmq.host_passed_over"]
    assert {line["host"] for line in passed_over} == {"127.0.0.1:1"}
    assert len(passed_over) >= len(uses)


async def test_a_sink_whose_host_is_gone_goes_on_at_the_next(rabbitmq: RabbitMQServer, unique: str) -> None:
    async with Proxy("127.0.0.1", rabbitmq.port) as first, Proxy("127.0.0.1", rabbitmq.port) as second:
        sink = RabbitMQSink(settings_of(f"127.0.0.1:{first.port},127.0.0.1:{second.port}", unique))
        await sink.topology(apply=True)
        await sink.open()
        assert (first.connections, second.connections) == (1, 0)
        first.refuse = True
        first.cut()
        await until(lambda: not sink.is_open, "the sink notices that its connection is gone")
        await sink.open()
        assert (first.connections, second.connections) == (0, 1)
        await sink.close()


async def test_where_no_host_answers_each_is_named(unique: str) -> None:
    settings = settings_of("127.0.0.1:1,127.0.0.1:2", unique, "guest:hunter2")
    words = ("none of its 2 hosts answers", "127.0.0.1:1 does not answer", "127.0.0.1:2 does not answer")
    await all_are_refused(everything_that_connects(settings, unique), BrokerUnavailableError, *words)


async def test_a_refusal_says_more_than_a_host_that_does_not_answer(rabbitmq: RabbitMQServer, unique: str) -> None:
    settings = settings_of(f"127.0.0.1:{rabbitmq.port},127.0.0.1:1", unique, "guest:hunter2")
    words = (f"RabbitMQ at 127.0.0.1:{rabbitmq.port} refuses the user 'guest'",)
    await all_are_refused(everything_that_connects(settings, unique), LoginError, *words)


async def test_a_host_that_is_silent_holds_up_for_the_limit_of_a_connection_and_no_longer(
    rabbitmq: RabbitMQServer, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.brokers.rabbitmq.connection.CONNECT_LIMIT", 0.3)
    async with Proxy("127.0.0.1", rabbitmq.port) as frozen:
        frozen.blackhole = True
        sink = RabbitMQSink(settings_of(f"127.0.0.1:{frozen.port},127.0.0.1:{rabbitmq.port}", unique))
        await sink.topology(apply=True)
        await asyncio.wait_for(sink.open(), 5)
        assert sink.is_open
        await sink.close()


async def test_a_host_that_is_passed_over_is_told_beside_what_a_command_prints(
    rabbitmq: RabbitMQServer, unique: str, tmp_path: Path
) -> None:
    config = tmp_path / "bridge.toml"
    hosts = f"127.0.0.1:1,127.0.0.1:{rabbitmq.port}"
    config.write_text(
        f'name = "test"\n[sinks.mine]\ntype = "rabbitmq"\nurl = "amqp://guest@{hosts}"\nexchange = "{unique}"\n'
    )
    done = await asyncio.to_thread(run_command, "topology", "--apply", "--json", "--config", str(config))
    assert [declared["state"] for declared in json.loads(done.stdout)] == ["declared"]
    assert "rabbitmq.host_passed_over" in done.stderr
