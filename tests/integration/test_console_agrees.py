"""Console, command, health and metrics say the same of the same bridge, since one function tells all of them."""

import json
import re
from pathlib import Path

from tests.support.commands import command, json_of
from tests.support.console import browsing, console_settings
from tests.support.daemons import Daemon
from tests.support.messages import execute
from tests.support.metrics import get, metric
from tests.support.servers import free_port
from tests.support.until import rows_become, until


async def test_console_command_and_metrics_agree(bridge_database: str, tmp_path: Path) -> None:
    port = free_port()
    settings = console_settings(
        tmp_path,
        bridge_database,
        more=f'listen = "127.0.0.1:{port}"\nsample_interval = "1s"\n'
        '[workers.w]\nhandler = "none:handle"\nsink = "events"',
    )
    config = tmp_path / "bridge.toml"
    with Daemon(tmp_path / "bridge", config) as bridge:
        bridge.wait_for("bridge.leading")
        await command("pause", "--sink", "other", "--why", "a test", "--config", str(config))
        bridge.wait_for("sink.paused")
        await execute(
            bridge_database,
            "select bridge.emit('other.a', 'x') from generate_series(1, 7); "
            "select bridge.emit('a', 'x') from generate_series(1, 4); "
            "select bridge.emit('a', 'x', at => now() + interval '1 day') from generate_series(1, 2); "
            "insert into bridge.dead_letter "
            "(bridge, event_id, sequence, topic, payload, content_type, headers, created_at, sink, code, reason,"
            " attempts) select 'test', gen_random_uuid(), 1, 'a', '', 'text/plain', '{}', now(), 'events', 'rejected', "
            "'no', 1 from generate_series(1, 3); "
            "insert into bridge.inbox (worker, event_id, finished_at, due_at, failure) "
            "select 'w', gen_random_uuid(), case when n < 6 then now() end, case when n < 8 then now() end, "
            "case when n > 7 then '{}'::jsonb end from generate_series(1, 9) n",
        )
        await rows_become(
            bridge_database, "select sink, backlog from bridge.status() where sink <> ''", [("events", 0), ("other", 7)]
        )

        async def is_sampled() -> bool:
            return await metric(port, "pgbridge_backlog_events") == 7

        await until(is_sampled, "the leader has looked")
        told = await json_of("status", "--config", str(config))
        async with browsing(settings) as browser:
            flow = await browser.page("/")
            bridges = await browser.page("/bridges")
        _, healthy = await get(port, "/health")

        [one] = told["bridges"]
        [worker] = told["workers"]
        backlogs = {sink["sink"]: sink["backlog"] for sink in one["sinks"] if sink["sink"]}
        assert backlogs == {"events": 0, "other": 7}
        assert [int(found) for found in re.findall(r"backlog (\d+)", flow.words)][: len(backlogs)] == list(
            backlogs.values()
        )
        assert one["dead_letters"] == 3 == await metric(port, "pgbridge_dead_letters")
        assert "dead letters 3" in flow.words
        assert told["scheduled"]["events"] == 2 == await metric(port, "pgbridge_scheduled_events")
        assert "scheduled 2" in flow.words
        assert f"last event {one['last_id']}" in flow.words
        assert one["leader"] in flow.words
        assert one["leader"] in bridges.words
        assert [(each["sink"], each["paused"] is not None) for each in one["sinks"] if each["sink"]] == [
            ("events", False),
            ("other", True),
        ]
        assert await metric(port, "pgbridge_sink_paused") == 1
        assert re.match("sink other: paused .*: a test", *json.loads(healthy)["paused"])
        assert (worker["finished_last_hour"], worker["waiting"], worker["dead_letters"]) == (5, 2, 2)
        assert "in progress 0 to be tried again 2 finished, last hour 5 dead letters 2" in flow.words
        assert "a test" in bridges.words
