"""`pgbridge init`: what it writes is loaded and works with the rights that it gives, and nothing is replaced."""

import json
import os
import pty
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from bridge.settings import load
from tests.support.daemons import Daemon, run_command
from tests.support.environment import ROOT
from tests.support.servers import NatsServer, RabbitMQServer
from tests.support.shop import SHOP
from tests.support.strict_postgres import PasswordServer
from tests.support.until import rows_become, until

ANSWERS = ("--name", "shop", "--database", "postgresql://127.0.0.1/shop", "--broker", "rabbitmq")
AT = ("--at", "amqp://127.0.0.1/shop")


@pytest.fixture(scope="module")
def server(server_folder: Path) -> Iterator[PasswordServer]:
    with PasswordServer(server_folder / "init") as started:
        yield started


def init(folder: Path, *words: str) -> str:
    done = run_command("init", "--folder", str(folder), *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(folder: Path, *words: str) -> str:
    """What is said of words that cannot be acted on; nothing is written."""
    before = set(folder.rglob("*"))
    done = run_command("init", "--folder", str(folder), *words)
    assert done.returncode == 2, done.stdout
    assert set(folder.rglob("*")) == before
    return done.stderr


def command(config: Path, *words: str, credentials: str | None = None) -> str:
    more = () if credentials is None else ("--credentials", str(config.parent / "credentials" / credentials))
    done = run_command(*words, "--config", str(config), *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install_database(server: PasswordServer, config: Path, database: str) -> str:
    """What the DBA does, and the owner; returns a superuser's DSN."""
    dsn = server.create_database(database)
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute((config.parent / "database.sql").read_text().encode())
    command(config, "migrate", credentials="owner")
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(SHOP)
        admin.execute("GRANT EXECUTE ON FUNCTION shop.rendered TO bridge_worker")
    return dsn


def letters(config: Path) -> set[str]:
    """The topics of those that were given up."""
    found = json.loads(command(config, "dead", "list", "--json", credentials="operator"))
    return {letter["topic"] for letter in found}


async def everything_works(config: Path, dsn: str, folder: Path) -> None:
    """Declared by the operator, checked, and run with few rights: an event is handled, another one given up."""
    command(config, "topology", "--apply", credentials="operator")
    checked = command(config, "check")
    assert "FAIL" not in checked
    with (
        Daemon(folder / "bridge", config),
        Daemon(folder / "echo", config, "run", "echo", module="workers.cli"),
        Daemon(folder / "refuse", config, "run", "refuse", module="workers.cli"),
    ):
        with psycopg.connect(dsn, autocommit=True) as admin:
            admin.execute("select bridge.emit('shop.order.placed', '7'::jsonb), bridge.emit('refuse.it', '8'::jsonb)")
        await rows_become(dsn, "select result ->> 'of' from shop.invoice", [("7",)])
        await until(lambda: "refuse.it" in letters(config), "the other event is a dead letter")
        assert "worker echo" in command(config, "status", credentials="console")
    assert letters(config) <= {"refuse.it", "shop.invoice.rendered"}, "the reply's event is for nobody"
    command(config, "dead", "discard", "--all", "--why", "a test", credentials="operator")


@pytest.mark.rabbitmq
async def test_on_rabbitmq_each_process_works_with_the_rights_that_it_gets(
    server: PasswordServer, rabbitmq: RabbitMQServer, unique: str, tmp_path: Path
) -> None:
    folder = tmp_path / "etc"
    init(
        folder,
        *("--name", unique, "--database", f"postgresql://127.0.0.1:{server.port}/{unique}"),
        *("--broker", "rabbitmq", "--at", f"amqp://127.0.0.1:{rabbitmq.port}/{unique}"),
        *("--worker", "echo=tests.support.worker_handlers:echo"),
        *("--worker", "refuse=tests.support.worker_handlers:refuse"),
    )
    config = folder / "bridge.toml"
    config.write_text(config.read_text().replace(':echo"\n', ':echo"\nreply = "shop.rendered"\n'))
    for _ in range(2):  # it may be run again
        done = subprocess.run(
            ["sh", str(folder / "rabbitmq.sh")],
            env=rabbitmq.environment | {"PATH": f"/usr/lib/rabbitmq/bin:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    await everything_works(config, install_database(server, config, unique), tmp_path)


async def test_on_nats_each_process_works_with_the_rights_that_it_gets(
    server: PasswordServer, unique: str, tmp_path: Path
) -> None:
    folder = tmp_path / "etc"
    nats = NatsServer(tmp_path / "nats", lines=['include "pgbridge.conf"'])
    init(
        folder,
        *("--name", unique, "--database", f"postgresql://127.0.0.1:{server.port}/{unique}"),
        *("--broker", "nats", "--at", nats.url),
        *("--worker", "echo=tests.support.worker_handlers:echo"),
        *("--worker", "refuse=tests.support.worker_handlers:refuse"),
    )
    config = folder / "bridge.toml"
    config.write_text(config.read_text().replace(':echo"\n', ':echo"\nreply = "shop.rendered"\n'))
    nats.folder.mkdir(parents=True)
    shutil.copy(folder / "pgbridge.conf", nats.folder)
    with nats:
        await everything_works(config, install_database(server, config, unique), tmp_path)


def test_on_pubsub_a_script_makes_service_accounts_and_declares_in_between(tmp_path: Path) -> None:
    init(
        tmp_path,
        *("--name", "shop", "--database", "postgresql://127.0.0.1/shop", "--broker", "pubsub", "--at", "my-shop"),
        *("--worker", "invoices"),
    )
    called = tmp_path / "called"
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("gcloud", "pgbridge"):
        shim = programs / name
        # Nothing exists yet; a project has a number.
        shim.write_text(
            f'#!/bin/sh\necho {name} "$@" >> {called}\n'
            'case "$*" in *describe*projectNumber*) echo 42;; *describe*) exit 1;; esac\n'
        )
        shim.chmod(0o755)
    done = subprocess.run(
        ["sh", "pubsub.sh"],
        cwd=tmp_path,
        env={"PATH": f"{programs}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = called.read_text().splitlines()
    bridge = "serviceAccount:shop-bridge@my-shop.iam.gserviceaccount.com"
    granted = [line for line in lines if "add-iam-policy-binding" in line]
    assert any("topics add-iam-policy-binding events " in line and bridge in line for line in granted)
    assert any("service-42@gcp-sa-pubsub" in line and "subscriptions" in line for line in granted)
    assert sum("keys create credentials/" in line for line in lines) == 3
    applied = next(number for number, line in enumerate(lines) if line.startswith("pgbridge topology --apply"))
    first = next(number for number, line in enumerate(lines) if line.startswith("gcloud pubsub"))
    assert applied < first, "what roles are granted on must be there"


def test_secrets_stand_where_their_process_alone_finds_them(tmp_path: Path) -> None:
    told = init(tmp_path, *ANSWERS, *AT, "--worker", "invoices", "--listen", "orders")
    texts = {str(file.relative_to(tmp_path)): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    passwords = {
        name: re.findall(r"password='?([\w-]{32})|://\w+:([\w-]{32})@", text)
        for name, text in texts.items()
        if name.startswith("credentials/")
    }
    assert (
        {name for name, found in passwords.items() if len(found) == 1}
        == set(passwords)
        == {
            *(f"credentials/{process}/postgres.dsn" for process in ("owner", "bridge", "operator", "console")),
            *(f"credentials/{process}/sinks.events.url" for process in ("bridge", "workers", "operator", "console")),
            *(f"credentials/{process}/workers.dsn" for process in ("workers", "operator", "console")),
        }
    )
    console = load(tmp_path / "bridge.toml", {}, of="console")
    assert "user=shop_operator" in console.postgres.dsn.get_secret_value()
    for name in ("bridge.toml", "database.sql"):
        for [found] in passwords.values():
            assert not any(password and password in texts[name] + told for password in found)
    assert tomllib.loads(texts["bridge.toml"])["channels"] == {"listen": ["orders"]}
    for file in tmp_path.rglob("*"):
        public = file.name == "bridge.toml"
        mode = stat.S_IMODE(file.stat().st_mode)
        assert mode == (0o644 if public else 0o700 if file.is_dir() else 0o600), file


def test_a_command_of_the_host_uses_for_bridge_and_workers_what_each_may(tmp_path: Path) -> None:
    init(tmp_path, *ANSWERS, *AT, "--worker", "invoices")
    settings = load(tmp_path / "bridge.toml", {})
    theirs = load(tmp_path / "bridge.toml", {}, of="workers")
    urls = [each.sinks["events"].url.get_secret_value() for each in (settings, theirs)]  # type: ignore[attr-defined]
    assert [re.findall(r"//(\w+):", url) for url in urls] == [["shop_bridge"], ["shop_workers"]]
    assert "user=shop_workers" in theirs.workers_postgres.dsn.get_secret_value()


def test_to_another_machine_the_database_must_prove_who_it_is(tmp_path: Path) -> None:
    words = ("--name", "shop", "--broker", "rabbitmq", "--at", "amqps://mq.internal/shop")
    init(tmp_path / "a", *words, "--database", "postgresql://db.internal/shop")
    assert "sslmode=verify-full sslrootcert=system" in (tmp_path / "a/credentials/bridge/postgres.dsn").read_text()
    init(tmp_path / "b", *words, "--database", "postgresql://db.internal/shop?sslmode=require")
    assert "sslmode=require" in (tmp_path / "b/credentials/bridge/postgres.dsn").read_text()


def test_no_file_is_replaced(tmp_path: Path) -> None:
    init(tmp_path, *ANSWERS, *AT)
    said = refused(tmp_path, *ANSWERS, *AT)
    assert "bridge.toml exists already; nothing was written" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--name", "shop"), "--database: is missing; outside of a terminal"),
        ((*ANSWERS[:4],), "--broker: is missing"),
        ((*ANSWERS,), "--at: is missing"),
        ((*ANSWERS, *AT, "--name", "Shop"), "--name: 'Shop' is no name"),
        ((*ANSWERS, *AT, "--database", "postgresql://u:hunter2@h/d"), "--database: holds a user"),
        ((*ANSWERS, *AT, "--database", "postgresql://h/"), "--database: names no database"),
        ((*ANSWERS, *AT, "--database", "hunter2"), "--database: is not a libpq connection string"),
        (
            (*ANSWERS, *AT, "--broker", "kafka"),
            "--broker: there is no broker 'kafka'; installed: rabbitmq, nats, pubsub",
        ),
        ((*ANSWERS, "--at", "amqp://u:hunter2@h"), "--at: holds a user"),
        ((*ANSWERS, "--at", "mq.internal"), "--at: begins with neither amqp:// nor amqps://"),
        ((*ANSWERS, *AT, "--worker", "Bad"), "--worker: 'Bad' is no name"),
        ((*ANSWERS, *AT, "--worker", "a=b"), "--worker: 'b' is not of the form MODULE:FUNCTION"),
        ((*ANSWERS, *AT, "--listen", "x" * 64), "--listen: has 64 bytes"),
        ((*ANSWERS, *AT, "--topic", "a.b*"), "--topic: 'b*': * and # stand for whole words"),
    ],
)
def test_a_wrong_answer_is_named_and_nothing_is_written(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    said = refused(tmp_path, *words)
    assert says in said
    assert "hunter2" not in said


def test_in_a_terminal_it_asks_and_a_wrong_answer_is_asked_again(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "bridge.cli", "init", "--folder", str(tmp_path / "etc")],
        cwd=ROOT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    ) as asking:
        os.close(terminal)
        os.write(controller, b"Shop\nshop\n\nkafka\nnats\n\norders\n\n")
        said = ""
        while True:
            try:
                said += os.read(controller, 65_536).decode()
            except OSError:  # the other side has closed it
                break
    os.close(controller)
    assert asking.returncode == 0, said
    assert "'Shop' is no name" in said
    assert "there is no broker 'kafka'" in said
    table = tomllib.loads((tmp_path / "etc" / "bridge.toml").read_text())
    assert table["sinks"]["events"] == {"type": "nats", "url": "nats://localhost:4222", "stream": "events"}
    assert table["channels"]["listen"] == ["orders"]
    assert table["workers"]["invoices"]["handler"] == "workers.invoices:render"
