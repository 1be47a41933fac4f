"""What `pgbridge status` says of the workers, from their inboxes."""

from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from rich.cells import cell_len

from tests.support.commands import command, json_of
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings

WORKER = '[workers.stock]\nhandler = "tests.support.worker_handlers:refuse"'
INBOX = """
insert into bridge.inbox (worker, event_id, claim, started_at, due_at, finished_at, ended_at, failure)
values ('invoices', gen_random_uuid(), 4711, now(), null, null, null, null),
       ('invoices', gen_random_uuid(), 4712, now(), null, null, null, null),
       ('invoices', gen_random_uuid(), null, now(), now(), null, null, null),
       ('invoices', gen_random_uuid(), null, now(), null, now(), null, null),
       ('invoices', gen_random_uuid(), null, now() - interval '3h', null, now() - interval '2h', null, null),
       ('invoices', gen_random_uuid(), null, now(), null, null, null, '{"code": "error", "reason": "no"}'),
       ('invoices', '0b1f3a52-6d0c-4c0b-9d43-0c2a7e5f9b11', null, now(), null, null, now(), null),
       ('invoices', gen_random_uuid(), null, now(), null, null, now(), null);
insert into bridge.held (worker, event_id, key) values ('invoices', gen_random_uuid(), 'k')
"""
DISCARDED = """
select bridge.audit_dead_letter('invoices:0b1f3a52-6d0c-4c0b-9d43-0c2a7e5f9b11', 'discarded',
    '0b1f3a52-6d0c-4c0b-9d43-0c2a7e5f9b11', 't', 'c', 'f', 'me', 'why')
"""


async def test_status_counts_what_runs_waits_finished_and_was_given_up_of_each_worker(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    config = str(Daemon(tmp_path, settings(bridge_database, messages, WORKER)).config)
    await execute(bridge_database, INBOX)
    await execute(bridge_database, DISCARDED)
    await execute(bridge_database, "select bridge.set_pause('worker', '', 'stock', 'ann@host', 'stocktaking')")
    async with await psycopg.AsyncConnection.connect(bridge_database, autocommit=True) as process:
        # Claim 4711 lives; 4712 died with its process, so that event waits for another attempt.
        await process.execute("select pg_advisory_lock(4711)")
        told = await json_of("status", "--config", config, expect=1)
        text, _ = await command("status", "--config", config, expect=1)
    invoices, stock = told["workers"]
    counts = ("running", "waiting", "finished_last_hour", "dead_letters", "held_keys", "exact", "paused")
    assert [invoices[count] for count in counts] == [1, 2, 1, 2, 1, True, None]
    assert (stock["worker"], stock["running"], stock["paused"]["why"]) == ("stock", 0, "stocktaking")
    assert max(map(cell_len, text.splitlines())) <= 80
    assert "by ann@host: stocktaking" in " ".join(text.split())


async def test_the_login_of_the_bridge_may_ask_for_all_of_it(
    bridge_database: str, messages: Messages, tmp_path: Path, unique: str
) -> None:
    role = sql.Identifier(unique)
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(sql.SQL("create role {} login in role bridge_relay").format(role))
    try:
        config = str(Daemon(tmp_path, settings(make_conninfo(bridge_database, user=unique), messages, WORKER)).config)
        await execute(bridge_database, INBOX)
        told = await json_of("status", "--config", config, expect=1)
        assert [worker["worker"] for worker in told["workers"]] == ["invoices", "stock"]
    finally:
        with psycopg.connect(bridge_database, autocommit=True) as admin:
            admin.execute(sql.SQL("drop role {}").format(role))
