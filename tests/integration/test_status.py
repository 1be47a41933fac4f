"""`pgbridge status`, the metrics and the health of a daemon, on real servers."""

import asyncio
import json
import re
from pathlib import Path

import psycopg
import pytest

from bridge.process.metrics import CODES
from tests.support.commands import command, json_of
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings
from tests.support.metrics import get
from tests.support.owner import owner_without_rights
from tests.support.servers import NatsServer, RabbitMQServer, free_port
from tests.support.until import rows_become, until


async def test_status_tells_of_the_leader_and_that_nothing_waits(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    with Daemon(tmp_path, settings(bridge_database, messages)) as bridge:
        bridge.wait_for("bridge.leading")
        await execute(bridge_database, "select bridge.emit('a', 'x') from generate_series(1, 10)")
        await messages.take(10)
        await rows_become(bridge_database, "select backlog from bridge.status()", [(0,)])
        told = await json_of("status", "--config", str(bridge.config))
        (one,) = told["bridges"]
        assert bridge.process is not None
        assert one["name"] == "test"
        assert one["leader"].endswith(f":{bridge.process.pid}")
        assert one["dead_letters"] == 0
        (sink,) = one["sinks"]
        assert (sink["sink"], sink["mark"], sink["backlog"], sink["held"]) == ("events", 10, 0, 0)
        assert (sink["oldest_unsent_seconds"], sink["problem"]) == (None, None)
        assert 0 <= told["guards"]["notification_queue_usage"] < 0.1
        text, _ = await command("status", "--config", str(bridge.config))
        assert "\x1b" not in text
        assert "backlog           0 events" in text
        bridge.kill()
    # Its row still names it, but its session is gone.
    await rows_become(bridge_database, "select leader from bridge.status()", [(None,)])
    _, said = await command("status", "--config", str(bridge.config), expect=1)
    assert "No bridge named 'test' is running" in said


async def test_status_shows_what_waits_and_what_endangers_the_log(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    config = str(Daemon(tmp_path, settings(bridge_database, messages, '[outbox]\nretention = "1h"')).config)
    await execute(
        bridge_database,
        "insert into bridge.cursor (name, sink, mark, gaps, old_gaps, held, horizon, system_identifier, patterns)"
        " values ('forgotten', 'a', 5, '{[3,4)}', '{[2,3)}', '{[5,6)}', '3', 1, '{#}'),"
        " ('test', 'b', 7, '{}', '{}', '{}', '3', 1, '{#}'), ('test', 'c', 7, '{}', '{}', '{}', '3', 1, '{nothing.#}')",
    )
    await execute(bridge_database, "select bridge.emit('a', 'x') from generate_series(1, 9)")
    await execute(bridge_database, "update bridge.outbox set created_at = now() - interval '2 hours' where id = 2")
    async with await psycopg.AsyncConnection.connect(bridge_database) as holder:
        await holder.execute("select bridge.emit('held', 'open')")
        holder_pid = holder.info.backend_pid
        told = await json_of("status", "--config", config, expect=1)
        text, _ = await command("status", "--config", config, expect=1)
    forgotten, own = told["bridges"]
    assert forgotten["name"] == "forgotten"
    (place,) = forgotten["sinks"]
    assert (place["backlog"], place["gaps"], place["held"]) == (7, 2, 1)
    assert 7200 <= place["oldest_unsent_seconds"] < 7300
    # What a sink does not take is no backlog of it.
    assert [(sink["backlog"], sink["backlog_exact"]) for sink in own["sinks"]] == [(2, True), (0, True)]
    guards = told["guards"]
    assert f"pid {holder_pid}" in guards["oldest_transaction"]
    assert guards["held_back_by"] == ["forgotten"]
    assert "bridge forgotten has not settled it" in text


async def test_a_prepared_transaction_is_named_where_the_schemas_owner_sees_no_sessions(
    bridge_database: str, messages: Messages, unique: str, tmp_path: Path
) -> None:
    config = str(Daemon(tmp_path, settings(bridge_database, messages)).config)
    with psycopg.connect(bridge_database, autocommit=True) as holder:
        for statement in ("begin", "select bridge.emit('held', 'open')", f"prepare transaction '{unique}'"):
            holder.execute(statement.encode())
        try:
            with owner_without_rights(bridge_database, f"{unique}_owner"):
                text, _ = await command("status", "--config", config, expect=1)
        finally:
            holder.execute(f"rollback prepared '{unique}'".encode())
    assert f"prepared transaction '{unique}'" in text
    assert "those of others are not known: grant pg_read_all_stats" in " ".join(text.split())


async def test_watching_tells_rates(bridge_database: str, messages: Messages, tmp_path: Path) -> None:
    with Daemon(tmp_path, settings(bridge_database, messages)) as bridge:
        bridge.wait_for("bridge.leading")
        looks = await asyncio.create_subprocess_exec(
            *bridge.command[:3], "status", "--watch", "--json", "--interval", "0.3", *bridge.command[4:],
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert looks.stdout is not None
        try:
            async with asyncio.timeout(30):
                assert json.loads(await looks.stdout.readline())["bridges"][0]["sinks"][0]["emitted_per_second"] is None
                await execute(bridge_database, "select bridge.emit('a', 'x') from generate_series(1, 300)")
                rate = 0.0
                while not rate:
                    rate = json.loads(await looks.stdout.readline())["bridges"][0]["sinks"][0]["emitted_per_second"]
                assert 100 < rate < 1100
        finally:
            looks.kill()
            await looks.wait()


async def test_an_unreachable_database_ends_status_with_69(messages: Messages, tmp_path: Path) -> None:
    dsn = f"postgresql://nobody@127.0.0.1:{free_port()}/none"
    config = str(Daemon(tmp_path, settings(dsn, messages)).config)
    await command("status", "--config", config, expect=69)


async def until_health(port: int, status: int, role: str) -> dict[str, object]:
    """What /health says once it has this status and role."""
    body: dict[str, object] = {}

    async def is_so() -> bool:
        nonlocal body
        answered, text = await get(port, "/health")
        body = json.loads(text)
        return (answered, body["role"]) == (status, role)

    await until(is_so, f"/health answers {status} as {role}")
    return body


async def test_health_and_metrics_of_leader_and_standby(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    ports = [free_port(), free_port()]
    texts = [settings(bridge_database, messages, f'[observe]\nlisten = "127.0.0.1:{port}"') for port in ports]
    with Daemon(tmp_path / "one", texts[0]) as one:
        one.wait_for("bridge.leading")
        with Daemon(tmp_path / "two", texts[1]) as two:
            two.wait_for("bridge.started")
            assert (await until_health(ports[0], 200, "leading"))["problems"] == []
            assert (await until_health(ports[1], 200, "standby"))["problems"] == []
            await execute(bridge_database, "select bridge.emit('a', 'x') from generate_series(1, 50)")
            await messages.take(50)
            await rows_become(bridge_database, "select backlog from bridge.status()", [(0,)])
            _, metrics = await get(ports[0], "/metrics")
            for line in (
                'pgbridge_leading{bridge="test"} 1.0',
                'pgbridge_database_up{bridge="test"} 1.0',
                'pgbridge_sink_up{bridge="test",sink="events"} 1.0',
                'pgbridge_events_read_total{bridge="test",sink="events"} 50.0',
                'pgbridge_events_confirmed_total{bridge="test",sink="events"} 50.0',
                'pgbridge_events_in_flight{bridge="test",sink="events"} 0.0',
                'pgbridge_events_held{bridge="test",sink="events"} 0.0',
                'pgbridge_bytes_in_flight{bridge="test",sink="events"} 0.0',
                'pgbridge_backlog_events{bridge="test",sink="events"} 0.0',
            ):
                assert f"\n{line}\n" in metrics
            # What has not risen is there, too, for whoever computes a rate.
            _, metrics = await get(ports[1], "/metrics")
            for code in CODES:
                name = f'dead_lettered_total{{bridge="test",code="{code}",sink="events"}}'
                assert f"\npgbridge_events_{name} 0.0\n" in metrics
            assert '\npgbridge_events_dead_lettered_total{bridge="test",code="no_route",sink=""} 0.0\n' in metrics
            for name in ("events_read_total", "events_confirmed_total", "events_retried_total", "events_held"):
                assert f'\npgbridge_{name}{{bridge="test",sink="events"}} 0.0\n' in metrics
            assert (await get(ports[0], "/elsewhere"))[0] == 404
            one.kill()
            assert (await until_health(ports[1], 200, "leading"))["status"] == "ok"


async def test_health_names_a_broker_that_is_gone_and_recovers_while_idle(
    bridge_database: str, server_folder: Path, unique: str, tmp_path: Path
) -> None:
    port = free_port()
    with RabbitMQServer(server_folder) as broker:
        own = Messages(broker.url, unique)
        await own.open()
        await own.connection.close()
        with Daemon(tmp_path, settings(bridge_database, own, f'[observe]\nlisten = "127.0.0.1:{port}"')) as bridge:
            bridge.wait_for("bridge.leading")
            await asyncio.to_thread(broker.kill)
            assert "'sink events: " in str((await until_health(port, 503, "leading"))["problems"])
            await asyncio.to_thread(bridge.wait_for, "sink.lost")
            problems = (await until_health(port, 503, "leading"))["problems"]
            assert re.fullmatch(r"\['sink events: lost for \d s: .+'\]", str(problems))
            await asyncio.to_thread(broker.start)
            await until_health(port, 200, "leading")


@pytest.mark.parametrize(("at", "exit_code"), [("127.0.0.1:{taken}", 69), ("192.0.2.1:9000", 69), ("nowhere:9000", 78)])
async def test_an_address_that_cannot_be_listened_at_ends_the_start_with_the_settings_key(
    bridge_database: str, messages: Messages, rabbitmq: RabbitMQServer, tmp_path: Path, at: str, exit_code: int
) -> None:
    """A port that somebody else has, an address that is on another machine until a failover, and a typing mistake."""
    at = at.format(taken=rabbitmq.port)
    config = str(Daemon(tmp_path, settings(bridge_database, messages, f'[observe]\nlisten = "{at}"')).config)
    _, said = await command("run", "--config", config, expect=exit_code)
    assert f"observe.listen: cannot listen at {at}" in said


async def test_a_worker_tells_its_health_and_counts_its_attempts(
    bridge_database: str, server_folder: Path, unique: str, tmp_path: Path
) -> None:
    port = free_port()
    with NatsServer(server_folder) as broker:
        text = f"""
name = "test"
[postgres]
dsn = "{bridge_database}"
[sinks.events]
type = "nats"
stream = "{unique}"
url = "{broker.url}"
[[routes]]
topic = "#"
sink = "events"
[workers.{unique}]
handler = "tests.support.worker_handlers:refuse"
listen = "127.0.0.1:{port}"
"""
        bridge = Daemon(tmp_path / "bridge", text)
        await command("topology", "--apply", "--config", str(bridge.config))
        with bridge, Daemon(tmp_path / "worker", text, "run", unique, module="workers.cli") as worker:
            worker.wait_for("worker.started")
            await execute(bridge_database, "select bridge.emit('refuse.this', 'x')")
            worker.wait_for("event.dead_lettered")
            await until_health(port, 200, "working")
            _, metrics = await get(port, "/metrics")
            assert (
                f'pgbridge_worker_events_total{{bridge="test",outcome="dead_lettered",worker="{unique}"}} 1.0'
                in metrics
            )
            await asyncio.to_thread(broker.kill)
            assert f"queue {unique}: lost for" in str((await until_health(port, 503, "working"))["problems"])
