"""SIGHUP: the daemons read their settings again, and go on in the same process."""

import asyncio
import signal
from pathlib import Path

import pytest

from bridge.settings import PostgresSettings
from tests.support.daemons import Daemon, run_command
from tests.support.messages import Messages, execute, settings
from tests.support.until import rows_become


async def emit(dsn: str, first: int, last: int) -> None:
    await execute(
        dsn,
        "select bridge.emit('load', n::text::jsonb, 'key') from generate_series(%s::int, %s::int) n order by n",
        first,
        last,
    )


async def test_a_bridge_goes_on_with_its_new_settings_under_the_same_number_and_loses_nothing(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    text = settings(bridge_database, messages)
    with Daemon(tmp_path, text) as bridge:
        bridge.wait_for("bridge.leading")
        assert bridge.process is not None
        await emit(bridge_database, 1, 5000)
        # What says that it reads anew is the new name: another bridge, with a position of its own.
        bridge.config.write_text(text.replace('name = "test"', 'name = "another"'))
        bridge.signal(signal.SIGHUP)
        bridge.wait_for("bridge.reloading")
        started = bridge.wait_for("bridge.started", count=2)
        assert started["name"] == "another"
        bridge.config.write_text(text)
        bridge.signal(signal.SIGHUP)
        assert bridge.wait_for("bridge.started", count=3)["name"] == "test"
        await emit(bridge_database, 5001, 6000)
        await rows_become(
            bridge_database, "select mark >= 6000 from bridge.cursor where name = 'test' and sink = 'events'", [(True,)]
        )
        taken = await messages.take_distinct(6000)
        assert {int(message.body) for message in taken} == set(range(1, 6001))
        assert bridge.stop() == 0


async def test_settings_that_are_wrong_are_refused_and_the_old_ones_stay(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    text = settings(bridge_database, messages)
    with Daemon(tmp_path, text) as bridge:
        bridge.wait_for("bridge.leading")
        bridge.config.write_text(text.replace("name =", "nmae ="))
        bridge.signal(signal.SIGHUP)
        assert "nmae: unknown key" in bridge.wait_for("bridge.settings_refused")["reason"]
        await emit(bridge_database, 1, 10)
        assert len(await messages.take(10)) == 10
        assert bridge.stop() == 0


@pytest.mark.rabbitmq
async def test_a_worker_finishes_what_it_has_in_hand_and_goes_on_with_its_new_settings(
    bridge_database: str, shop: PostgresSettings, messages: Messages, tmp_path: Path
) -> None:
    worker_text = (
        '[workers.echo]\nhandler = "tests.support.worker_handlers:echo"\nsubscribe = ["load"]\n'
        'reply = "shop.rendered"\nconcurrency = 3\n'
    )
    text = settings(bridge_database, messages, worker_text)
    bridge = Daemon(tmp_path, text)
    worker = Daemon(tmp_path, text, "run", "echo", module="workers.cli")
    done = await asyncio.to_thread(run_command, "topology", "--apply", "--config", str(bridge.config))
    assert done.returncode == 0, done.stderr
    with bridge, worker:
        bridge.wait_for("bridge.leading")
        assert worker.wait_for("worker.started")["concurrency"] == 3
        await emit(bridge_database, 1, 500)
        await rows_become(bridge_database, "select count(*) > 50 from shop.invoice", [(True,)])
        worker.config.write_text(text.replace("concurrency = 3", "concurrency = 7"))
        worker.signal(signal.SIGHUP)
        assert worker.wait_for("worker.started", count=2)["concurrency"] == 7
        replied = "select (result ->> 'of')::int from shop.invoice order by 1"
        await rows_become(bridge_database, replied, [(number,) for number in range(1, 501)])
        assert worker.stop() == 0
        assert bridge.stop() == 0
