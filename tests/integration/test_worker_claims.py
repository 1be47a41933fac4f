"""Events that several processes, or one twice, want; claims that are lost; attempts that died with their process."""

import asyncio
from functools import partial

import psycopg
import pytest

from bridge.brokers.contract import Failure
from bridge.event import Event
from bridge.settings import PostgresSettings
from tests.support.events import make_event
from tests.support.until import until
from tests.support.working import echo, replies, working
from workers.claim import Claim, ClaimLostError, NotNow
from workers.effects import effect
from workers.handler import Reject, Result
from workers.inbox import Inbox


def add_slow_reply(dsn: str, seconds: float) -> None:
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(
            f"CREATE FUNCTION shop.slow(event_id uuid, result jsonb) RETURNS void SECURITY DEFINER LANGUAGE plpgsql"
            f" AS $$ BEGIN IF result ? 'slow' THEN PERFORM pg_sleep({seconds}); END IF; END $$".encode()
        )


async def claims(inbox: Inbox, event_id: str) -> bool:
    return isinstance(await inbox.claim_alone(event_id), Claim)


async def test_an_event_that_another_process_has_comes_back_soon_without_an_attempt(shop: PostgresSettings) -> None:
    event = make_event(payload=7)
    other = Inbox("invoices", shop, concurrency=1)
    await other.open()
    try:
        claim = await other.claim(event.id)
        assert isinstance(claim, Claim)
        async with working(echo, shop) as queue:
            queue.add(event)
            [(verb, delay)] = await queue.outcomes(1)
            assert verb == "retry"
            assert isinstance(delay, float)
            assert 0 < delay <= 5
        await other.release(claim, counted=0)
        claim = await other.claim(event.id)
        assert isinstance(claim, Claim)
        assert claim.attempt == 1
    finally:
        await other.close()


async def test_an_event_that_kills_its_process_again_and_again_is_dead_lettered_unrun(
    shop: PostgresSettings, bridge_database: str
) -> None:
    event = make_event(payload=1)
    for _ in range(3):
        dying = Inbox("invoices", shop, concurrency=1, backoff=[0.01])
        await dying.open()
        # The server learns a moment later that the session before has ended.
        await until(partial(claims, dying, event.id), "the event is claimed")
        await dying.close()
    async with working(echo, shop, max_attempts=3) as queue:
        queue.add(event)
        while (await queue.outcomes(len(queue.settled) or 1))[-1][0] == "retry":
            count = len(queue.settled)
            queue.add(event)
            await queue.outcomes(count + 1)
        (_, verb, failure) = queue.settled[-1]
    assert verb == "dead_letter"
    assert isinstance(failure, Failure)
    assert failure.code == "attempts_exhausted"
    assert "3 attempts were begun and none ended" in failure.reason
    assert replies(bridge_database) == []


async def test_two_processes_of_one_worker_share_an_event_delivered_to_both(
    shop: PostgresSettings, bridge_database: str
) -> None:
    events = [make_event(payload=n) for n in range(30)]
    async with working(echo, shop) as one, working(echo, shop) as other:
        for event in events:
            one.add(event)
            other.add(event)
        outcomes = [*await one.outcomes(30), *await other.outcomes(30)]
    assert {verb for verb, _ in outcomes} <= {"ack", "retry"}
    assert sorted(reply["of"] for reply in replies(bridge_database)) == list(range(30))


async def test_an_event_whose_claim_was_lost_at_an_effect_runs_again(
    shop: PostgresSettings, bridge_database: str
) -> None:
    runs: list[str] = []

    async def charge(event: Event) -> Result:
        runs.append(event.id)
        if len(runs) == 1:
            # As a kill of PostgreSQL right after the claim does, whose commit need not wait for the disk.
            with psycopg.connect(bridge_database, autocommit=True) as admin:
                admin.execute("delete from bridge.inbox")
        async with effect("charge") as charge:
            charge.result = {"id": "ch_1"}
        return {}

    event = make_event(payload=1)
    async with working(charge, shop) as queue:
        queue.add(event)
        assert await queue.outcomes(1) == [("retry", 1.0)]
        queue.add(event)
        assert await queue.outcomes(2) == [("retry", 1.0), ("ack", None)]


async def test_an_event_whose_claim_was_lost_is_not_given_up_by_who_lost_it(
    shop: PostgresSettings, bridge_database: str
) -> None:
    taken_over = Inbox("invoices", shop, concurrency=1)
    await taken_over.open()

    async def reject_late(event: Event) -> Result:
        # Our session ends, as that of a process that stood still, and another process has the event.
        with psycopg.connect(bridge_database, autocommit=True) as admin:
            admin.execute("update bridge.inbox set claim = null")
        await taken_over.claim(event.id)
        raise Reject("no such customer")

    event = make_event(payload=1)
    async with working(reject_late, shop) as queue:
        queue.add(event)
        assert await queue.outcomes(1) == [("retry", 1.0)]
    await taken_over.close()


async def test_an_event_that_is_delivered_twice_to_one_process_runs_once_at_a_time(shop: PostgresSettings) -> None:
    gate = asyncio.Event()
    runs: list[str] = []

    async def slow(event: Event) -> Result:
        runs.append(event.id)
        await gate.wait()
        return {}

    event = make_event(payload=1)
    async with working(slow, shop) as queue:
        queue.add(event)
        await until(lambda: len(runs) == 1)
        queue.add(event)
        assert await queue.outcomes(1) == [("retry", 1.0)]
        gate.set()
        await queue.outcomes(2)
    assert len(runs) == 1


async def test_an_event_whose_attempt_died_with_its_process_runs_with_nothing_beside_it(
    shop: PostgresSettings, bridge_database: str
) -> None:
    poison = make_event(payload="poison")
    dying = Inbox("invoices", shop, concurrency=1)
    await dying.open()
    assert isinstance(await dying.claim(poison.id), Claim)
    await dying.close()
    running: set[str] = set()
    beside: list[set[str]] = []
    gate = asyncio.Event()

    async def run(event: Event) -> Result:
        running.add(event.id)
        if event.id == poison.id:
            beside.append(set(running))
        else:
            await gate.wait()
        running.discard(event.id)
        return {}

    async with working(run, shop, concurrency=8, retry_initial="600ms") as queue:
        queue.add(poison)
        # First it waits for its backoff, so that a process that starts again and again does other work, too.
        [(verb, _)] = await queue.outcomes(1)
        assert verb == "retry"
        for _ in range(4):
            queue.add(make_event(payload=1))
        await until(lambda: len(running) == 4)
        with psycopg.connect(bridge_database, autocommit=True) as admin:
            admin.execute("update bridge.inbox set due_at = clock_timestamp() where due_at is not null")
        queue.add(poison)
        await until(lambda: len(queue._in_hand) == 6)
        for _ in range(3):
            queue.add(make_event(payload=1))
        await asyncio.sleep(0.1)
        assert not beside
        gate.set()
        await queue.outcomes(9)
    assert beside == [{poison.id}]


async def test_slow_replies_keep_no_other_event_from_being_claimed(
    shop: PostgresSettings, bridge_database: str
) -> None:
    add_slow_reply(bridge_database, 60)
    quick = make_event(payload=0)
    inbox = Inbox("invoices", shop, concurrency=4, reply="shop.slow")
    other = Inbox("invoices", shop, concurrency=4, reply="shop.slow")
    await inbox.open()
    await other.open()
    claims = [await inbox.claim(make_event(payload=n).id) for n in range(4)]
    finishing = [
        asyncio.ensure_future(inbox.finish(claim, {"slow": True})) for claim in claims if isinstance(claim, Claim)
    ]

    async def all_reply() -> bool:
        with psycopg.connect(bridge_database) as connection:
            row = connection.execute("select count(*) from pg_stat_activity where wait_event = 'PgSleep'").fetchone()
        return row == (4,)

    await until(all_reply)
    async with asyncio.timeout(3):
        claim = await inbox.claim(quick.id)
        assert isinstance(claim, Claim)
        await inbox.finish(claim, {})
        # Nor does one that meets an event that is being finished wait for its reply.
        for busy in claims:
            assert isinstance(busy, Claim)
            assert await other.claim(busy.event_id) == NotNow("busy")
    for each in finishing:
        each.cancel()
    await asyncio.gather(*finishing, return_exceptions=True)
    await inbox.close()
    await other.close()


async def test_a_process_that_stands_still_frees_its_events(
    shop: PostgresSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.session._SETTINGS", ("set idle_session_timeout = '300ms'",))
    event = make_event(payload=1)
    # Nobody beats for it, as for a process under SIGSTOP.
    frozen = Inbox("invoices", shop, concurrency=1)
    await frozen.open()
    claim = await frozen.claim(event.id)
    assert isinstance(claim, Claim)
    other = Inbox("invoices", shop, concurrency=1, backoff=[0.01])
    await other.open()
    await until(partial(claims, other, event.id), "the event is free")
    with pytest.raises(ClaimLostError):
        await frozen.finish(claim, {})
    await frozen.beat()
    assert isinstance(await frozen.claim(make_event(payload=2).id), Claim)
    await frozen.close()
    await other.close()
