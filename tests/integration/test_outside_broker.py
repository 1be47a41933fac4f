"""A kind of broker that the project has never heard of works everywhere once it is installed."""

import os
import shutil
from pathlib import Path

import psycopg
import pytest

from tests.support import sqlite_broker
from tests.support.commands import command, json_of
from tests.support.daemons import Daemon
from tests.support.messages import execute
from tests.support.shop import SHOP
from tests.support.until import rows_become

METADATA = "Metadata-Version: 2.1\nName: pgbridge-sqlite\nVersion: 1.0\n"
ENTRY_POINTS = "[pgbridge.brokers]\nsqlite = pgbridge_sqlite:BROKER\n"

SETTINGS = """
name = "test"
[postgres]
dsn = "{dsn}"
[sinks.events]
type = "sqlite"
path = "{path}"
[[routes]]
topic = "#"
sink = "events"
[workers.echo]
handler = "tests.support.worker_handlers:echo"
reply = "shop.rendered"
[workers.refuse]
handler = "tests.support.worker_handlers:refuse"
"""

EVENTS = """select bridge.emit('shop.order.placed', '{"n": 1}'::json), bridge.emit('refuse.it', '2')"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a wheel of the package leaves in site-packages, in a folder that the processes of this test look into."""
    site = tmp_path / "site-packages"
    about = site / "pgbridge_sqlite-1.0.dist-info"
    about.mkdir(parents=True)
    shutil.copy(sqlite_broker.__file__, site / "pgbridge_sqlite.py")
    (about / "METADATA").write_text(METADATA)
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    path = [str(site), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))


@pytest.fixture
def config(installed: None, bridge_database: str, tmp_path: Path) -> str:
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(SHOP)
    text = SETTINGS.format(dsn=bridge_database, path=tmp_path / "broker.sqlite")
    return str(Daemon(tmp_path, text).config)


async def test_check_and_topology_know_what_an_outside_broker_lacks(config: str) -> None:
    out, _ = await command("check", "--config", config, expect=69)
    assert "tables" in out
    assert "topology --apply" in out
    states = [(row["owner"], row["state"]) for row in await json_of("topology", "--apply", "--config", config)]
    assert states == [("sink events", "declared"), ("worker echo", "declared"), ("worker refuse", "declared")]
    out, _ = await command("check", "--config", config)
    assert "sqlite, answers" in out


async def test_events_travel_over_an_outside_broker_to_replies_and_dead_letters(
    config: str, bridge_database: str, tmp_path: Path
) -> None:
    await command("topology", "--apply", "--config", config)
    text = Path(config).read_text()
    bridge = Daemon(tmp_path / "bridge", text)
    echo = Daemon(tmp_path / "echo", text, "run", "echo", module="workers.cli")
    refuse = Daemon(tmp_path / "refuse", text, "run", "refuse", module="workers.cli")
    with bridge, echo, refuse:
        await execute(bridge_database, EVENTS)
        await rows_become(bridge_database, "select result->'of'->>'n' from shop.invoice", [("1",)])
        refuse.wait_for("event.dead_lettered")
        assert (bridge.stop(), echo.stop(), refuse.stop()) == (0, 0, 0)
    (letter,) = await json_of("dead", "list", "--worker", "refuse", "--config", config)
    assert (letter["topic"], letter["code"], letter["sink"]) == ("refuse.it", "rejected", "events")
    await command("dead", "replay", letter["id"], "--config", config)
    assert await json_of("dead", "list", "--worker", "refuse", "--config", config) == []


async def test_a_mistake_in_its_settings_names_the_key(config: str) -> None:
    path = Path(config)
    path.write_text(path.read_text().replace("path = ", "pathh = "))
    _, said = await command("check", "--config", config, expect=78)
    assert "sinks.events.path: is missing" in said
    assert "sinks.events.pathh: unknown key; did you mean path?" in said
