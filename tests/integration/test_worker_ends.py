"""Ends that share a transaction: replies that raise, wait or take long hold up and undo no others."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import psycopg
import pytest

from bridge.brokers.contract import Failure
from bridge.settings import PostgresSettings
from tests.support.until import until
from workers.claim import Claim, ClaimLostError, NotNow
from workers.ends import TOGETHER
from workers.inbox import Inbox
from workers.result import ReplyError

REPLIES = """
CREATE TABLE shop.note (event_id uuid, result jsonb, transaction xid8 DEFAULT pg_current_xact_id());
CREATE FUNCTION shop.noted(event_id uuid, result jsonb) RETURNS void SECURITY DEFINER LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO shop.note VALUES (event_id, result);
  IF result ? 'raise' THEN RAISE EXCEPTION 'no such order'; END IF;
  IF result ? 'wait' THEN PERFORM pg_advisory_xact_lock(4711); END IF;
  IF result ? 'sleep' THEN PERFORM pg_sleep((result ->> 'sleep')::float8); END IF;
END $$;
CREATE TABLE shop.orders (id int PRIMARY KEY);
INSERT INTO shop.orders VALUES (1);
CREATE TABLE shop.line (order_id int REFERENCES shop.orders DEFERRABLE INITIALLY DEFERRED);
CREATE FUNCTION shop.deferred(event_id uuid, result jsonb) RETURNS void SECURITY DEFINER LANGUAGE sql AS
  'INSERT INTO shop.line VALUES ((result ->> ''order'')::int)';
"""

NOTE_ENDS = """
CREATE FUNCTION shop.note_end() RETURNS trigger SECURITY DEFINER LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO shop.note VALUES (new.event_id, new.result);
  RETURN NULL;
END $$;
CREATE TRIGGER note AFTER UPDATE ON bridge.inbox FOR EACH ROW EXECUTE FUNCTION shop.note_end();
"""


@contextlib.asynccontextmanager
async def opened(shop: PostgresSettings, reply: str | None = "shop.noted", **values: Any) -> AsyncIterator[Inbox]:
    inbox = Inbox("invoices", shop, concurrency=16, reply=reply, **values)
    try:
        await inbox.open()
        yield inbox
    finally:
        await inbox.close()


@pytest.fixture(autouse=True)
def noted(shop: PostgresSettings, bridge_database: str) -> None:
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(REPLIES)


async def claimed(inbox: Inbox, count: int) -> list[Claim]:
    claims = await asyncio.gather(*(inbox.claim(str(uuid.uuid4())) for _ in range(count)))
    return [claim for claim in claims if isinstance(claim, Claim)]


async def finish(inbox: Inbox, claims: Sequence[Claim], results: Sequence[dict[str, Any]]) -> list[object]:
    ends = [inbox.finish(claim, result) for claim, result in zip(claims, results, strict=True)]
    return list(await asyncio.gather(*ends, return_exceptions=True))


def notes(dsn: str) -> list[tuple[Any, Any]]:
    with psycopg.connect(dsn) as connection:
        return connection.execute("SELECT result, transaction::text FROM shop.note").fetchall()


async def test_replies_that_are_ready_together_share_a_transaction(
    shop: PostgresSettings, bridge_database: str
) -> None:
    async with opened(shop) as inbox:
        claims = await claimed(inbox, TOGETHER)
        assert await finish(inbox, claims, [{"n": n} for n in range(TOGETHER)]) == ["finished"] * TOGETHER
    stored = notes(bridge_database)
    assert sorted(result["n"] for result, _ in stored) == list(range(TOGETHER))
    assert len({transaction for _, transaction in stored}) <= 2  # the first is not waited for


async def test_ends_without_a_reply_share_a_transaction_too(shop: PostgresSettings, bridge_database: str) -> None:
    async with opened(shop, None) as inbox:
        claims = await claimed(inbox, TOGETHER)
        with psycopg.connect(bridge_database, autocommit=True) as admin:
            admin.execute(NOTE_ENDS)
        assert await finish(inbox, claims, [{"n": n} for n in range(TOGETHER)]) == ["finished"] * TOGETHER
    assert len({transaction for _, transaction in notes(bridge_database)}) <= 2  # the first is not waited for


async def test_a_reply_that_raises_undoes_itself_and_no_other(shop: PostgresSettings, bridge_database: str) -> None:
    async with opened(shop) as inbox:
        claims = await claimed(inbox, 20)
        results = [{"n": n} | ({"raise": True} if n % 5 == 3 else {}) for n in range(20)]
        ends = await finish(inbox, claims, results)
        assert [type(end) for end in ends] == [ReplyError if "raise" in result else str for result in results]
        assert {str(end) for end in ends if isinstance(end, ReplyError)} == {
            "shop.noted refuses the result: no such order (SQLSTATE P0001)"
        }
        for claim, result in zip(claims, results, strict=True):
            if "raise" in result:
                await inbox.release(claim, counted=1)
                assert isinstance(await inbox.claim(claim.event_id), Claim)
            else:
                assert await inbox.claim(claim.event_id) == NotNow("finished")
    assert sorted(result["n"] for result, _ in notes(bridge_database)) == [
        result["n"] for result in results if "raise" not in result
    ]


async def test_a_commit_that_is_refused_fails_those_alone_whose_it_is(
    shop: PostgresSettings, bridge_database: str
) -> None:
    """A deferred constraint is looked at when no savepoint is left to go back to."""
    async with opened(shop, "shop.deferred") as inbox:
        claims = await claimed(inbox, 6)
        ends = await finish(inbox, claims, [{"order": 2 if n == 4 else 1} for n in range(6)])
    assert [type(end) for end in ends] == [ReplyError if n == 4 else str for n in range(6)]
    with psycopg.connect(bridge_database) as connection:
        assert connection.execute("SELECT count(*) FROM shop.line").fetchone() == (5,)


async def test_a_reply_that_waits_for_a_lock_holds_up_no_other_for_long(
    shop: PostgresSettings, bridge_database: str
) -> None:
    with psycopg.connect(bridge_database) as admin:
        admin.execute("SELECT pg_advisory_xact_lock(4711)")
        async with opened(shop, reply_timeout=60.0) as inbox:
            first, *others = await claimed(inbox, 12)
            waiting = asyncio.ensure_future(inbox.finish(first, {"wait": True}))
            async with asyncio.timeout(20):  # of the reply's 60 s
                assert await finish(inbox, others, [{} for _ in others]) == ["finished"] * len(others)
            assert not waiting.done()
            admin.rollback()
            assert await waiting == "finished"
    assert len(notes(bridge_database)) == 12


async def test_slow_replies_run_side_by_side(shop: PostgresSettings, bridge_database: str) -> None:
    """One after the other in a shared transaction, each batch of them would take `concurrency` times as long."""

    def sleeping() -> int:
        with psycopg.connect(bridge_database) as admin:
            row = admin.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'").fetchone()
        assert row is not None
        return int(row[0])

    async with opened(shop) as inbox:
        # The mean is known after a few.
        for claim in await claimed(inbox, 3):
            await inbox.finish(claim, {"sleep": 0.1})
        claims = await claimed(inbox, 8)
        ends, _ = await asyncio.gather(
            finish(inbox, claims, [{"sleep": 1.5} for _ in claims]),
            until(lambda: sleeping() == 8, "all of them run at once"),
        )
        assert ends == ["finished"] * 8


async def test_what_fails_together_is_given_up_together(shop: PostgresSettings, bridge_database: str) -> None:
    async with opened(shop, None) as inbox:
        claims = await claimed(inbox, 30)
        with psycopg.connect(bridge_database, autocommit=True) as admin:
            admin.execute(NOTE_ENDS)
        failure = Failure("rejected", "no", "")
        await asyncio.gather(
            *(
                inbox.fail(claim, failure) if n % 3 == 0 else inbox.release(claim, counted=1, delay=60.0)
                for n, claim in enumerate(claims)
            )
        )
        assert len({transaction for _, transaction in notes(bridge_database)}) <= 2
        for n, claim in enumerate(claims):
            found = await inbox.claim(claim.event_id)
            assert isinstance(found, NotNow)
            assert found.state == ("failed" if n % 3 == 0 else "early")


def unclaimed(event_id: str) -> Claim:
    return Claim("invoices", event_id, None, 1)


async def test_of_two_runs_without_a_claim_one_is_stored(shop: PostgresSettings, bridge_database: str) -> None:
    events = [str(uuid.uuid4()) for _ in range(40)]
    async with opened(shop) as one, opened(shop) as other:
        ends = await asyncio.gather(
            *(inbox.finish(unclaimed(event), {"of": event}) for event in events for inbox in (one, other)),
            return_exceptions=True,
        )
        for first, second in zip(ends[::2], ends[1::2], strict=True):
            kinds = [end if isinstance(end, str) else type(end) for end in (first, second)]
            assert "finished" in kinds
            assert [kind for kind in kinds if kind != "finished"] in (["repeated"], [ClaimLostError])
        assert [await one.claim(event) for event in events] == [NotNow("finished")] * 40
    assert sorted(result["of"] for result, _ in notes(bridge_database)) == sorted(events)


async def test_a_run_without_a_claim_gives_way_to_one_with_a_claim(
    shop: PostgresSettings, bridge_database: str
) -> None:
    async with opened(shop) as inbox, opened(shop) as other:
        [claim] = await claimed(other, 1)
        with pytest.raises(ClaimLostError):
            await inbox.finish(unclaimed(claim.event_id), {"by": "the one without"})
        await other.release(claim, counted=1)
        assert await inbox.finish(unclaimed(claim.event_id), {"by": "the one without"}) == "finished"
        with pytest.raises(ClaimLostError):
            await other.finish(claim, {"by": "the one with"})
    assert [result for result, _ in notes(bridge_database)] == [{"by": "the one without"}]


async def test_an_event_that_was_given_up_is_not_finished_without_a_claim(shop: PostgresSettings) -> None:
    async with opened(shop) as inbox:
        [claim] = await claimed(inbox, 1)
        await inbox.fail(claim, Failure("rejected", "no", ""))
        late = unclaimed(claim.event_id)
        with pytest.raises(ClaimLostError):  # its letter is owed: come back with a claim
            await inbox.finish(late, {})
        await inbox.forget(claim.event_id)
        assert await inbox.finish(late, {}) == "repeated"
