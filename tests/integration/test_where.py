"""`pgbridge where`: one event through log, sinks, dead letters, inboxes and effects."""

import json
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from rich.cells import cell_len

from tests.support.commands import command, json_of
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings

CURSOR = (
    "insert into bridge.cursor (name, sink, mark, gaps, old_gaps, held, horizon, system_identifier, patterns) values"
    " ('test', 'read', 9, '{}', '{}', '{}', '3', 1, '{#}'), ('test', 'gap', 9, '{[1,2)}', '{}', '{}', '3', 1, '{a.#}'),"
    " ('test', 'held', 9, '{}', '{}', '{[1,2)}', '3', 1, '{*}'), ('test', 'late', 0, '{}', '{}', '{}', '3', 1, '{#}'),"
    " ('test', 'other', 9, '{}', '{}', '{}', '3', 1, '{b}'), ('test', '', 9, '{}', '{}', '{}', '3', 1, '{a,b}')"
)


@pytest.fixture
def config(bridge_database: str, messages: Messages, tmp_path: Path) -> str:
    return str(Daemon(tmp_path, settings(bridge_database, messages)).config)


async def emitted(dsn: str) -> str:
    [(event_id,)] = await execute(dsn, "select bridge.emit('a', 'payload', 'the key')::text")
    return str(event_id)


async def test_an_event_stands_differently_to_each_sink_that_takes_its_topic(bridge_database: str, config: str) -> None:
    event_id = await emitted(bridge_database)
    await execute(bridge_database, CURSOR)
    found = await json_of("where", event_id, "--config", config)
    logged = found["logged"]
    assert (logged["id"], logged["topic"], logged["key"], logged["bytes"]) == (1, "a", "the key", 7)
    assert [(sink["sink"], sink["state"]) for sink in found["sinks"]] == [
        ("gap", "in a gap"), ("held", "held"), ("late", "waits"), ("read", "settled"),
    ]  # fmt: skip
    assert await json_of("where", "1", "--config", config) == found, "its number leads to it, too"
    out, _ = await command("where", event_id, "--config", config)
    assert max(map(cell_len, out.splitlines())) <= 80
    assert "no bridge named test is running" in out
    await execute(bridge_database, "select bridge.set_pause('sink', 'test', 'late', 'ann@host', 'the broker moves')")
    out, _ = await command("where", event_id, "--config", config)
    assert "by ann@host: the broker moves" in " ".join(out.split())


async def test_an_event_that_is_pruned_from_the_log_is_found_as_dead_letter_and_by_what_people_did(
    bridge_database: str, config: str
) -> None:
    event_id = str(uuid4())
    await execute(bridge_database, CURSOR)
    await execute(
        bridge_database,
        "insert into bridge.dead_letter (bridge, event_id, sequence, topic, payload, content_type, headers, created_at,"
        " sink, code, reason, attempts) values ('test', %s, 77, 'a', 'x', 'text/plain', '{}', now(), 'read',"
        " 'too_large', 'it is too large', 1)",
        event_id,
    )
    found = await json_of("where", event_id, "--config", config)
    assert found["logged"] is None
    assert [(letter["id"], letter["code"]) for letter in found["dead_letters"]] == [("outbox:1", "too_large")]
    out, _ = await command("where", event_id, "--config", config)
    assert "dead letter outbox:1" in out
    await command("dead", "discard", "outbox:1", "--why", "nonsense", "--config", config)
    out, _ = await command("where", event_id, "--config", config)
    assert "discarded" in out
    assert "nonsense" in out


async def test_what_each_workers_inbox_knows_of_the_event_and_its_effects_is_shown(
    bridge_database: str, config: str
) -> None:
    event_id = await emitted(bridge_database)
    async with await psycopg.AsyncConnection.connect(bridge_database, autocommit=True) as process:
        await process.execute("select pg_advisory_lock(4711)")
        pid = process.info.backend_pid
        # Not on that session: it would find the lock of the token to be its own.
        for worker in ("stock", "invoices", "mails"):
            claim = "select from bridge.inbox_claim(%s, array[%s::uuid], '{null}', 4711, '{}', '{1}', false)"
            await execute(bridge_database, claim, worker, event_id)
        for call in (
            "inbox_effect_begin('stock', %s, 4711, 1, 'charge', null)",
            "inbox_finish('invoices', %s, 4711, 1, '{\"pdf\": 1}')",
            "inbox_release('mails', %s, 4711, 1, 1, 60)",
        ):
            await execute(bridge_database, f"select bridge.{call}", event_id)
        found = await json_of("where", event_id, "--config", config)
        invoices, mails, stock = found["workers"]
        assert (invoices["state"], invoices["result"], invoices["claimed_by"]) == ("finished", {"pdf": 1}, None)
        assert (mails["state"], mails["attempts"], mails["due_at"] is None) == ("waiting", 1, False)
        assert stock["state"] == "running"
        assert f"pid {pid} of PostgreSQL" in stock["claimed_by"]
        assert stock["effects"]["charge"]["idempotency_key"] == f"stock:{event_id}:charge"
        out, _ = await command("where", event_id, "--config", config)
    assert max(map(cell_len, out.splitlines())) <= 80
    assert f"stock:{event_id}:charge" in out, "a key is never broken"
    assert '{"pdf": 1}' in out, "a result is JSON"
    # The process is gone, and its claim with it.
    found = await json_of("where", event_id, "--config", config)
    assert found["workers"][2]["state"] == "waiting"
    await execute(
        bridge_database,
        "update bridge.inbox set failure = %s::jsonb where worker = 'mails'",
        json.dumps({"code": "error", "reason": "no paper"}),
    )
    out, _ = await command("where", event_id, "--config", config)
    assert "given up" in out
    assert "error: no paper" in out


async def test_an_event_without_a_trace_ends_with_1_and_says_where_it_looked(config: str) -> None:
    event_id = str(uuid4())
    _, said = await command("where", event_id, "--config", config, expect=1)
    assert f"no trace of the event {event_id}: it is not in the log" in said
    assert "in no worker's inbox" in said
    await command("where", "no-uuid", "--config", config, expect=2)
    await command("where", "99", "--config", config, expect=2)


async def test_the_log_is_looked_through_to_its_beginning(bridge_database: str) -> None:
    await execute(bridge_database, "select bridge.emit('a', 'x') from generate_series(1, 25)")
    [(event_id,)] = await execute(bridge_database, "select event_id::text from bridge.outbox where id = 1")
    steps: list[tuple[object, ...]] = []
    before: object = 2**62
    while True:
        [(found, following)] = await execute(
            bridge_database, "select id, next_before from bridge.find_event(%s::uuid, %s, 10)", event_id, before
        )
        steps.append((found, following))
        if found or following is None:
            break
        before = following
    assert steps == [(None, 16), (None, 6), (1, 1)]
