"""The inbox of a worker whose dead letters hold their key, on a real PostgreSQL."""

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from bridge.brokers.contract import Failure
from bridge.settings import PostgresSettings
from tests.support.until import until
from workers.claim import Claim, ClaimLostError, NotNow
from workers.inbox import Inbox
from workers.result import ReplyError

NO = Failure("rejected", "no")
RELEASE = "SELECT bridge.release_held(%s, %s, %s, 'somebody')"


@contextlib.asynccontextmanager
async def opened(
    settings: PostgresSettings, worker: str = "ledger", *, holds: bool = True, reply: str | None = None
) -> AsyncIterator[Inbox]:
    inbox = Inbox(worker, settings, concurrency=4, reply=reply, backoff=[0.01], holds=holds)
    try:
        await inbox.open()
        yield inbox
    finally:
        await inbox.close()


@pytest.fixture
async def inbox(shop: PostgresSettings) -> AsyncIterator[Inbox]:
    async with opened(shop) as inbox:
        yield inbox


@pytest.fixture
def events() -> list[str]:
    """Of one key, in its order, which is not that of their ids."""
    ids = [str(uuid.uuid4()) for _ in range(5)]
    return sorted(ids[:3], reverse=True) + ids[3:]


def rows(dsn: str, query: str, *parameters: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query.encode(), parameters).fetchall()


def held(dsn: str, worker: str = "ledger") -> list[str]:
    """The events that hold a key, in their order."""
    return [
        event
        for (event,) in rows(dsn, "SELECT event_id::text FROM bridge.held WHERE worker = %s ORDER BY place", worker)
    ]


async def claimed(inbox: Inbox, event: str, replay: str | None = None, key: str | None = "k") -> Claim:
    claim = await inbox.claim(event, replay, key)
    assert isinstance(claim, Claim), claim
    return claim


async def given_up(inbox: Inbox, event: str, replay: str | None = None, key: str | None = "k") -> None:
    await inbox.fail(await claimed(inbox, event, replay, key), NO)
    await inbox.forget(event, replay)


async def set_aside(inbox: Inbox, event: str, behind: str, replay: str | None = None, key: str = "k") -> None:
    found = await inbox.claim(event, replay, key)
    reason = f"its key waits for the event {behind}: replay that one first"
    assert found == NotNow("failed", failure=Failure("held", reason))
    await inbox.forget(event, replay)


async def handled(inbox: Inbox, event: str, replay: str | None = None, key: str | None = "k") -> None:
    assert await inbox.finish(await claimed(inbox, event, replay, key), {}) == "finished"


async def test_a_key_is_held_from_the_failure_on_and_its_replays_run_in_its_order(
    inbox: Inbox, bridge_database: str, events: list[str]
) -> None:
    first, second, third, later, _ = events
    await given_up(inbox, first)
    await set_aside(inbox, second, first)
    await set_aside(inbox, third, first)
    assert held(bridge_database) == [first, second, third]
    assert await inbox.held_keys() == 1
    await handled(inbox, first, "r1")
    await handled(inbox, second, "r2")
    await set_aside(inbox, later, third)
    await handled(inbox, third, "r3")
    await handled(inbox, later, "r4")
    assert held(bridge_database) == []
    assert await inbox.held_keys() == 0
    await handled(inbox, events[4])


async def test_other_keys_other_workers_and_what_has_no_key_pass(
    inbox: Inbox, shop: PostgresSettings, events: list[str]
) -> None:
    first, second, third, fourth, fifth = events
    await given_up(inbox, first)
    await handled(inbox, second, key="another")
    await given_up(inbox, third, key=None)
    await handled(inbox, fourth, key=None)
    await given_up(inbox, fifth, key="")
    assert await inbox.held_keys() == 1
    async with opened(shop, "mail") as mail:
        await handled(mail, second)
        assert await mail.held_keys() == 0


async def test_an_inbox_that_holds_no_keys_makes_no_rows(
    shop: PostgresSettings, bridge_database: str, events: list[str]
) -> None:
    async with opened(shop, holds=False) as inbox:
        await given_up(inbox, events[0])
        await handled(inbox, events[1])
    assert held(bridge_database) == []


async def test_a_replay_out_of_order_goes_aside_again_and_keeps_its_place(
    inbox: Inbox, bridge_database: str, events: list[str]
) -> None:
    first, second, third = events[:3]
    await given_up(inbox, first)
    await set_aside(inbox, second, first)
    await set_aside(inbox, third, first)
    await set_aside(inbox, third, first, "r1")
    # A repeat of that delivery is no other replay.
    assert await inbox.claim(third, "r1", "k") == NotNow("finished")
    assert held(bridge_database) == [first, second, third]
    for replay, event in enumerate((first, second, third)):
        await handled(inbox, event, f"again {replay}")
    assert held(bridge_database) == []


async def test_a_replay_that_fails_for_good_keeps_its_place(
    inbox: Inbox, bridge_database: str, events: list[str]
) -> None:
    first, second = events[:2]
    await given_up(inbox, first)
    await set_aside(inbox, second, first)
    await given_up(inbox, first, "r1")
    assert held(bridge_database) == [first, second]
    await set_aside(inbox, second, first, "r2")
    await handled(inbox, first, "r3")
    await handled(inbox, second, "r4")


async def test_a_replay_that_is_to_be_tried_again_holds_its_key_meanwhile(inbox: Inbox, events: list[str]) -> None:
    first, second = events[:2]
    await given_up(inbox, first)
    await inbox.release(await claimed(inbox, first, "r1"), counted=1)
    await set_aside(inbox, second, first)
    claim = await claimed(inbox, first, "r1")
    assert claim.attempt == 2
    await inbox.finish(claim, {})
    await handled(inbox, second, "r2")


async def test_what_was_set_aside_says_so_again_until_its_letter_is_taken(
    inbox: Inbox, bridge_database: str, events: list[str]
) -> None:
    first, second = events[:2]
    await inbox.fail(await claimed(inbox, first), NO)
    owed = await inbox.claim(second, None, "k")
    assert await inbox.claim(second, None, "k") == owed
    assert isinstance(owed, NotNow)
    assert owed.state == "failed"
    # The first is still owed, too, as after a kill between its failure and its letter.
    assert await inbox.claim(first, None, "k") == NotNow("failed", failure=Failure("rejected", "no", attempts=1))
    await inbox.forget(second)
    assert await inbox.claim(second, None, "k") == NotNow("finished")
    assert held(bridge_database) == [first, second]


async def test_what_had_begun_before_its_key_was_held_is_set_aside_with_its_attempts(
    inbox: Inbox, bridge_database: str, events: list[str]
) -> None:
    first, second, third = events[:3]
    await inbox.release(await claimed(inbox, second), counted=1, delay=60)
    unheard = await claimed(inbox, third)
    await given_up(inbox, first)
    reason = f"its key waits for the event {first}: replay that one first"
    assert await inbox.claim(second, None, "k") == NotNow("failed", failure=Failure("held", reason, attempts=1))
    # Of a claim whose answer was lost nothing ever ran.
    assert await inbox.claim(third, None, "k") == NotNow("failed", failure=Failure("held", reason))
    with pytest.raises(ClaimLostError):
        await inbox.finish(unheard, {})
    assert held(bridge_database) == [first, second, third]


async def test_what_another_process_runs_is_not_set_aside(shop: PostgresSettings, events: list[str]) -> None:
    first, second = events[:2]
    async with opened(shop) as one, opened(shop) as other:
        claim = await claimed(one, second)
        await given_up(other, first)
        assert await other.claim(second, None, "k") == NotNow("busy")
        await one.finish(claim, {})
        assert await other.claim(second, None, "k") == NotNow("finished")


async def test_two_processes_that_set_one_aside_at_once_agree(
    shop: PostgresSettings, bridge_database: str, events: list[str]
) -> None:
    async with opened(shop) as one, opened(shop) as other:
        await given_up(one, events[0])
        for event in events[1:]:
            found = await asyncio.gather(*(inbox.claim(event, None, "k") for inbox in (one, other)))
            assert {each.state for each in found if isinstance(each, NotNow)} <= {"failed", "busy"}
            assert NotNow("busy") not in found[:1] or NotNow("busy") not in found[1:]
    assert held(bridge_database) == events


async def test_a_failure_that_has_lost_its_claim_holds_nothing(
    shop: PostgresSettings, bridge_database: str, events: list[str]
) -> None:
    async with opened(shop) as one, opened(shop) as other:
        lost = await claimed(one, events[0])
        await one._session.close()
        taken: list[Claim | NotNow] = []

        async def is_free() -> bool:
            taken.append(await other.claim_alone(events[0], None, "k"))
            return isinstance(taken[-1], Claim)

        await until(is_free, "the event is free")
        with pytest.raises(ClaimLostError):
            await one.fail(lost, NO)
        assert held(bridge_database) == []
        claim = taken[-1]
        assert isinstance(claim, Claim)
        await other.fail(claim, NO)
    assert held(bridge_database) == [events[0]]


async def test_a_reply_that_raises_leaves_the_key_held(
    shop: PostgresSettings, bridge_database: str, events: list[str]
) -> None:
    async with opened(shop, reply="shop.rendered") as inbox:
        await given_up(inbox, events[0])
        claim = await claimed(inbox, events[0], "r1")
        with pytest.raises(ReplyError, match="no such order"):
            await inbox.finish(claim, {"refuse": "P0001"})
        assert held(bridge_database) == [events[0]]
        await inbox.finish(claim, {})
    assert held(bridge_database) == []


async def test_a_worker_that_holds_no_keys_any_more_frees_what_it_handles(
    shop: PostgresSettings, bridge_database: str, events: list[str]
) -> None:
    async with opened(shop) as inbox:
        await given_up(inbox, events[0])
        await given_up(inbox, events[1], key="other")
    async with opened(shop, holds=False) as inbox:
        await handled(inbox, events[0], "r1")
        await claimed(inbox, events[1], "r1")
    async with opened(shop, holds=False) as inbox:

        async def is_finished() -> bool:
            # The claim of the process that is gone is free a moment later.
            with contextlib.suppress(ClaimLostError):
                return await inbox.finish(Claim("ledger", events[1], None, 1), {}) == "finished"
            return False

        await until(is_finished, "it is finished without a claim")
    assert held(bridge_database) == []


async def test_pruning_leaves_what_holds_a_key(inbox: Inbox, bridge_database: str, events: list[str]) -> None:
    await given_up(inbox, events[0])
    await set_aside(inbox, events[1], events[0])
    await given_up(inbox, events[2], key=None)
    rows(
        bridge_database,
        "UPDATE bridge.inbox SET started_at = started_at - interval '2 days', ended_at = ended_at - interval '2 days'"
        " RETURNING 1",
    )
    assert await inbox.prune(timedelta(days=1)) == 1
    # Else a late repeat would be a new event, and run.
    assert await inbox.claim(events[0], None, "k") == NotNow("finished")
    assert await inbox.claim(events[1], None, "k") == NotNow("finished")


async def test_a_released_key_goes_on_and_its_letters_run_when_they_are_replayed(
    inbox: Inbox, bridge_database: str, events: list[str]
) -> None:
    await given_up(inbox, events[0])
    await set_aside(inbox, events[1], events[0])
    assert rows(bridge_database, RELEASE, "mail", "k", None) == [(0,)]
    assert rows(bridge_database, RELEASE, "ledger", "other", None) == [(0,)]
    assert rows(bridge_database, RELEASE, "ledger", "k", None) == [(2,)]
    await handled(inbox, events[2])
    await handled(inbox, events[1], "r1")
    await handled(inbox, events[0], "r2")
    audits = rows(bridge_database, "SELECT letter, action, person FROM bridge.dead_letter_audit ORDER BY id")
    assert audits == [(f"ledger:{event}", "released", "somebody") for event in events[:2]]


async def test_an_event_that_is_released_lets_the_next_of_its_key_be_replayed(
    inbox: Inbox, bridge_database: str, events: list[str]
) -> None:
    await given_up(inbox, events[0])
    await set_aside(inbox, events[1], events[0])
    await set_aside(inbox, events[2], events[0])
    assert rows(bridge_database, RELEASE, "ledger", "k", events[3]) == [(0,)]
    assert rows(bridge_database, RELEASE, "ledger", "k", events[0]) == [(1,)]
    await set_aside(inbox, events[2], events[1], "r1")
    await handled(inbox, events[1], "r2")
    await handled(inbox, events[2], "r3")
    await handled(inbox, events[3])


async def test_a_release_takes_along_what_is_being_set_aside(
    shop: PostgresSettings, bridge_database: str, events: list[str]
) -> None:
    async with opened(shop) as inbox:
        await given_up(inbox, events[0])
        token = inbox._session.token
        claim = "SELECT state FROM bridge.inbox_claim_holding('ledger', %s::uuid[], %s, %s, %s, '{}', '{}', false)"
        with psycopg.connect(bridge_database) as setting_aside:
            values = ([events[1]], [None], ["k"], token)
            assert setting_aside.execute(claim, values).fetchall() == [("failed",)]
            releasing = asyncio.create_task(asyncio.to_thread(rows, bridge_database, RELEASE, "ledger", "k", None))
            waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()"
            await until(lambda: bool(rows(bridge_database, waits)), "the release waits")
        assert await releasing == [(2,)]
        await handled(inbox, events[2])


async def test_what_is_set_aside_is_on_disk_before_the_broker_is_told(
    shop: PostgresSettings, bridge_database: str, events: list[str]
) -> None:
    """A claim need not be; what a broker has as a dead letter must not be forgotten here."""
    async with opened(shop) as inbox:
        await given_up(inbox, events[0])
        claim = "SELECT state FROM bridge.inbox_claim_holding('ledger', %s::uuid[], %s, %s, %s, '{}', '{}', false)"
        for keys, durability in ((["k", "k"], "on"), (["k", "other"], "on"), (["other", "other"], "off")):
            with psycopg.connect(bridge_database) as connection:
                pair = [str(uuid.uuid4()) for _ in range(2)]
                connection.execute("SET synchronous_commit = on")
                connection.execute(claim, (pair, [None, None], keys, inbox._session.token))
                assert connection.execute("SHOW synchronous_commit").fetchone() == (durability,)
                connection.rollback()


async def test_keys_of_any_length_and_text_hold(inbox: Inbox, events: list[str]) -> None:
    for key in ("k" * 100_000, "zo\u00eb", "a\x00b", "\ud800"):
        first, second = str(uuid.uuid4()), str(uuid.uuid4())
        await given_up(inbox, first, key=key)
        await set_aside(inbox, second, first, key=key)
    assert await inbox.held_keys() == 4


async def test_in_a_new_table_a_line_and_an_event_are_found_by_their_keys(
    shop: PostgresSettings, bridge_database: str
) -> None:
    async with opened(shop) as inbox:
        for n in range(100):
            pair = [str(uuid.uuid4()) for _ in range(2)]
            await given_up(inbox, pair[0], key=f"k{n}")
            await set_aside(inbox, pair[1], pair[0], key=f"k{n}")
            await handled(inbox, pair[0], "r", key=f"k{n}")
        assert await inbox.held_keys() == 100

    def read() -> dict[str, tuple[int, int]]:
        query = "SELECT indexrelname, idx_scan, idx_tup_read FROM pg_stat_user_indexes WHERE relname = 'held'"
        return {name: (scans, tuples) for name, scans, tuples in rows(bridge_database, query)}

    await until(lambda: read()["held_line"][0] >= 400, "the looks are counted")
    scans, tuples = read()["held_line"]
    assert tuples < 2 * scans


@dataclass
class Line:
    """One key of a worker, and the broker's part in it: what comes, what is a dead letter, what was handled."""

    inbox: Inbox
    chance: random.Random
    key: str
    coming: list[tuple[str, str | None]] = field(default_factory=list)
    """Events with the marks of their replays, in the order of the queue."""
    letters: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    handled: list[str] = field(default_factory=list)

    def publish(self) -> None:
        event = str(uuid.uuid4())
        self.order.append(event)
        self.coming.append((event, None))

    def replay(self, count: int) -> None:
        """Any of the letters, in any order."""
        chosen = self.chance.sample(self.letters, min(count, len(self.letters)))
        if self.chance.random() < 0.5:
            chosen.sort(key=self.letters.index)
        for event in chosen:
            self.letters.remove(event)
            self.coming.append((event, str(uuid.uuid4())))

    async def take(self, fails: float) -> None:
        """The next delivery, which fails for good, or is to be tried again, or is delivered twice."""
        event, replay = self.coming.pop(0)
        while isinstance(claim := await self.inbox.claim(event, replay, self.key), Claim):
            if self.chance.random() < 0.2:
                await self.inbox.release(claim, counted=claim.attempt)
            elif self.chance.random() < fails:
                await self.inbox.fail(claim, NO)
            else:
                await self.inbox.finish(claim, {})
                self.handled.append(event)
        if claim.state == "failed":
            self.letters.append(event)
            await self.inbox.forget(event, replay)
        else:
            assert claim.state == "finished"
        if self.chance.random() < 0.1:
            self.coming.insert(0, (event, replay))


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_fails_and_is_replayed_a_key_is_handled_in_its_order(inbox: Inbox, seed: int) -> None:
    chance = random.Random(seed)
    lines = [Line(inbox, chance, f"key-{n}") for n in range(3)]
    for _ in range(120):
        line = chance.choice(lines)
        match chance.randrange(5):
            case 0 | 1:
                line.publish()
            case 2:
                line.replay(chance.randrange(1, 4))
            case _ if line.coming:
                await line.take(fails=0.3)
    for line in lines:
        while line.coming or line.letters:
            while line.coming:
                await line.take(fails=0.0)
            line.letters.sort(key=line.order.index)
            line.replay(len(line.letters))
        assert line.handled == line.order
    assert await inbox.held_keys() == 0
