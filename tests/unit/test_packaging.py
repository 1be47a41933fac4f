"""What the Debian package brings beside the programs: manual pages, and an example of settings."""

import subprocess
import sys
from pathlib import Path

import bridge.cli
import workers.cli
from bridge import __version__
from bridge.settings import load
from tests.support.environment import ROOT


def test_every_command_has_a_manual_page(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "deploy" / "man.py"), str(tmp_path)]
    subprocess.run(program, check=True, env={"PYTHONPATH": str(ROOT), "SOURCE_DATE_EPOCH": "86400"})
    wanted = {"pgbridge", *(f"pgbridge-{name}" for name in bridge.cli.COMMANDS)}
    wanted |= {"pgbridge-worker", *(f"pgbridge-worker-{name}" for name in workers.cli.COMMANDS)}
    assert {file.name for file in (tmp_path / "man1").iterdir()} == {f"{name}.1" for name in wanted}

    page = (tmp_path / "man1" / "pgbridge-dead.1").read_text().splitlines()
    assert page[:3] == [
        '.TH "pgbridge\\-dead" 1 1970-01-02 "pgbridge ' + __version__ + '" "pgbridge"',
        ".SH NAME",
        "pgbridge\\-dead \\- Shows, replays and discards dead letters",
    ]
    assert ".SS pgbridge dead replay" in page
    assert "\\fB\\-\\-why TEXT\\fR" in page

    page = (tmp_path / "man5" / "bridge.toml.5").read_text().splitlines()
    assert ".SH [sinks.<name>] with type = \\(dqnats\\(dq" in page
    assert page[page.index("\\fBprune_interval\\fR (duration; \\fB1m\\fR)") + 1].startswith("How often the leader")


def test_the_example_of_settings_is_valid(tmp_path: Path) -> None:
    (tmp_path / "bridge.toml").write_text((ROOT / "deploy" / "bridge.toml").read_text())
    secrets = tmp_path / "credentials" / "bridge"
    secrets.mkdir(parents=True)
    (secrets / "postgres.dsn").write_text("postgresql://shop_bridge@db.internal/shop\n")
    (secrets / "sinks.events.url").write_text("amqps://bridge:secret@mq.internal/shop\n")
    settings = load(tmp_path / "bridge.toml", environ={})
    assert settings.name == "shop"
    assert list(settings.workers) == ["invoices"]
