"""`pgbridge check` over workers: each mistake has its line, before any worker starts."""

import asyncio
import json
from pathlib import Path

import psycopg
import pytest

from bridge.settings import PostgresSettings, load
from tests.support.daemons import run_command
from tests.support.servers import NatsServer

SETTINGS = """
name = "shop"
[postgres]
dsn = {dsn}
[sinks.events]
type = "nats"
url = "{url}"
stream = "{stream}"
[[routes]]
topic = "#"
sink = "events"
[workers]
dsn = {worker_dsn}
[workers.echo]
handler = "tests.support.worker_handlers:echo"
reply = "shop.rendered"
"""


@pytest.fixture
def config(shop: PostgresSettings, bridge_database: str, nats_server: NatsServer, unique: str, tmp_path: Path) -> Path:
    path = tmp_path / "bridge.toml"
    path.write_text(
        SETTINGS.format(
            dsn=json.dumps(bridge_database),
            worker_dsn=json.dumps(shop.dsn.get_secret_value()),
            url=nats_server.url,
            stream=unique,
        )
    )
    declared = run_command("topology", "--apply", "--config", str(path))
    assert declared.returncode == 0, declared.stdout + declared.stderr
    return path


async def check(config: Path) -> dict[str, tuple[bool, str]]:
    checked = await asyncio.to_thread(run_command, "check", "--json", "--config", str(config))
    found = [json.loads(line) for line in checked.stdout.splitlines()]
    return {line["subject"]: (line["ok"], line["text"]) for line in found}


def change(config: Path, old: str, new: str) -> None:
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))


async def test_a_worker_that_could_start_has_a_line_that_says_so(config: Path) -> None:
    assert (await check(config))["worker echo"] == (True, "tests.support.worker_handlers:echo, reply shop.rendered")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("worker_handlers:echo", "worker_handlers:ecko", "workers.echo.handler: "),
        ('reply = "shop.rendered"', 'reply = "shop.missing"', "there is no function shop.missing(uuid, jsonb)"),
        ('reply = "shop.rendered"', "options = {x = 1}", "workers.echo.options.x: unknown key"),
        ('reply = "shop.rendered"', 'subscribe = ["other.#"]', "different"),
    ],
)
async def test_a_mistake_in_a_workers_settings_is_named(config: Path, old: str, new: str, said: str) -> None:
    change(config, old, new)
    wrong = [text for ok, text in (await check(config)).values() if not ok]
    assert len(wrong) == 1
    assert said in wrong[0]


async def test_a_handler_is_looked_for_in_the_workers_folders(config: Path) -> None:
    folder = config.parent / "handlers"
    folder.mkdir()
    (folder / "own.py").write_text("from tests.support.worker_handlers import echo\n")
    change(config, 'handler = "tests.support.worker_handlers:echo"', 'handler = "own:echo"')
    ok, said = (await check(config))["topology"]
    assert not ok
    assert (
        "workers.echo.handler: cannot import own: No module named 'own'. Name its folder in workers.echo.path" in said
    )
    change(config, 'handler = "own:echo"', 'handler = "own:echo"\npath = "handlers"')
    assert (await check(config))["worker echo"] == (True, "own:echo, reply shop.rendered")


async def test_what_the_workers_role_may_not_do_is_named_with_the_grant(
    config: Path, shop: PostgresSettings, bridge_database: str, unique: str
) -> None:
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute("revoke execute on function bridge.inbox_give_up from bridge_worker")
    try:
        ok, said = (await check(config))["worker echo"]
    finally:
        with psycopg.connect(bridge_database, autocommit=True) as admin:
            admin.execute("grant execute on function bridge.inbox_give_up to bridge_worker")
    assert not ok
    assert f"workers.dsn: the role '{unique}' may not call bridge.inbox_give_up(" in said
    assert f"grant bridge_worker to {unique}" in said


async def test_the_workers_login_is_told_apart_from_the_bridges(config: Path) -> None:
    login = load(config, environ={}).workers_postgres.dsn.get_secret_value()
    change(config, json.dumps(login), '"postgresql://nobody:s3cret@127.0.0.1:1/none"')
    found = await check(config)
    assert found["postgres"][0]
    ok, said = found["worker echo"]
    assert not ok
    assert said.startswith("workers.dsn: ")
    assert "s3cret" not in said


async def test_the_workers_login_may_come_from_a_file_the_environment_and_a_credential(
    config: Path, tmp_path: Path
) -> None:
    login = load(config, environ={}).workers_postgres.dsn.get_secret_value()
    secret = tmp_path / "login"
    secret.write_text("host=from.file\n")
    change(config, f"dsn = {json.dumps(login)}", f"dsn_file = {json.dumps(str(secret))}")
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "workers.dsn").write_text("host=from.credential")
    for environ, host in (
        ({}, "from.file"),
        ({"PGBRIDGE_WORKERS__DSN": "host=from.env"}, "from.env"),
        ({"CREDENTIALS_DIRECTORY": str(credentials)}, "from.credential"),
    ):
        settings = load(config, environ=environ)
        assert settings.workers_postgres.dsn.get_secret_value() == f"host={host}"
        assert settings.workers_postgres.key("dsn") == "workers.dsn"
        assert list(settings.workers) == ["echo"]
        assert host not in repr(settings)
