"""The bridge as a process, from a commit to a queue, on real servers."""

import asyncio
import json
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support.daemons import Daemon, run_command
from tests.support.messages import Messages, execute, settings, stored_mark
from tests.support.until import until

PAYLOADS = [
    "{}",
    "",
    "null",
    "\u00e4\u00df\u4e2d\u6587\u0627\u0644\U0001f980\u200d\u2028 \t\r\n\x01 \"'\\",
    json.dumps({"text": "x" * 2_000_000}),
]


async def test_every_kind_of_payload_arrives_byte_for_byte_with_its_attributes(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    with Daemon(tmp_path, settings(bridge_database, messages)) as bridge:
        bridge.wait_for("bridge.leading")
        for payload in PAYLOADS:
            await execute(
                bridge_database,
                "select bridge.emit('shop.test', %s::text, 'a key \u00e9', '{\"tenant\": \"\u00fc\"}')",
                payload,
            )
        taken = await messages.take(len(PAYLOADS))
        assert [message.body.decode() for message in taken] == PAYLOADS
        first = taken[0]
        ids = await execute(bridge_database, "select event_id::text from bridge.outbox order by id")
        assert [message.message_id for message in taken] == [row[0] for row in ids]
        assert first.routing_key == "shop.test"
        assert first.headers["cloudEvents_subject"] == "a key \u00e9"
        assert first.headers["tenant"] == "\u00fc"
        assert bridge.stop() == 0


@pytest.mark.parametrize("channel", ["orders", "Stock Level", 'with "quotes"', "\u00dcber.alles"])
async def test_pg_notify_reaches_the_queue_on_a_database_where_nothing_is_installed(
    database: str, messages: Messages, tmp_path: Path, channel: str
) -> None:
    more = f"[channels]\nlisten = [{json.dumps(channel)}]\nbuffer = 'memory'"
    with Daemon(tmp_path, settings(database, messages, more)) as bridge:
        bridge.wait_for("bridge.started")
        await execute(database, "select pg_notify(%s, %s)", channel, '{"sku": 1}')
        (message,) = await messages.take(1)
        assert (message.routing_key, message.body) == (channel, b'{"sku": 1}')
        assert bridge.stop() == 0


async def test_pg_notify_is_written_to_the_log_and_reaches_the_queue_in_order(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    more = "[channels]\nlisten = ['Stock Level']"
    with Daemon(tmp_path, settings(bridge_database, messages, more)) as bridge:
        bridge.wait_for("channels.listening")
        await execute(
            bridge_database, "select pg_notify('Stock Level', n::text) from generate_series(1, 3000) n order by n"
        )
        taken = await messages.take(3000)
        assert [int(message.body) for message in taken] == list(range(1, 3001))
        logged = await execute(bridge_database, "select count(*) from bridge.outbox where topic = 'Stock Level'")
        assert logged == [(3000,)]
        assert bridge.stop() == 0


async def test_a_killed_bridge_loses_nothing_and_keeps_each_keys_order_up_to_repeats(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    count, keys = 20_000, 50
    await execute(
        bridge_database,
        "select bridge.emit('load', n::text, 'key-' || n %% %s) from generate_series(1, %s) n order by n",
        keys,
        count,
    )
    text = settings(bridge_database, messages, "[outbox]\npage_size = 200")
    with Daemon(tmp_path, text) as bridge:
        taking = asyncio.create_task(messages.take_distinct(count))
        for _ in range(3):
            bridge.wait_for("bridge.leading")
            # Some of the events are settled, and others in flight.
            before = stored_mark(bridge_database)
            await until(lambda before=before: stored_mark(bridge_database) > before)  # type: ignore[misc]
            bridge.kill()
            assert stored_mark(bridge_database) < count
            bridge.start()
        taken = await taking
        assert bridge.stop() == 0
    order = defaultdict(list)
    seen = set()
    for message in taken:
        if message.message_id not in seen:
            seen.add(message.message_id)
            order[message.headers["cloudEvents_subject"]].append(int(message.body))
    assert len(seen) == count
    assert all(numbers == sorted(numbers) for numbers in order.values())


async def test_an_event_that_no_route_takes_becomes_a_dead_letter(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    text = settings(bridge_database, messages).replace('topic = "#"', 'topic = "shop.#"')
    with Daemon(tmp_path, text) as bridge:
        await execute(bridge_database, "select bridge.emit('other', 'x'), bridge.emit('shop.a', 'y')")
        (message,) = await messages.take(1)
        assert message.body == b"y"
        bridge.wait_for("event.dead_lettered")
        letters = await execute(bridge_database, "select topic, code, payload from bridge.dead_letter")
        assert letters == [("other", "no_route", "x")]


async def test_check_finds_everything_right_and_emit_prints_the_id(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    bridge = Daemon(tmp_path, settings(bridge_database, messages))
    checked = await asyncio.to_thread(run_command, "check", "--config", str(bridge.config))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    emitted = await asyncio.to_thread(run_command, "emit", "a.b", '{"n": 1}', "--config", str(bridge.config))
    rows = await execute(bridge_database, "select event_id::text, payload, content_type from bridge.outbox")
    assert rows == [(emitted.stdout.strip(), '{"n": 1}', "application/json")]
