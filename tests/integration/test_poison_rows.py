"""Rows that hold what no emit() takes now: written before its limits, or by hand. Each is still an event."""

from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr

from bridge.brokers.rabbitmq.frames import Encoder, RefusedEvent
from bridge.commands.dead_outbox import list_letters, read_letters
from bridge.event import Event
from bridge.postgres.connection import connect
from bridge.settings import PostgresSettings
from bridge.sources.log import LogReader, Position
from tests.support.commands import command, json_of
from tests.support.daemons import Daemon
from tests.support.messages import Messages, settings

POISON = [
    ('{"n": 1e5000, "m": -1.50, "s": "x"}', {"n": "1" + "0" * 5000, "m": "-1.50", "s": "x"}),
    (f'{{"n": {"[" * 1500}{"]" * 1500}}}', {"n": "[" * 1500 + "]" * 1500}),
    ('{"a": ["x"], "o": {"b": [1, "c"]}}', {"a": '["x"]', "o": '{"b": [1, "c"]}'}),
    ('{"t": true, "none": null, "": "", "CC": "x"}', {"t": "true", "": "", "CC": "x"}),
    ('{"none": null}', {}),
    ("[]", {}),
    ('["text"]', {}),
    ("null", {}),
    ('"text"', {}),
    ("1", {}),
]
TIMES = ["-infinity", "infinity", "4713-01-01 BC", "0001-01-01 00:00+14", "294276-12-31", "1901-06-01"]


@pytest.fixture
def poisoned(bridge_database: str) -> str:
    """A database whose log and dead letters hold one row for each."""
    rows = [(headers, "now") for headers, _ in POISON] + [("{}", time) for time in TIMES]
    with psycopg.connect(bridge_database) as connection:
        for headers, time in rows:
            connection.execute(
                "insert into bridge.outbox (topic, payload, content_type, headers, created_at) "
                "values ('t', 'x', 'text/plain', %s, %s)",
                (headers, time),
            )
        connection.execute(
            "insert into bridge.dead_letter (bridge, event_id, sequence, topic, payload, content_type, headers, "
            "created_at, code, reason, attempts, failed_at) "
            "select 'test', event_id, id, topic, payload, content_type, headers, created_at, 'c', 'r', 1, created_at "
            "from bridge.outbox order by id"
        )
    return bridge_database


def far_from_utc(dsn: str, zone: str) -> PostgresSettings:
    """Of sessions that begin in another time zone."""
    return PostgresSettings(dsn=SecretStr(make_conninfo(dsn, options=f"-c timezone={zone}")))


async def read(dsn: str, gaps: tuple[tuple[int, int], ...], mark: int) -> list[Event]:
    connection = await connect(far_from_utc(dsn, "Pacific/Kiritimati"), "test")
    async with connection:
        reader = LogReader(connection, "test", page_size=1000, page_bytes=100_000_000)
        reader.start(Position(mark, gaps), None)
        events, *_ = await reader.read()
        return list(events)


@pytest.mark.parametrize(("gaps", "mark"), [((), 0), (((1, 1000),), 1000)], ids=["above the mark", "in a gap"])
async def test_every_row_of_the_log_is_an_event(poisoned: str, gaps: tuple[tuple[int, int], ...], mark: int) -> None:
    events = await read(poisoned, gaps, mark)
    assert [event.headers for event in events[: len(POISON)]] == [headers for _, headers in POISON]
    assert [event.time.year for event in events[len(POISON) :]] == [1, 9999, 1, 1, 9999, 1901]
    encoder = Encoder("events", 131_072, 134_217_728)
    for event in events[len(POISON) :]:
        if event.time.year < 1970:
            with pytest.raises(RefusedEvent):
                encoder.encode(event)
        else:
            encoder.encode(event)


async def test_every_dead_letter_is_listed_and_read(poisoned: str) -> None:
    connection = await connect(far_from_utc(poisoned, "Etc/GMT+12"), "test")
    async with connection:
        letters = await list_letters(connection, "test")
        shown = await read_letters(connection, "test", [letter.id for letter in letters])
    assert [letter.headers for letter in letters[: len(POISON)]] == [headers for _, headers in POISON]
    assert [letter.headers for letter in shown] == [letter.headers for letter in letters]


async def test_commands_show_and_replay_them(poisoned: str, messages: Messages, tmp_path: Path) -> None:
    config = str(Daemon(tmp_path, settings(poisoned, messages)).config)
    count = len(POISON) + len(TIMES)
    assert len(await json_of("dead", "list", "--config", config)) == count
    shown = await json_of("dead", "show", "outbox:1", "--config", config)
    assert shown["headers"] == POISON[0][1]
    replayed = await json_of("replay", "--from", "1h", "--dry-run", "--config", config)
    assert replayed["by_topic"] == {"t": len(POISON)}
    await command("dead", "list", "--config", config)
