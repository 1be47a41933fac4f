"""The samples that charts are made of: stored by leaders and workers, added, pruned, and bounded."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from structlog.testing import capture_logs

from bridge.errors import RefusedError
from bridge.postgres import recorder as module
from bridge.postgres.connection import connect
from bridge.postgres.recorder import Recorder
from bridge.postgres.sample import SAMPLE, sample_for_ever
from bridge.postgres.status import look
from bridge.postgres.wire import Connection
from bridge.process.metrics import EVENTS_CONFIRMED, EVENTS_DEAD
from bridge.settings import PostgresSettings, load
from tests.support.daemons import Daemon
from tests.support.events import make_event
from tests.support.messages import execute
from tests.support.scripted_queue import ScriptedQueue
from tests.support.until import rows_become, until
from tests.support.working import echo, working
from workers.inbox import Inbox
from workers.metrics import DELIVERIES
from workers.sampling import Sampling

CURSOR = (
    "insert into bridge.cursor (name, sink, mark, gaps, old_gaps, held, horizon, system_identifier, patterns)"
    " values (%s, 'events', 0, '{}', '{}', '{}', '3', 1, '{#}')"
)
KEPT = "(values (15, interval '1 day'), (300, interval '3 days'), (3600, interval '30 days')) s (step, keep)"
PROCESS = "select left_out from bridge.store_worker_sample('stock', %s, %s::text::jsonb, %s::text::jsonb, 0.5)"

MEMORY = """
name = "shop"
[postgres]
dsn = "{dsn}"
[sinks.events]
type = "memory"
[[routes]]
topic = "#"
sink = "events"
[observe]
sample_interval = "0.05s"
"""


@pytest.fixture
async def connection(bridge_database: str) -> AsyncIterator[Connection]:
    async with await connect(PostgresSettings.model_validate({"dsn": bridge_database}), "test") as connection:
        yield connection


async def totals(dsn: str, kind: str, name: str, step: int = 15) -> dict[str, float]:
    """What was counted in all samples, since a test may run over the end of a step."""
    rows = await execute(
        dsn,
        "select c.key, sum(c.value::float8) from bridge.sample s, jsonb_each_text(s.counts) c "
        "where s.step = %s and s.kind = %s and s.name = %s group by c.key",
        step, kind, name,
    )  # fmt: skip
    return {str(key): float(str(total)) for key, total in rows}


async def test_what_processes_count_is_added_and_of_levels_the_highest_is_kept_in_each_step(
    bridge_database: str,
) -> None:
    for handled, depth in ((3, 7), (4, 9), (5, 8)):
        await execute(
            bridge_database, PROCESS, 15.0, json.dumps({"handled": handled}), json.dumps({"queue_depth": depth})
        )
    for step in (15, 300, 3600):
        assert await totals(bridge_database, "worker", "stock", step) == {"handled": 12}
        found = "select sum(seconds), max((levels ->> 'queue_depth')::float8) from bridge.sample where step = %s"
        assert await execute(bridge_database, found, step) == [(45.0, 9.0)]


async def test_a_sample_says_when_the_next_is_due_away_from_the_ends_of_a_step(bridge_database: str) -> None:
    for phase in (-1.0, 0.0, 0.5, 1.0, 2.0):
        [(due,)] = await execute(
            bridge_database,
            "select extract(epoch from clock_timestamp())::float8 + next_in "
            "from bridge.store_worker_sample('stock', 1, '{}', '{}', %s)",
            phase,
        )
        assert 2.9 < float(str(due)) % 15 < 13


async def test_each_sample_deletes_more_than_it_makes_whosoever_they_are(bridge_database: str) -> None:
    await execute(
        bridge_database,
        "insert into bridge.sample"
        " select s.step, 'worker', '', 'gone', now() - s.keep - n * interval '15 s', 15, '{}', '{}'"
        f" from {KEPT}, generate_series(1, 45) n",
    )
    await execute(
        bridge_database,
        "insert into bridge.sample"
        " select s.step, 'worker', '', 'kept', now() - s.keep + interval '1 hour', 15, '{}', '{}'"
        f" from {KEPT}",
    )
    left = "select count(*) from bridge.sample where name = 'gone'"
    for name, remains in (("a", 75), ("b", 15), ("c", 0)):
        await execute(bridge_database, f"select bridge.store_worker_sample('{name}', 15, '{{}}', '{{}}', 0)")
        assert await execute(bridge_database, left) == [(remains,)]
    assert await execute(bridge_database, "select count(*) from bridge.sample where name = 'kept'") == [(3,)]


async def test_there_are_as_many_names_at_a_time_as_there_may_be_and_those_that_are_there_go_on(
    bridge_database: str,
) -> None:
    # In one transaction, so in a moment; at the end of a step there would be room for more.
    fill = "select count(*) filter (where left_out > 0) from generate_series(1, %s) n, "
    fill += "bridge.store_worker_sample('w' || n, 15, '{}', '{}', 0)"
    await execute(bridge_database, fill, 310)
    counts = await execute(
        bridge_database, "select max(n) from (select count(*) n from bridge.sample group by step, at) g"
    )
    assert counts == [(300,)]
    found = await execute(
        bridge_database,
        "select left_out from (select name from bridge.sample where step = 3600 limit 1) s, "
        "bridge.store_samples('b', '{a}', 15, '{\"{}\"}', '{\"{}\"}', 0)",
    )
    assert found == [(1,)]


@pytest.mark.parametrize("counts", ['{"a": "1"}', "[]", '{"a": {}}', "3", json.dumps({f"n{n}": n for n in range(900)})])
async def test_what_is_no_sample_is_refused(bridge_database: str, counts: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="an object of numbers"):
        await execute(bridge_database, PROCESS, 15.0, counts, "{}")


def clocked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


async def test_a_leader_that_follows_another_counts_anew_and_what_both_stored_is_one_history(
    bridge_database: str, connection: Connection, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await execute(bridge_database, CURSOR, unique)
    clock = clocked(monkeypatch)
    EVENTS_CONFIRMED.labels("events").inc(1000)  # by whoever led before in this process
    for _ in range(2):
        recorder = Recorder(unique)
        for seconds, count in ((0.0, 0), (15.0, 150), (10.0, 100)):
            await execute(bridge_database, "select bridge.emit('a', 'x')")
            clock.now += seconds
            EVENTS_CONFIRMED.labels("events").inc(count)
            EVENTS_DEAD.labels("events", "refused").inc(count / 50)
            EVENTS_DEAD.labels("events", "malformed").inc(count / 50)
            await recorder.record(connection, await look(connection, 3600.0))
        EVENTS_CONFIRMED.labels("events").inc(77)  # and then it ended
        EVENTS_DEAD.labels("events", "refused").inc(77)
    assert await totals(bridge_database, "sink", "events") == {"published": 500, "dead_lettered": 20}
    # Who begins to lead does not know what was emitted before.
    assert await totals(bridge_database, "bridge", "") == {"emitted": 4}
    assert await execute(
        bridge_database,
        "select sum(seconds), max((levels ->> 'backlog')::int) from bridge.sample where step = 15 and kind = 'sink'",
    ) == [(50.0, 6)]


async def test_two_bridges_on_one_log_have_samples_of_their_own(
    bridge_database: str, connection: Connection, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (unique, f"{unique}-other")
    clock = clocked(monkeypatch)
    recorders = [Recorder(name) for name in names]
    for name in names:
        await execute(bridge_database, CURSOR, name)
    clock.now += 15
    for recorder in recorders:
        await recorder.record(connection, await look(connection, 3600.0))
    query = (
        "select bridge, kind, count(distinct name)::int from bridge.sample where step = 15 group by 1, 2 order by 1, 2"
    )
    assert await execute(bridge_database, query) == [(name, kind, 1) for name in names for kind in ("bridge", "sink")]


async def test_what_was_not_stored_is_given_up_and_never_counted_later(
    bridge_database: str, connection: Connection, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await execute(bridge_database, CURSOR, unique)
    clock = clocked(monkeypatch)
    recorder = Recorder(unique)
    EVENTS_CONFIRMED.labels("events").inc(150)
    clock.now += 15
    status = await look(connection, 3600.0)
    await execute(bridge_database, "alter table bridge.sample add constraint no check (kind <> 'sink')")
    with pytest.raises(RefusedError):
        await recorder.record(connection, status)
    assert recorder.due_in == 15
    await execute(bridge_database, "alter table bridge.sample drop constraint no")
    EVENTS_CONFIRMED.labels("events").inc(10)
    clock.now += 15
    await recorder.record(connection, status)
    assert await totals(bridge_database, "sink", "events") == {"published": 10}
    assert await execute(bridge_database, "select seconds from bridge.sample where step = 15 and kind = 'sink'") == [
        (15.0,)
    ]


async def test_a_leader_stores_samples_and_so_does_its_successor(
    bridge_database: str, tmp_path: Path, unique: str
) -> None:
    # As a login that is nothing but a bridge.
    role = sql.Identifier(unique)
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(sql.SQL("create role {} login in role bridge_relay").format(role))
    try:
        text = MEMORY.format(dsn=make_conninfo(bridge_database, user=unique))
        await execute(bridge_database, "create table writes (who text)")
        await execute(
            bridge_database,
            "create function note() returns trigger language plpgsql as $$ begin "
            "if new.step = 15 and new.kind = 'sink' then insert into public.writes values (session_user); end if; "
            "return null; end $$",
        )
        await execute(
            bridge_database,
            "create trigger note after insert or update on bridge.sample for each row execute function note()",
        )
        count = "select count(*) > %d, bool_and(who = '%s') from writes"
        with Daemon(tmp_path / "first", text) as first:
            first.wait_for("bridge.leading")
            await rows_become(bridge_database, count % (0, unique), [(True, True)])
            with Daemon(tmp_path / "second", text) as second:
                second.wait_for("bridge.started")
                [(before,)] = await execute(bridge_database, "select count(*) from writes")
                first.kill()
                second.wait_for("bridge.leading")
                await rows_become(bridge_database, count % (int(str(before)), unique), [(True, True)])
                assert second.stop() == 0
    finally:
        with psycopg.connect(bridge_database, autocommit=True) as admin:
            admin.execute(sql.SQL("drop role {}").format(role))


async def test_a_leader_that_cannot_store_samples_says_so_once_and_serves_its_gauges(
    bridge_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.postgres.recorder.INTERVAL", 0.15)  # looks between samples
    (tmp_path / "bridge.toml").write_text(MEMORY.format(dsn=bridge_database))
    await execute(bridge_database, CURSOR, "shop")
    await execute(bridge_database, "alter table bridge.sample rename to away")
    looks = 0
    found = SAMPLE.found

    def count(*told: Any) -> None:
        nonlocal looks
        looks += 1
        found(*told)

    monkeypatch.setattr(SAMPLE, "found", count)
    with capture_logs() as logs:
        sampling = asyncio.create_task(sample_for_ever(load(tmp_path / "bridge.toml")))
        await until(lambda: looks > 12)
        assert len(SAMPLE.collect()) > 0
        await execute(bridge_database, "alter table bridge.away rename to sample")
        await rows_become(bridge_database, "select count(*) > 0 from bridge.sample", [(True,)])
        sampling.cancel()
        await asyncio.wait([sampling])
    told = [line["event"] for line in logs if line["event"].startswith("samples.")]
    assert told == ["samples.refusing", "samples.restored"]


async def test_samples_of_a_worker_that_stops_and_begins_again_have_each_event_once(
    bridge_database: str, shop: PostgresSettings
) -> None:
    DELIVERIES.labels("invoices", "handled").inc(1000)  # before this process of the worker began
    for _ in range(2):
        async with working(echo, shop, concurrency=2) as queue:
            for number in range(3):
                queue.add(make_event(number))
            await queue.outcomes(3)
    counts = await totals(bridge_database, "worker", "invoices")
    assert counts["handled"] == 6
    assert sum(count for name, count in counts.items() if name.startswith("le_")) == 6


async def test_a_process_tells_what_it_has_in_hand_and_what_waits(
    bridge_database: str, shop: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()

    async def wait(event: object) -> dict[str, str]:
        await gate.wait()
        return {}

    monkeypatch.setattr("workers.sampling.INTERVAL", 0.05)
    monkeypatch.setattr("workers.worker.SAMPLE_INTERVAL", 0.05)
    monkeypatch.setattr(Inbox, "store_sample", soon(Inbox.store_sample))
    queue = ScriptedQueue()
    async with working(wait, shop, queue, concurrency=2):
        for number in range(5):
            queue.add(make_event(number))
        fine = (
            "select sum((counts ->> 'in_hand')::float8) > 0, max((levels ->> 'queue_depth')::float8) from bridge.sample"
        )
        await rows_become(bridge_database, f"{fine} where step = 15 and name = 'invoices'", [(True, 3.0)])
        gate.set()
        await queue.outcomes(5)


def soon(store: Any) -> Any:
    async def stored(self: Inbox, *sample: Any) -> tuple[bool, float]:
        was_stored, _ = await store(self, *sample)
        return was_stored, 0.05

    return stored


async def test_a_worker_that_cannot_store_samples_says_so_once_and_waits_a_second_at_most(
    bridge_database: str, shop: PostgresSettings
) -> None:
    inbox = Inbox("stock", shop, concurrency=1)
    await inbox.open()
    sampling = Sampling("stock", inbox)
    with capture_logs() as logs:
        async with await psycopg.AsyncConnection.connect(bridge_database) as holder:
            await holder.execute("lock table bridge.sample in share mode")
            async with asyncio.timeout(10):
                assert await sampling.store() == 15
                assert await sampling.store() == 15
        assert await sampling.store() < 31
    await inbox.close()
    assert [line["event"] for line in logs] == ["samples.lost", "samples.restored"]
    assert "lock" in str(logs[0]["reason"])
