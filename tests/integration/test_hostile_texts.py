"""Events whose every text would do something to a terminal, and what commands show of them."""

import json
from pathlib import Path
from typing import Final

import psycopg
import pytest

from tests.support.daemons import Daemon, run_command
from tests.support.until import rows_become, until

HOSTILE: Final = "a\x1b[2J\x9b31m\u202eb\x07\r\u200bc"

SETTINGS: Final = """\
name = "shop"
[postgres]
dsn = {dsn}
[sinks.e]
type = "memory"
[[routes]]
topic = "other"
sink = "e"
[observe]
log_format = "{format}"
"""


def is_harmless(text: str) -> bool:
    return all(one.isprintable() or one in "\n\t" for one in text)


@pytest.mark.parametrize("form", ["text", "json"])
async def test_no_command_and_no_log_lets_an_event_speak_to_the_terminal(
    bridge_database: str, tmp_path: Path, form: str
) -> None:
    settings = SETTINGS.format(dsn=json.dumps(bridge_database), format=form)
    as_json = ("--json",) if form == "json" else ()
    with (
        Daemon(tmp_path, settings) as bridge,
        Daemon(tmp_path / "tail", settings, "tail", *as_json) as tail,
        psycopg.connect(bridge_database, autocommit=True) as connection,
    ):
        # It shows what is committed once it looks.
        await rows_become(
            bridge_database,
            "select count(*)::int from pg_stat_activity where application_name = 'pgbridge tail'"
            " and datname = current_database() and position('read_page' in query) > 0",
            [(1,)],
        )
        connection.execute(
            "select bridge.emit(%s, %s::text, %s, jsonb_build_object(%s::text, %s::text))",
            (HOSTILE, f"{HOSTILE}\n2026-01-01 forged", HOSTILE, "name", HOSTILE),
        )
        await rows_become(bridge_database, "select count(*)::int from bridge.dead_letter", [(1,)])
        [(event_id, letter)] = connection.execute(
            "select o.event_id::text, 'outbox:' || d.id from bridge.outbox o, bridge.dead_letter d"
        ).fetchall()
        for words in (
            ("dead", "list"),
            ("dead", "show", letter),
            ("where", event_id),
            ("status",),
        ):
            done = run_command(*words, *as_json, "--config", str(bridge.config))
            assert done.returncode == 0, done.stderr
            assert is_harmless(done.stdout + done.stderr), words
        await until(lambda: tail.log.read_bytes().endswith(b"\n"), "it is shown")
        assert bridge.stop() == 0
    shown = tail.log.read_text()
    assert is_harmless(shown)
    assert shown.count("\n") == 1
    assert "\\n2026-01-01 forged" in shown, "it stays in its line"
    log = bridge.log.read_text()
    assert "event.dead_lettered" in log
    assert is_harmless(log)
