"""The short form of the fault suite; `make faults` is the long one."""

from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from bridge.brokers.contract import Letter
from tests.faults.audit import Audit
from tests.faults.brokers import RabbitMQ
from tests.faults.fates import FATES
from tests.faults.handlers import FORGOTTEN
from tests.faults.kinds import ALL, KINDS
from tests.faults.load import MOVED, PLACED, SCHEMA, Emitted, Ledger
from tests.faults.outcomes import ORDERED, outcomes
from tests.faults.run import deck, play
from tests.faults.world import POSTGRES
from tests.support.servers import PostgresServer, RabbitMQServer

SHORT = [
    "broker: slow to confirm, 6-9 s",
    "bridge: kill -9",
    "log: poison",
    "database: wire cut",
    "worker: kill -9",
    "worker: many events fail",
    "workers' wire: cut",
    "broker: wire cut",
    "database: kill -9 with both bridges",
    "second sink: full 4-8 s",
    "database: sessions ended",
    "bridge: SIGTERM",
    "worker: SIGTERM",
]
"""Without the kinds that take long: a broker's restart, a session's end, a swallowing wire, a refused dead letter."""


@pytest.mark.rabbitmq
async def test_nothing_is_lost_repeated_or_out_of_order_through_some_faults(
    server_folder: Path, rabbitmq: RabbitMQServer, unique: str, tmp_path: Path
) -> None:
    by_name = {kind.name: kind for kind in KINDS}
    with PostgresServer(server_folder / unique, settings=POSTGRES) as postgres:
        report = await play(postgres, RabbitMQ(rabbitmq), tmp_path, [by_name[name] for name in SHORT], seed=7)
    assert report.passed, (report.line, report.wrong[:20])
    assert report.faults == len(SHORT)
    assert report.committed > 100


@pytest.mark.parametrize("faults", [1, 10, 40, 100, 137])
@pytest.mark.parametrize("broker", ALL)
def test_a_deck_has_as_many_faults_as_asked_for_and_each_kind_once_they_suffice(faults: int, broker: str) -> None:
    cards = deck(faults, 1, broker)
    kinds = [kind for kind in KINDS if broker in kind.brokers]
    assert len(cards) == faults
    if faults >= len(kinds):
        assert set(cards) == set(kinds)
    assert cards == deck(faults, 1, broker)


async def test_the_audit_tells_a_repeat_and_an_overtaking_from_what_the_broker_delivers_again() -> None:
    audit = Audit("", "", "queue", "sink")
    await audit.note("a", "key", b'{"n": 1}', delivered_again=False)
    await audit.note("c", "key", b'{"n": 3}', delivered_again=False)
    await audit.note("c", "key", b'{"n": 3}', delivered_again=True)
    await audit.note("b", "key", b'{"n": 2}', delivered_again=True)
    assert (audit.repeats.total(), audit.out_of_order) == (0, [])
    await audit.note("a", "key", b'{"n": 1}', delivered_again=False)
    await audit.note("d", "other", b'{"n": 2}', delivered_again=False)
    await audit.note("e", "other", b'{"n": 1}', delivered_again=False)
    assert audit.repeats == {"a": 1}
    assert audit.out_of_order == ["other: 1 behind 2"]


@pytest.fixture
def shop(bridge_database: str) -> str:
    with psycopg.connect(bridge_database) as connection:
        connection.execute(SCHEMA)
    return bridge_database


def _letter(event_id: str, code: str, attempts: int, reason: str = "it fails") -> Letter:
    return Letter(f"ponder:{event_id}", "ponder", event_id, MOVED, "key", "events", code, reason, attempts, None)


def _ledger(*fates: str) -> tuple[Ledger, list[str]]:
    """Events that `count` and `ponder` take, of these fates; and their ids."""
    events = {str(uuid4()): Emitted("key", number, MOVED, fate=FATES[fate]) for number, fate in enumerate(fates)}
    return Ledger(events), list(events)


def _reply(shop: str, event_id: str, *workers: str) -> None:
    with psycopg.connect(shop) as connection:
        connection.cursor().executemany(
            "insert into shop.reply (worker, event_id) values (%s, %s)", [(worker, event_id) for worker in workers]
        )


def _shipped(folder: Path, *lines: str) -> Path:
    (folder / "shipped").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_the_audit_of_workers_finds_nothing_where_every_event_ended_as_it_must(shop: str, tmp_path: Path) -> None:
    ledger, (handled, asks, rejected, died) = _ledger("asks once", "asks", "rejected", "lingers")
    _reply(shop, handled, "count", "ponder")
    gave_up = [_letter(asks, "attempts_exhausted", 6), _letter(rejected, "rejected", 2)]
    gave_up.append(_letter(died, "attempts_exhausted", 6, "the worker's process died in each"))
    again = [*gave_up, gave_up[0]]
    notes = _shipped(
        tmp_path, *[f"{worker} {handled} {worker}:{handled}:ship" for worker in ("count", "count", "ponder")]
    )
    found = outcomes(shop, ledger, {"count": gave_up, "ponder": again}, notes)
    assert (found.wrong, found.left) == ([], [])
    assert (found.replies, found.letters, found.repeated_letters, found.shipped, found.shipped_again) == (2, 6, 1, 2, 1)


def test_the_audit_of_workers_finds_whatever_ended_otherwise(shop: str, tmp_path: Path) -> None:
    ledger, (twice, never, asks, rejected, shipped) = _ledger("handled", "handled", "asks", "rejected", "shipped")
    _reply(shop, twice, "count", "ponder", "ponder")
    _reply(shop, never, "count")
    _reply(shop, shipped, "count", "ponder")
    _reply(shop, rejected, "ponder")
    right = [_letter(asks, "attempts_exhausted", 6), _letter(rejected, "rejected", 1)]
    wrong = [_letter(asks, "attempts_exhausted", 5), _letter(never, "error", 6)]
    notes = _shipped(
        tmp_path, f"count {shipped} count:{shipped}:ship", f"ponder {shipped} {FORGOTTEN}", f"ponder {twice} another"
    )
    with psycopg.connect(shop) as connection:
        connection.execute("insert into bridge.inbox (worker, event_id, claim) values ('ponder', %s, 7)", [never])
        failing = (
            "insert into bridge.inbox (worker, event_id, failure) values ('ponder', %s, '{\"code\": \"rejected\"}')"
        )
        connection.execute(failing, [rejected])
    found = outcomes(shop, ledger, {"count": right, "ponder": wrong}, notes)
    assert sorted(found.wrong) == sorted(
        [
            f"ponder: {twice} (handled): 2 replies",
            f"ponder: {never} (handled): 0 replies",
            f"ponder: {rejected} (rejected): 1 replies",
            f"ponder: {rejected} (rejected): no dead letter",
            f"ponder: {asks} (asks): dead letter attempts_exhausted after 5 attempts: it fails",
            f"ponder: {never} (handled): dead letter error after 6 attempts: it fails",
            f"ponder: {shipped} (shipped): shipped under the keys {{'{FORGOTTEN}': 1}}",
            f"ponder: {twice} (handled): shipped under the keys {{'another': 1}}",
        ]
    )
    assert sorted(found.left) == sorted(
        [
            f"ponder: {never} (handled): claimed in the inbox after 1 attempts",
            f"ponder: {rejected} (rejected): owed as rejected in the inbox after 1 attempts",
        ]
    )


def test_the_audit_of_workers_finds_a_reply_of_the_ordered_worker_that_came_before_an_earlier_one_of_its_key(
    shop: str, tmp_path: Path
) -> None:
    first, second, third, other = (str(uuid4()) for _ in range(4))
    keys = {first: ("a", 1), second: ("a", 2), third: ("a", 3), other: ("b", 1)}
    events = {event_id: Emitted(key, number, PLACED) for event_id, (key, number) in keys.items()}
    for event_id in (second, third, other, first):
        _reply(shop, event_id, ORDERED)
    for event_id in (third, second, first, other):
        _reply(shop, event_id, "count")
    found = outcomes(shop, Ledger(events), {}, _shipped(tmp_path))
    assert (found.wrong, found.overtaken) == ([f"{ORDERED}: {first}, number 1 of a, was overtaken"], 1)
