"""A worker without outside effects (`effects = false`): one write an event, with the reply, and all else as ever."""

import asyncio

import psycopg
import pytest

from bridge.brokers.contract import Failure
from bridge.event import Event, replay_mark
from bridge.settings import PostgresSettings
from tests.support.events import make_event
from tests.support.until import until
from tests.support.working import echo, figure, replies, working
from workers.effects import effect
from workers.handler import Reject, Result


def rows(dsn: str) -> list[tuple[int, bool]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute("SELECT attempts, finished_at IS NOT NULL FROM bridge.inbox").fetchall()


def ended(dsn: str) -> bool:
    with psycopg.connect(dsn) as connection:
        return connection.execute("SELECT 1 FROM bridge.inbox WHERE ended_at IS NOT NULL").fetchone() is not None


async def test_the_row_is_written_with_the_reply_and_not_before(shop: PostgresSettings, bridge_database: str) -> None:
    seen: list[int] = []

    async def look(event: Event) -> Result:
        seen.append(len(await asyncio.to_thread(rows, bridge_database)))
        return {"of": event.json()}

    event = make_event(payload=7)
    async with working(look, shop, effects=False) as queue:
        queue.add(event)
        assert await queue.outcomes(1) == [("ack", None)]
        queue.add(event)
        assert await queue.outcomes(2) == [("ack", None)] * 2
    assert seen == [0, 1]
    assert replies(bridge_database) == [{"of": 7}]


async def test_what_comes_again_is_claimed_since_it_may_have_killed_its_process(
    shop: PostgresSettings, bridge_database: str
) -> None:
    seen: list[list[tuple[int, bool]]] = []

    async def look(event: Event) -> Result:
        seen.append(await asyncio.to_thread(rows, bridge_database))
        return None

    async with working(look, shop, effects=False) as queue:
        queue.add(make_event(payload=1), attempt=2)
        await queue.outcomes(1)
    assert seen == [[(1, False)]]


async def test_a_failure_counts_and_the_last_one_is_dead_lettered(shop: PostgresSettings) -> None:
    async def fail(event: Event) -> Result:
        raise ValueError("the printer is out of paper")

    event = make_event(payload=1)
    async with working(fail, shop, effects=False, max_attempts=2, retry_initial="10ms") as queue:
        queue.add(event)
        assert await queue.outcomes(1) == [("retry", pytest.approx(0.01, abs=0.003))]
        queue.add(event, attempt=2)
        [_, (verb, failure)] = await queue.outcomes(2)
    assert verb == "dead_letter"
    assert isinstance(failure, Failure)
    assert (failure.code, failure.attempts) == ("error", 2)


async def test_a_rejection_is_dead_lettered_and_a_replay_runs(shop: PostgresSettings, bridge_database: str) -> None:
    runs: list[str | None] = []

    async def reject_once(event: Event) -> Result:
        runs.append(event.replay)
        if len(runs) == 1:
            raise Reject("no such order")
        return {"of": event.json()}

    event = make_event(payload=3)
    replay = event._replace(headers={**event.headers, **replay_mark()})
    async with working(reject_once, shop, effects=False) as queue:
        queue.add(event)
        [(verb, _)] = await queue.outcomes(1)
        assert verb == "dead_letter"
        await until(lambda: ended(bridge_database), "the inbox knows that the letter was taken")
        # A repeat runs, since nothing is looked up before, and is not stored; its replay is.
        queue.add(event)
        assert (await queue.outcomes(2))[1] == ("ack", None)
        assert replies(bridge_database) == []
        queue.add(replay)
        assert (await queue.outcomes(3))[2] == ("ack", None)
    assert replies(bridge_database) == [{"of": 3}]


async def test_a_reply_that_raises_is_a_failure(shop: PostgresSettings, bridge_database: str) -> None:
    async def refuse(event: Event) -> Result:
        return {"refuse": "P0001"}

    async with working(refuse, shop, effects=False) as queue:
        queue.add(make_event(payload=1))
        assert (await queue.outcomes(1))[0][0] == "retry"
    assert rows(bridge_database) == [(1, False)]


async def test_an_effect_of_one_that_has_none_is_told_to_the_author(shop: PostgresSettings) -> None:
    async def charge(event: Event) -> Result:
        async with effect("charge"):
            raise AssertionError("the effect must not be begun")

    async with working(charge, shop, effects=False, max_attempts=1) as queue:
        queue.add(make_event(payload=1))
        [(verb, failure)] = await queue.outcomes(1)
    assert verb == "dead_letter"
    assert isinstance(failure, Failure)
    assert "effect('charge'): workers.invoices.effects is false" in failure.reason


async def test_two_processes_that_both_get_every_event_reply_once(shop: PostgresSettings, bridge_database: str) -> None:
    events = [make_event(payload=n) for n in range(60)]
    before = figure("events_total", "invoices", outcome="handled") or 0
    async with working(echo, shop, effects=False) as one, working(echo, shop, effects=False) as other:
        for event in events:
            one.add(event)
            other.add(event)
        outcomes = [*await one.outcomes(60), *await other.outcomes(60)]
    assert {verb for verb, _ in outcomes} <= {"ack", "retry"}
    assert sorted(reply["of"] for reply in replies(bridge_database)) == list(range(60))
    assert (figure("events_total", "invoices", outcome="handled") or 0) - before == 60
