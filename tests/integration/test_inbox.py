"""The inbox on a real PostgreSQL: who gets an event, what finishing it means, and what a crash leaves."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest.mock import ANY

import psycopg
import pytest
import structlog
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from pydantic import SecretStr

from bridge.brokers.contract import Failure
from bridge.errors import DatabaseUnavailableError, PgbridgeError, PrivilegeError, SchemaError
from bridge.settings import PostgresSettings
from tests.support.until import until
from workers.claim import Claim, ClaimLostError, NotNow
from workers.inbox import Inbox
from workers.result import ReplyError


@contextlib.asynccontextmanager
async def opened(settings: PostgresSettings, reply: str | None = "shop.rendered") -> AsyncIterator[Inbox]:
    inbox = Inbox("invoices", settings, concurrency=4, reply=reply, backoff=[0.01])
    try:
        await inbox.open()
        yield inbox
    finally:
        await inbox.close()


async def claimed(inbox: Inbox, event_id: str) -> Claim:
    claim = await inbox.claim(event_id)
    assert isinstance(claim, Claim)
    return claim


async def taken_over(inbox: Inbox, event_id: str) -> Claim:
    """Claims an event whose session has just been closed, which the server learns a moment later."""
    claim: Claim | NotNow | None = None

    async def is_free() -> bool:
        nonlocal claim
        claim = await inbox.claim_alone(event_id)
        return isinstance(claim, Claim)

    await until(is_free, "the event is free")
    assert isinstance(claim, Claim)
    return claim


def rows(dsn: str, query: str, *parameters: object) -> list[dict[str, Any]]:
    with psycopg.connect(dsn, row_factory=dict_row) as connection:
        return connection.execute(query.encode(), parameters).fetchall()


def end_sessions(dsn: str, application_name: str = "pgbridge-worker invoices") -> None:
    rows(
        dsn,
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE application_name = %s AND datname = current_database()",
        application_name,
    )


@pytest.fixture
def event_id() -> str:
    return str(uuid.uuid4())


async def test_a_finished_event_has_its_reply_and_is_never_run_again(
    shop: PostgresSettings, bridge_database: str, event_id: str
) -> None:
    async with opened(shop) as inbox, opened(shop) as other:
        await inbox.finish(await claimed(inbox, event_id), {"path": "a.pdf"})
        assert await inbox.claim(event_id) == NotNow("finished")
        assert await other.claim(event_id) == NotNow("finished")
    assert rows(bridge_database, "SELECT result FROM shop.invoice") == [{"result": {"path": "a.pdf"}}]
    # What the reply emits is in the same transaction.
    assert rows(bridge_database, "SELECT topic FROM bridge.outbox") == [{"topic": "shop.invoice.rendered"}]


async def test_no_result_reaches_the_reply_as_null(shop: PostgresSettings, bridge_database: str, event_id: str) -> None:
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(
            "CREATE FUNCTION shop.noted(event_id uuid, result jsonb) RETURNS void SECURITY DEFINER LANGUAGE sql"
            " AS 'INSERT INTO shop.invoice VALUES (event_id, result)'"
        )
    async with opened(shop, "shop.noted") as inbox:
        await inbox.finish(await claimed(inbox, event_id), None)
    assert rows(bridge_database, "SELECT result IS NULL AS none FROM shop.invoice") == [{"none": True}]


async def test_an_event_in_hand_is_busy_for_others(shop: PostgresSettings, event_id: str) -> None:
    async with opened(shop) as inbox, opened(shop) as other:
        claim = await claimed(inbox, event_id)
        assert await other.claim(event_id) == NotNow("busy")
        await inbox.release(claim, counted=claim.attempt)
        assert (await claimed(other, event_id)).attempt == 2


async def test_two_workers_of_different_names_both_handle_an_event(shop: PostgresSettings, event_id: str) -> None:
    payments = Inbox("payments", shop, concurrency=1)
    async with opened(shop) as inbox:
        await payments.open()
        try:
            await inbox.finish(await claimed(inbox, event_id), {})
            assert (await claimed(payments, event_id)).attempt == 1
        finally:
            await payments.close()


async def test_of_many_claims_at_once_exactly_one_is_granted(shop: PostgresSettings, event_id: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        inboxes = [await stack.enter_async_context(opened(shop)) for _ in range(5)]
        claims = await asyncio.gather(*(inbox.claim(event_id) for inbox in inboxes))
        assert sum(isinstance(claim, Claim) for claim in claims) == 1
        assert {claim for claim in claims if not isinstance(claim, Claim)} == {NotNow("busy")}


async def test_the_claim_of_an_ended_session_is_taken_over_at_once_and_fenced(
    shop: PostgresSettings, bridge_database: str, event_id: str
) -> None:
    async with opened(shop) as inbox, opened(shop) as other:
        lost = await claimed(inbox, event_id)
        await inbox._session.close()
        taken = await taken_over(other, event_id)
        assert taken.attempt == 2
        with pytest.raises(ClaimLostError):
            await inbox.finish(lost, {"by": "the first"})
        with pytest.raises(ClaimLostError):
            await inbox.begin_effect(lost, "charge", None)
        await inbox.release(lost, counted=0)
        await other.finish(taken, {"by": "the second"})
    assert rows(bridge_database, "SELECT result FROM shop.invoice") == [{"result": {"by": "the second"}}]


async def test_a_process_whose_token_is_gone_takes_a_new_one_before_it_claims(
    shop: PostgresSettings, bridge_database: str, event_id: str
) -> None:
    async with opened(shop) as inbox, opened(shop) as other:
        before = inbox._session.token
        await asyncio.to_thread(end_sessions, bridge_database)
        while True:
            try:
                claim = await claimed(inbox, event_id)
                break
            except DatabaseUnavailableError:
                continue  # the pool hands out each of its dead connections once
        assert claim.token == inbox._session.token != before
        while True:
            try:
                assert await other.claim(event_id) == NotNow("busy")
                break
            except DatabaseUnavailableError:
                continue


async def test_work_that_survives_its_session_may_finish_if_nobody_took_over(
    shop: PostgresSettings, bridge_database: str, event_id: str
) -> None:
    async with opened(shop) as inbox:
        claim = await claimed(inbox, event_id)
        await inbox._session.close()
        await inbox.finish(claim, {})
    assert len(rows(bridge_database, "SELECT 1 FROM shop.invoice")) == 1


async def test_a_claim_whose_answer_was_lost_is_granted_again_and_counts_once(
    shop: PostgresSettings, event_id: str
) -> None:
    async with opened(shop) as inbox:
        await claimed(inbox, event_id)
        assert (await claimed(inbox, event_id)).attempt == 1
        # Also when the session ended with the answer.
        before = inbox._session.token
        await inbox._session.renew(instead_of=before)
        assert (await claimed(inbox, event_id)).token != before
        assert (await claimed(inbox, event_id)).attempt == 1


async def test_finishing_again_after_a_commit_whose_answer_was_lost_replies_only_once(
    shop: PostgresSettings, bridge_database: str, event_id: str
) -> None:
    async with opened(shop) as inbox:
        claim = await claimed(inbox, event_id)
        await inbox.finish(claim, {})
        with pytest.raises(ClaimLostError):
            await inbox.finish(claim, {})
        assert await inbox.claim(event_id) == NotNow("finished")
    assert len(rows(bridge_database, "SELECT 1 FROM shop.invoice")) == 1


@pytest.mark.parametrize("sqlstate", ["P0001", "22023", "23503", "42501", "57P01", "53100", "58030", "08006"])
async def test_a_reply_that_raises_leaves_the_event_unfinished(
    shop: PostgresSettings, bridge_database: str, event_id: str, sqlstate: str
) -> None:
    async with opened(shop) as inbox:
        claim = await claimed(inbox, event_id)
        with pytest.raises(ReplyError, match=rf"shop\.rendered refuses the result: no such order .*{sqlstate}"):
            await inbox.finish(claim, {"refuse": sqlstate})
        await inbox.release(claim, counted=claim.attempt)
        await inbox.finish(await claimed(inbox, event_id), {"path": "a.pdf"})
    assert rows(bridge_database, "SELECT result FROM shop.invoice") == [{"result": {"path": "a.pdf"}}]


async def test_a_server_that_takes_no_writes_is_not_the_replys_fault(shop: PostgresSettings, event_id: str) -> None:
    async with opened(shop) as inbox:
        claim = await claimed(inbox, event_id)
        with pytest.raises(PgbridgeError):
            await inbox.finish(claim, {"refuse": "25006"})
        await inbox.finish(claim, {})


async def test_a_server_that_ends_the_session_is_not_the_replys_fault(
    shop: PostgresSettings, bridge_database: str, event_id: str
) -> None:
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(
            "CREATE FUNCTION shop.slow(event_id uuid, result jsonb) RETURNS void SECURITY DEFINER LANGUAGE sql"
            " AS 'SELECT pg_sleep(60)'"
        )
    async with opened(shop, "shop.slow") as inbox:
        finishing = asyncio.ensure_future(inbox.finish(await claimed(inbox, event_id), {}))

        def replying() -> bool:
            return bool(rows(bridge_database, "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))

        await until(replying, "the reply runs")
        await asyncio.to_thread(end_sessions, bridge_database)
        with pytest.raises(DatabaseUnavailableError):
            await finishing


async def test_a_result_that_jsonb_cannot_hold_is_the_handlers_fault(shop: PostgresSettings, event_id: str) -> None:
    async with opened(shop) as inbox:
        claim = await claimed(inbox, event_id)
        with pytest.raises(ReplyError, match="22P05"):
            await inbox.finish(claim, {"name": "a\x00b"})


async def test_replies_that_deadlock_are_repeated_until_each_is_done(
    shop: PostgresSettings, bridge_database: str
) -> None:
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(
            "CREATE TABLE shop.counter (id int PRIMARY KEY, n int); INSERT INTO shop.counter VALUES (1,0),(2,0)"
        )
        admin.execute(
            "CREATE FUNCTION shop.count(event_id uuid, result jsonb) RETURNS void SECURITY DEFINER LANGUAGE plpgsql"
            " SET deadlock_timeout = '10ms' AS $$ BEGIN"
            " UPDATE shop.counter SET n = n + 1 WHERE id = (result ->> 'first')::int;"
            " PERFORM pg_sleep(0.05);"
            " UPDATE shop.counter SET n = n + 1 WHERE id = 3 - (result ->> 'first')::int; END $$"
        )
    async with opened(shop, "shop.count") as inbox:
        one, two = [await claimed(inbox, str(uuid.uuid4())) for _ in range(2)]
        await asyncio.gather(inbox.finish(one, {"first": 1}), inbox.finish(two, {"first": 2}))
    assert rows(bridge_database, "SELECT n FROM shop.counter") == [{"n": 2}, {"n": 2}]


async def test_an_effect_keeps_its_key_its_start_and_its_result_over_attempts(
    shop: PostgresSettings, event_id: str
) -> None:
    async with opened(shop) as inbox:
        claim = await claimed(inbox, event_id)
        first = await inbox.begin_effect(claim, "charge", None)
        assert first.idempotency_key == f"invoices:{event_id}:charge"
        assert first.result is None
        await inbox.release(claim, counted=claim.attempt)

        claim = await claimed(inbox, event_id)
        second = await inbox.begin_effect(claim, "charge", None)
        assert replace(second, age=first.age) == first
        assert second.age > first.age
        second.result = {"id": "ch_1"}
        await inbox.end_effect(claim, second)
        await inbox.begin_effect(claim, "receipt", None)
        await inbox.release(claim, counted=claim.attempt)

        claim = await claimed(inbox, event_id)
        assert (await inbox.begin_effect(claim, "charge", None)).result == {"id": "ch_1"}
        assert (await inbox.begin_effect(claim, "receipt", None)).result is None


async def test_an_effect_that_begins_again_does_so_once_for_each_refusal(
    shop: PostgresSettings, bridge_database: str, event_id: str
) -> None:
    """The answer to the first call may be lost, and then the call is made again."""
    async with opened(shop) as inbox:
        claim = await claimed(inbox, event_id)
        refused = await inbox.begin_effect(claim, "charge", None)
        assert await inbox.begin_effect_again(claim, refused, None) == replace(refused, age=ANY)  # nothing was refused
        refused.result = {"declined": True}
        await inbox.end_effect(claim, refused)
        again = await inbox.begin_effect_again(claim, refused, None)
        assert (again.idempotency_key, again.result) == (f"invoices:{event_id}:charge:2", None)
        assert again.started_at > refused.started_at
        assert await inbox.begin_effect_again(claim, refused, None) == replace(again, age=ANY)
        [row] = rows(bridge_database, "SELECT effects -> 'charge' -> 'refused' AS refused FROM bridge.inbox")
        assert [each["idempotency_key"] for each in row["refused"]] == [refused.idempotency_key]
        assert [each["result"] for each in row["refused"]] == [{"declined": True}]
        with pytest.raises(ClaimLostError):
            await inbox.begin_effect_again(replace(claim, attempt=9), again, None)


@pytest.mark.parametrize("outcome", [{"id": "ch_1"}, None])
async def test_who_finds_out_what_became_of_an_effect_puts_that_on_record(
    shop: PostgresSettings, bridge_database: str, event_id: str, outcome: dict[str, str] | None
) -> None:
    def settle(key: str, outcome: object) -> bool:
        query = "SELECT bridge.settle_effect('invoices', %s, %s, %s) AS settled"
        [row] = rows(bridge_database, query, event_id, key, None if outcome is None else Jsonb(outcome))
        return bool(row["settled"])

    async with opened(shop) as inbox:
        claim = await claimed(inbox, event_id)
        effect = await inbox.begin_effect(claim, "charge", None)
        assert not settle(effect.idempotency_key, outcome)  # it is being handled
        await inbox.release(claim, counted=1)
        assert not settle("another", outcome)
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="and not a JSON string"):
            settle(effect.idempotency_key, "ch_1")
        assert settle(effect.idempotency_key, outcome)
        assert not settle(effect.idempotency_key, {"id": "another"})  # it has an outcome

        found = await inbox.begin_effect(await claimed(inbox, event_id), "charge", None)
        key = effect.idempotency_key + ("" if outcome else ":2")
        assert (found.idempotency_key, found.result) == (key, outcome)


async def test_an_effect_of_a_process_that_died_can_be_settled(
    shop: PostgresSettings, bridge_database: str, event_id: str
) -> None:
    async with opened(shop) as inbox:
        effect = await inbox.begin_effect(await claimed(inbox, event_id), "charge", None)
        query = "SELECT bridge.settle_effect('invoices', %s, %s, '{}') AS settled"
        assert rows(bridge_database, query, event_id, effect.idempotency_key) == [{"settled": False}]
        end_sessions(bridge_database)
        assert rows(bridge_database, query, event_id, effect.idempotency_key) == [{"settled": True}]


async def test_pruning_takes_old_finished_events_in_chunks_and_leaves_the_rest(
    shop: PostgresSettings, bridge_database: str
) -> None:
    async with opened(shop, None) as inbox:
        for _ in range(25):
            await inbox.finish(await claimed(inbox, str(uuid.uuid4())), None)
        await claimed(inbox, str(uuid.uuid4()))
        with psycopg.connect(bridge_database, autocommit=True) as admin:
            admin.execute("UPDATE bridge.inbox SET started_at = started_at - interval '2 days'")
            admin.execute(
                "UPDATE bridge.inbox SET finished_at = finished_at - interval '2 days' WHERE ctid IN"
                " (SELECT ctid FROM bridge.inbox WHERE finished_at IS NOT NULL LIMIT 20)"
            )
        assert await inbox.prune(timedelta(days=1), chunk=7) == 20
        assert await inbox.prune(timedelta(days=1), chunk=7) == 0
    assert rows(bridge_database, "SELECT count(*) AS n FROM bridge.inbox") == [{"n": 6}]


async def test_a_dead_letter_that_is_owed_tells_the_attempts_that_ran_and_not_the_claim_that_gave_up(
    shop: PostgresSettings,
) -> None:
    """The claim after the last attempt, which died with its process, runs nothing and counts as none."""
    event_id = str(uuid.uuid4())
    async with opened(shop, None) as inbox:
        claim = await claimed(inbox, event_id)
        await inbox.release(claim, counted=6)
        last = await claimed(inbox, event_id)
        assert last.attempt == 7
        given_up = Failure("attempts_exhausted", "the process died in each", attempts=6)
        await inbox.fail(last, given_up)
        assert await inbox.claim(event_id) == NotNow("failed", failure=given_up)


async def test_a_replay_starts_afresh_although_nobody_heard_that_the_dead_letter_was_taken(
    shop: PostgresSettings, bridge_database: str
) -> None:
    """A process that is killed once the broker has the letter leaves it owed; a replay shows that it was taken."""
    event_id = str(uuid.uuid4())
    async with opened(shop, None) as inbox:
        await inbox.fail(await claimed(inbox, event_id), Failure("rejected", "no"))
        assert isinstance(owed := await inbox.claim(event_id), NotNow)
        assert owed.state == "failed"
        claim = await inbox.claim(event_id, "first replay")
        assert isinstance(claim, Claim)
        assert claim.attempt == 1
        await inbox.fail(claim, Failure("rejected", "no again"))
        # As the first process would have said it, had the database kept it waiting until now.
        await inbox.forget(event_id)
        assert isinstance(owed := await inbox.claim(event_id, "first replay"), NotNow)
        assert owed == NotNow("failed", failure=Failure("rejected", "no again", attempts=1))
        await inbox.forget(event_id, "first replay")
        for repeated in (None, "first replay"):
            assert await inbox.claim(event_id, repeated) == NotNow("finished")
        with psycopg.connect(bridge_database, autocommit=True) as admin:
            admin.execute("UPDATE bridge.inbox SET started_at = started_at - interval '2 days'")
            admin.execute("UPDATE bridge.inbox SET ended_at = ended_at - interval '2 days'")
        assert await inbox.prune(timedelta(days=1)) == 1


async def test_a_missing_reply_function_fails_the_start(shop: PostgresSettings) -> None:
    with pytest.raises(
        SchemaError, match=r"workers\.invoices\.reply: there is no function shop\.missing\(uuid, jsonb\)"
    ):
        async with opened(shop, "shop.missing"):
            pass


async def test_a_reply_function_that_may_not_be_called_fails_the_start(
    shop: PostgresSettings, bridge_database: str
) -> None:
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute("REVOKE EXECUTE ON FUNCTION shop.rendered FROM PUBLIC")
    with pytest.raises(PrivilegeError, match=r"GRANT EXECUTE ON FUNCTION shop\.rendered\(uuid, jsonb\)"):
        async with opened(shop):
            pass


async def test_a_database_without_the_schema_fails_the_start(database: str) -> None:
    with pytest.raises(SchemaError, match="pgbridge migrate"):
        async with opened(PostgresSettings(dsn=SecretStr(database)), None):
            pass


async def test_a_worker_may_touch_the_inbox_only_through_its_functions(shop: PostgresSettings) -> None:
    with psycopg.connect(shop.dsn.get_secret_value(), autocommit=True) as connection:
        for statement in ("SELECT 1 FROM bridge.inbox", "DELETE FROM bridge.inbox", "SELECT 1 FROM bridge.outbox"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)


@pytest.mark.parametrize("reply", ["shop.rendered", None])
async def test_what_ends_together_is_one_transaction(
    shop: PostgresSettings, bridge_database: str, reply: str | None
) -> None:
    """What cannot be stored together is tried again alone, so a mistake in the query of all would go unseen."""
    with structlog.testing.capture_logs() as logged:
        async with opened(shop, reply) as inbox:
            claims = await asyncio.gather(*(claimed(inbox, str(uuid.uuid4())) for _ in range(20)))
            lost = replace(claims[7], attempt=9)
            ends = [inbox.finish(claim, {"path": "a.pdf"}) for claim in (*claims[:7], lost, *claims[8:])]
            ended = await asyncio.gather(*ends, return_exceptions=True)
    assert [end for end in ended if not isinstance(end, ClaimLostError)] == ["finished"] * 19
    assert logged == []
    if reply is None:  # with one, each has a savepoint of its own
        finished = "SELECT count(DISTINCT xmin::text) AS together FROM bridge.inbox WHERE finished_at IS NOT NULL"
        assert rows(bridge_database, finished) == [{"together": 1}]


async def test_of_ends_that_share_a_query_only_the_refused_one_fails(
    shop: PostgresSettings, bridge_database: str
) -> None:
    async with opened(shop, reply=None) as inbox:
        events = [str(uuid.uuid4()) for _ in range(8)]
        claims = await asyncio.gather(*(claimed(inbox, event) for event in events))
        # PostgreSQL's jsonb holds no NUL.
        results: list[dict[str, str]] = [{"n": "\0" if n == 5 else "x"} for n in range(8)]
        ends = await asyncio.gather(
            *(inbox.finish(claim, result) for claim, result in zip(claims, results, strict=True)),
            return_exceptions=True,
        )
        assert [end if isinstance(end, str) else type(end) for end in ends] == [
            ReplyError if n == 5 else "finished" for n in range(8)
        ]
        await inbox.release(claims[5], counted=1)
        assert (await claimed(inbox, events[5])).attempt == 2
        assert [await inbox.claim(event) for event in events[:5]] == [NotNow("finished")] * 5


async def test_claims_of_many_at_once_by_two_processes_give_each_event_to_one(shop: PostgresSettings) -> None:
    events = [str(uuid.uuid4()) for _ in range(300)]
    async with opened(shop, reply=None) as one, opened(shop, reply=None) as other:
        claims = await asyncio.gather(*(inbox.claim(event) for event in events for inbox in (one, other)))
    for first, second in zip(claims[::2], claims[1::2], strict=True):
        assert {type(first), type(second)} == {Claim, NotNow}
        assert NotNow("busy") in (first, second)


async def test_in_a_new_inbox_an_event_is_found_by_its_key(shop: PostgresSettings, bridge_database: str) -> None:
    """By the other index each look reads all events of the worker, and its plan is kept until statistics come."""
    events = [str(uuid.uuid4()) for _ in range(200)]
    async with opened(shop) as inbox:
        for event in events:
            claim = await claimed(inbox, event)
            await (inbox.finish(claim, {}) if event < "8" else inbox.release(claim, counted=1))

    def used() -> dict[str, int]:
        return {
            row["indexrelname"]: row["idx_scan"]
            for row in rows(bridge_database, "SELECT indexrelname, idx_scan FROM pg_stat_user_indexes")
        }

    # The sessions have told it by the time that they are gone.
    await until(lambda: used()["inbox_pkey"] >= 2 * len(events), "the looks are counted")
    assert used()["inbox_started"] == 0
