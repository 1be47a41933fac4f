"""The short form of the fault suite; `make faults` is the long one."""

from pathlib import Path

import pytest

from tests.faults.audit import Audit
from tests.faults.brokers import RabbitMQ
from tests.faults.kinds import KINDS
from tests.faults.run import deck, play
from tests.faults.world import POSTGRES
from tests.support.servers import PostgresServer, RabbitMQServer

SHORT = [
    "broker: slow to confirm, 6-9 s",
    "bridge: kill -9",
    "log: poison",
    "database: wire cut",
    "worker: kill -9",
    "broker: wire cut",
    "database: kill -9 with both bridges",
    "second sink: full 4-8 s",
    "database: sessions ended",
    "bridge: SIGTERM",
]
"""Without the kinds that take long: a broker's restart, a session's end, a swallowing wire."""


@pytest.mark.rabbitmq
async def test_nothing_is_lost_repeated_or_out_of_order_through_ten_faults(
    server_folder: Path, rabbitmq: RabbitMQServer, unique: str, tmp_path: Path
) -> None:
    by_name = {kind.name: kind for kind in KINDS}
    with PostgresServer(server_folder / unique, settings=POSTGRES) as postgres:
        report = await play(postgres, RabbitMQ(rabbitmq), tmp_path, [by_name[name] for name in SHORT], seed=7)
    assert report.passed, (report.line, report.wrong[:20])
    assert report.faults == len(SHORT)
    assert report.committed > 100


@pytest.mark.parametrize("faults", [1, 10, 26, 100, 137])
@pytest.mark.parametrize("broker", ["rabbitmq", "nats"])
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
