"""A worker whose broker or database is gone, refuses or falls silent, at its start and later."""

import asyncio
import time
import uuid
from typing import cast

import pytest
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr
from structlog.testing import capture_logs
from tenacity import wait_fixed

from bridge.errors import BrokerUnavailableError, DatabaseUnavailableError, LoginError
from bridge.event import Event
from bridge.process.outage import Outage
from bridge.settings import PostgresSettings
from tests.support.events import make_event
from tests.support.proxy import Proxy
from tests.support.scripted_queue import ScriptedQueue
from tests.support.servers import PostgresServer
from tests.support.until import until
from tests.support.working import echo, replies, settings_of, working
from workers.claim import Claim
from workers.claimed_effects import Effects
from workers.effects import effect
from workers.handler import Result
from workers.inbox import Inbox
from workers.worker import Worker


async def test_a_lost_broker_is_told_once_and_connected_again(shop: PostgresSettings, bridge_database: str) -> None:
    with capture_logs() as lines:
        async with working(echo, shop) as queue:
            queue.add(make_event(payload=1))
            await queue.outcomes(1)
            queue.lose(refusals=3)
            queue.add(make_event(payload=2))
            await queue.outcomes(2)
            await until(lambda: any(line["event"] == "queue.restored" for line in lines))
    actions = [line["event"] for line in lines]
    assert actions.count("queue.lost") == actions.count("queue.restored") == 1
    assert next(line for line in lines if line["event"] == "queue.restored")["seconds"] > 0
    assert queue.opened == 5
    assert len(replies(bridge_database)) == 2


async def test_a_login_that_is_refused_after_the_start_is_waited_out(
    shop: PostgresSettings, bridge_database: str
) -> None:
    with capture_logs() as lines:
        async with working(echo, shop) as queue:
            queue.lose(refusals=2, refusal=LoginError("the password was changed"))
            queue.add(make_event(payload=1))
            await queue.outcomes(1)
    told = [(line["event"], line["reason"]) for line in lines if line["event"] in ("queue.lost", "queue.refusing")]
    assert told == [("queue.lost", "the connection is lost"), ("queue.refusing", "the password was changed")]
    assert len(replies(bridge_database)) == 1


async def test_an_outage_of_the_database_loses_nothing_and_counts_no_attempt(
    shop: PostgresSettings, bridge_database: str, postgres: PostgresServer
) -> None:
    gate = asyncio.Event()
    runs: list[str] = []

    async def slow(event: Event) -> Result:
        runs.append(event.id)
        await gate.wait()
        return {"of": event.json()}

    async with Proxy("127.0.0.1", postgres.port) as proxy:
        dsn = make_conninfo(shop.dsn.get_secret_value(), port=proxy.port)
        behind = PostgresSettings(dsn=SecretStr(dsn), connect_timeout=2.0)
        with capture_logs() as lines:
            async with working(slow, behind, concurrency=2, max_attempts=1) as queue:
                queue.add(make_event(payload=0))
                await until(lambda: len(runs) == 1)
                proxy.refuse = True
                proxy.cut()
                queue.add(make_event(payload=1))  # cannot be claimed
                gate.set()  # the first cannot be finished
                await until(lambda: any(line["event"] == "database.lost" for line in lines))
                assert queue.settled == []
                proxy.refuse = False
                assert await queue.outcomes(2) == [("ack", None)] * 2
    assert sorted(reply["of"] for reply in replies(bridge_database)) == [0, 1]
    assert len(runs) == 2
    actions = [line["event"] for line in lines]
    assert actions.count("database.lost") == actions.count("database.restored") == 1


async def test_a_broker_that_does_not_answer_fails_the_start(shop: PostgresSettings) -> None:
    inbox = Inbox("invoices", shop, concurrency=1)
    worker = Worker("invoices", settings_of(), echo, lambda: ScriptedQueue(refusals=1), inbox)
    with pytest.raises(BrokerUnavailableError):
        await worker.run(asyncio.Event())


async def test_a_database_that_does_not_answer_fails_the_start(unique: str) -> None:
    nowhere = PostgresSettings(dsn=SecretStr("postgresql://nobody@127.0.0.1:1/none"), connect_timeout=2.0)
    worker = Worker("w", settings_of(), echo, ScriptedQueue, Inbox("w", nowhere, concurrency=1))
    with pytest.raises(DatabaseUnavailableError):
        await worker.run(asyncio.Event())


async def test_a_database_that_falls_silent_is_told_by_health_and_comes_back_while_nothing_happens(
    shop: PostgresSettings, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.session.HEARTBEAT", 0.5)
    monkeypatch.setattr("workers.worker.HEARTBEAT", 0.2)
    async with Proxy("127.0.0.1", postgres.port) as proxy:
        dsn = make_conninfo(shop.dsn.get_secret_value(), port=proxy.port)
        behind = PostgresSettings(dsn=SecretStr(dsn), connect_timeout=2.0)
        queue = ScriptedQueue()
        worker = Worker("invoices", settings_of(), echo, lambda: queue, Inbox("invoices", behind, concurrency=4))
        stop = asyncio.Event()
        task = asyncio.create_task(worker.run(stop))
        await until(lambda: worker.health().role == "working", "the worker works")
        proxy.blackhole = True
        await until(lambda: "database" in str(worker.health().problems), "health tells it")
        assert "database" in str(worker.health().unready)
        proxy.blackhole = False
        await until(lambda: worker.health().problems == (), "health is well again")
        assert worker.health().unready is None
        queue.add(make_event(payload=1))
        await queue.outcomes(1)
        stop.set()
        await task


async def test_a_stop_ends_in_time_although_the_database_is_silent(
    shop: PostgresSettings, postgres: PostgresServer
) -> None:
    async with Proxy("127.0.0.1", postgres.port) as proxy:
        dsn = make_conninfo(shop.dsn.get_secret_value(), port=proxy.port)
        behind = PostgresSettings(dsn=SecretStr(dsn), connect_timeout=2.0)
        async with working(echo, behind, shutdown_limit="2s") as queue:
            proxy.blackhole = True
            queue.add(make_event(payload=1))
            await until(lambda: bool(queue._in_hand))
            stopping = time.monotonic()
        assert time.monotonic() - stopping < 4


async def test_a_wait_for_the_database_is_no_fault_of_the_handler_before_the_outage_is_known() -> None:
    """Where the pool has no connection at that moment, the handler's time is up before the pool has given up."""

    class Waiting:
        """An inbox that gets no connection."""

        async def begin_effect(self, *_: object) -> None:
            await asyncio.Event().wait()

    claim = Claim("payments", str(uuid.uuid4()), 1, 1)
    effects = Effects(cast("Inbox", Waiting()), claim, Outage("database", wait_fixed(0.1)), declared=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await effects.begin_effect("charge", None)
    assert effects.gave_up_in_outage

    # One that had nearly used up its time has itself to blame.
    quick = Effects(cast("Inbox", Waiting()), claim, Outage("database", wait_fixed(0.1)), declared=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await quick.begin_effect("charge", None)
    assert not quick.gave_up_in_outage


async def test_a_handler_whose_time_is_up_while_it_waits_for_the_database_has_lost_no_attempt(
    shop: PostgresSettings, postgres: PostgresServer
) -> None:
    runs: list[str] = []
    event = make_event(payload=1)
    async with Proxy("127.0.0.1", postgres.port) as proxy:

        async def charge(event: Event) -> Result:
            runs.append(event.id)
            if len(runs) == 1:
                proxy.refuse = True
                proxy.cut()
            async with effect("charge") as charge:
                charge.result = {}
            return {}

        dsn = make_conninfo(shop.dsn.get_secret_value(), port=proxy.port)
        behind = PostgresSettings(dsn=SecretStr(dsn), connect_timeout=2.0)
        with capture_logs() as lines:
            async with working(charge, behind, max_attempts=1, timeout="1s") as queue:
                queue.add(event)
                await until(lambda: any(line["event"] == "database.lost" for line in lines))
                # Until the handler's time is up, which nothing tells.
                await asyncio.sleep(1.5)
                proxy.refuse = False
                assert await queue.outcomes(1) == [("give_back", None)]
                queue.add(event)
                assert await queue.outcomes(2) == [("give_back", None), ("ack", None)]
    assert len(runs) == 2
