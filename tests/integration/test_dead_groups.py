"""Many dead letters at once: shown in 80 columns, by group, and replayed or discarded by group."""

import re
from pathlib import Path

import pytest
from rich.cells import cell_len

from tests.support.commands import command, json_of
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings

LETTER = """
insert into bridge.dead_letter
  (bridge, event_id, sequence, topic, key, payload, content_type, headers, created_at, sink, code, reason, attempts,
   failed_at)
select 'test', gen_random_uuid(), n, 'shop.order.placed', 'k', n::text, 'text/plain', '{"tenant": "a"}', now(), %s, %s,
       format(%s, n, gen_random_uuid()), 2, now() - n * interval '1 minute'
from generate_series(1, %s) n
"""


@pytest.fixture
async def config(bridge_database: str, messages: Messages, tmp_path: Path) -> str:
    await execute(bridge_database, LETTER, "events", "too_large", "message %s of %s is larger than 1.5 MB", 5)
    await execute(bridge_database, LETTER, "events", "too_large", "the queue %s takes nothing", 2)
    await execute(bridge_database, LETTER, None, "no_route", "no route takes the topic; %s", 1)
    return str(Daemon(tmp_path, settings(bridge_database, messages)).config)


async def test_letters_whose_reasons_differ_only_in_numbers_and_uuids_form_one_group(config: str) -> None:
    groups = await json_of("dead", "list", "--group", "--config", config)
    assert [(group["place"], group["code"], group["reason"], group["letters"]) for group in groups] == [
        ("events", "too_large", "message # of <id> is larger than # MB", 5),
        ("events", "too_large", "the queue # takes nothing", 2),
        ("-", "no_route", "no route takes the topic; #", 1),
    ]
    assert groups[0]["first"] < groups[0]["last"]
    assert await json_of("dead", "list", "--config", config, "--group") == groups, "ids of groups stay"
    letters = await json_of("dead", "list", "--group", groups[1]["id"], "--config", config)
    assert [letter["id"] for letter in letters] == ["outbox:6", "outbox:7"]


async def test_a_group_is_replayed_or_discarded_by_its_printed_id(
    bridge_database: str, messages: Messages, config: str
) -> None:
    out, _ = await command("dead", "list", "--group", "--config", config)
    first, second, third = re.findall(r"^([0-9a-f]{8}) ", out, re.MULTILINE)
    _, said = await command("dead", "replay", "--group", first, "--dry-run", "--config", config)
    assert "5 would be replayed" in said
    _, said = await command("dead", "replay", "--group", first, "--config", config)
    assert "5 replayed." in said
    assert len(await messages.take(5)) == 5
    await command("dead", "discard", "--group", second, "--group", third, "--why", "tidy", "--config", config)
    assert await execute(bridge_database, "select count(*) from bridge.dead_letter") == [(0,)]
    _, said = await command("dead", "replay", "--group", first, "--config", config, expect=1)
    assert f"There is no such group: {first}" in said


@pytest.mark.parametrize("arguments", [("list",), ("list", "--group"), ("show", "outbox:1")])
async def test_dead_letters_fit_80_columns_and_their_times_name_a_zone(config: str, arguments: tuple[str, ...]) -> None:
    out, _ = await command("dead", *arguments, "--config", config)
    lines = out.splitlines()
    assert max(map(cell_len, lines)) <= 80, out
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [A-Z+-]", out)
