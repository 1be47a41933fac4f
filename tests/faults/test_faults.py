"""The short form of the fault suite; `make faults` is the long one."""

from pathlib import Path

import pytest

from tests.faults.kinds import KINDS
from tests.faults.run import deck, play
from tests.support.servers import PostgresServer, RabbitMQServer

SHORT = [
    "bridge: kill -9",
    "database: wire cut",
    "worker: kill -9",
    "broker: wire cut",
    "database: kill -9",
    "bridge: frozen 0.3-4 s",
    "database: sessions ended",
    "bridge: SIGTERM",
]
"""Without the kinds that take long: a broker's restart, a session's end, a swallowing wire."""


@pytest.mark.rabbitmq
async def test_nothing_is_lost_repeated_or_out_of_order_through_eight_faults(
    server_folder: Path, rabbitmq: RabbitMQServer, unique: str, tmp_path: Path
) -> None:
    by_name = {kind.name: kind for kind in KINDS}
    with PostgresServer(server_folder / unique) as postgres:
        report = await play(postgres, rabbitmq, tmp_path, [by_name[name] for name in SHORT], seed=7)
    assert report.passed, report
    assert report.faults == len(SHORT)
    assert report.committed > 100


@pytest.mark.parametrize("faults", [1, 10, 15, 100, 137])
def test_a_deck_has_as_many_faults_as_asked_for_and_each_kind_once_they_suffice(faults: int) -> None:
    cards = deck(faults, seed=1)
    assert len(cards) == faults
    if faults >= len(KINDS):
        assert set(cards) == set(KINDS)
    assert cards == deck(faults, seed=1)
