"""deploy/docker/compose.yaml where no engine runs: Compose itself reads it, and each service's command does its work on
real servers, with the settings, the variables and the secrets that the service gets, and no others."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from bridge.settings import Settings, load
from bridge.settings.load import CREDENTIALS_VARIABLE
from tests.support.daemons import Daemon
from tests.support.environment import ROOT
from tests.support.narrow import Rights, add_users, url_of
from tests.support.servers import RabbitMQServer, free_port
from tests.support.strict_postgres import PasswordServer
from tests.support.until import until

FOLDER: Final = ROOT / "deploy" / "docker"
OURS: Final = ("bridge", "invoices", "migrate", "topology", "operator")
"""Services that run with settings and secrets."""
MODULES: Final = {"pgbridge": "bridge.cli", "pgbridge-worker": "workers.cli"}
INVOICES: Final = "/var/lib/pgbridge/invoices"


def config(text: str) -> subprocess.CompletedProcess[str]:
    """What Compose makes of it, all profiles and paths resolved."""
    program = Path(sys.prefix) / "bin" / "docker-compose"
    words = [f"--project-directory={FOLDER}", "--profile=*", "--file=-", "config", "--format=json"]
    command = [str(program), *words]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def compose() -> Mapping[str, Any]:
    done = config((FOLDER / "compose.yaml").read_text())
    assert (done.returncode, done.stderr) == (0, "")
    whole: Mapping[str, Any] = json.loads(done.stdout)
    return whole


def seconds(text: str) -> float:
    minutes, _, rest = text.rpartition("m") if "m" in text else ("0", "", text)
    return 60 * float(minutes) + float(rest.removesuffix("s") or 0)


def test_compose_refuses_what_its_specification_does_not_know() -> None:
    done = config((FOLDER / "compose.yaml").read_text().replace("stop_grace_period:", "stop_grace:"))
    assert done.returncode != 0
    assert "stop_grace" in done.stderr


def test_the_file_holds_no_secret_and_each_service_gets_its_own(compose: Mapping[str, Any]) -> None:
    for secret in compose["secrets"].values():
        assert Path(secret["file"]).is_relative_to(FOLDER / "shop")
    given = {
        name: {each["source"]: each["target"] for each in service.get("secrets", [])}
        for name, service in compose["services"].items()
    }
    assert {name: {source.partition("-")[0] for source in secrets} for name, secrets in given.items()} == {
        "bridge": {"bridge"},
        "invoices": {"workers"},
        "migrate": {"owner"},
        "topology": {"operator"},
        "operator": {"operator"},
        "init": set(),
        "postgres": {"superuser"},
        "rabbitmq": set(),
    }
    assert "deploy/docker/shop/" in (ROOT / ".gitignore").read_text().splitlines(), "nobody commits them"


def test_services_of_ours_have_few_rights_and_time_to_stop(compose: Mapping[str, Any], made: Path) -> None:
    for name in OURS:
        service = compose["services"][name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "user" not in service, "the image's is no root"
        assert "ports" not in service, "nothing of ours is for others"
    bridge, invoices = (settings_of(compose, name, made) for name in ("bridge", "invoices"))
    for name, limit, listen in (
        ("bridge", bridge.relay.shutdown_limit, bridge.observe.listen),
        ("invoices", invoices.workers["invoices"].shutdown_limit, invoices.workers["invoices"].listen),
    ):
        service = compose["services"][name]
        assert seconds(service["stop_grace_period"]) >= limit + 5.0
        assert listen is not None
        assert f"http://127.0.0.1:{listen.rpartition(':')[2]}/readyz" in service["healthcheck"]["test"][-1]
    [volume] = compose["services"]["invoices"]["volumes"]
    assert invoices.workers["invoices"].options["path"] == volume["target"] == INVOICES


@pytest.fixture
def made(compose: Mapping[str, Any], tmp_path: Path) -> Path:
    """What the service `init` writes, in the place of shop/."""
    command = [word.replace("=/shop", f"={tmp_path}/shop") for word in compose["services"]["init"]["command"]]
    done = run(command, {})
    assert done.returncode == 0, done.stderr
    return tmp_path / "shop"


def run(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", MODULES[command[0]], *command[1:]]
    return subprocess.run(program, env=clean(environment), cwd=ROOT, capture_output=True, text=True, check=False)


def clean(environment: Mapping[str, str]) -> Mapping[str, str]:
    """Ours without settings, and these."""
    return {name: text for name, text in os.environ.items() if not name.startswith("PGBRIDGE_")} | dict(environment)


def environment_of(compose: Mapping[str, Any], name: str, made: Path) -> dict[str, str]:
    """The service's variables, with places of this machine in them, where its files are laid out."""
    service = compose["services"][name]
    [settings] = service["configs"]
    assert settings == {"source": "settings", "target": "/etc/pgbridge/bridge.toml"}
    secrets = made.parent / f"secrets-{name}"
    secrets.mkdir(exist_ok=True)
    for secret in service["secrets"]:
        source = Path(compose["secrets"][secret["source"]]["file"]).relative_to(FOLDER / "shop")
        (secrets / Path(secret["target"]).name).write_text((made / source).read_text())
    environment = dict(service["environment"])
    assert environment[CREDENTIALS_VARIABLE] == "/run/secrets", "where Compose puts them"
    config_path = made / Path(compose["configs"]["settings"]["file"]).name
    return environment | {CREDENTIALS_VARIABLE: str(secrets), "PGBRIDGE_CONFIG": str(config_path)}


def settings_of(compose: Mapping[str, Any], name: str, made: Path) -> Settings:
    environment = environment_of(compose, name, made)
    return load(Path(environment["PGBRIDGE_CONFIG"]), environment)


@pytest.fixture(scope="module")
def server(server_folder: Path) -> Iterator[PasswordServer]:
    """Asks for passwords, as a real one does."""
    with PasswordServer(server_folder / "compose") as started:
        yield started


def move_to(made: Path, server: PasswordServer, rabbitmq: RabbitMQServer, virtual_host: str, invoices: Path) -> None:
    """Puts this machine's servers in the place of the services that have their names. The broker's accounts are made at
    once, with the rights that rabbitmq.sh gives them; `test_init` runs the script."""
    for file in (made / "credentials").rglob("*.dsn"):
        assert "host=postgres " in file.read_text()
        file.write_text(make_conninfo(file.read_text(), host="127.0.0.1", port=server.port))
    lines = re.findall(r"^account (\w.*)$", (made / "rabbitmq.sh").read_text(), flags=re.MULTILINE)
    accounts = {account: Rights(*rights) for account, _, *rights in map(shlex.split, lines)}
    add_users(rabbitmq, virtual_host, {f"{account}_{virtual_host}": rights for account, rights in accounts.items()})
    for file in (made / "credentials").rglob("*.url"):
        [account] = re.findall(r"^amqp://(\w+):[^@]+@rabbitmq/shop$", file.read_text().strip())
        file.write_text(url_of(rabbitmq, f"{account}_{virtual_host}", virtual_host))
    toml = made / "bridge.toml"
    toml.write_text(toml.read_text().replace(INVOICES, str(invoices)))


def daemon(compose: Mapping[str, Any], name: str, made: Path, listen: str, port: int) -> Daemon:
    """Not started. `listen` is the variable with its address; services have a port 9187 each, and daemons `port`."""
    program, *command = compose["services"][name]["command"]
    environment = environment_of(compose, name, made)
    assert environment[listen].startswith("0.0.0.0:")
    environment[listen] = f"127.0.0.1:{port}"
    config_path = Path(environment["PGBRIDGE_CONFIG"])
    return Daemon(made.parent / name, config_path, *command, module=MODULES[program], environment=environment)


def is_healthy(compose: Mapping[str, Any], name: str, port: int) -> bool:
    """What the service's health check says."""
    kind, python, *words = compose["services"][name]["healthcheck"]["test"]
    assert (kind, python) == ("CMD", "python")
    here = [word.replace(":9187/", f":{port}/") for word in words]
    return subprocess.run([sys.executable, *here], capture_output=True, check=False).returncode == 0


@pytest.mark.rabbitmq
async def test_an_order_becomes_a_pdf_with_what_each_service_gets(
    compose: Mapping[str, Any],
    made: Path,
    server: PasswordServer,
    rabbitmq: RabbitMQServer,
    unique: str,
    tmp_path: Path,
) -> None:
    invoices = tmp_path / "invoices"
    invoices.mkdir()
    move_to(made, server, rabbitmq, unique, invoices)
    dsn = server.create_database(compose["services"]["postgres"]["environment"]["POSTGRES_DB"])
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute((made / "database.sql").read_bytes())
        done = run(compose["services"]["migrate"]["command"], environment_of(compose, "migrate", made))
        assert done.returncode == 0, done.stderr
        admin.execute((ROOT / "sql" / "examples" / "shop.sql").read_bytes())
        done = run(compose["services"]["topology"]["command"], environment_of(compose, "topology", made))
        assert done.returncode == 0, done.stderr
        ports = free_port(), free_port()
        with (
            daemon(compose, "bridge", made, "PGBRIDGE_OBSERVE__LISTEN", ports[0]) as bridge,
            daemon(compose, "invoices", made, "PGBRIDGE_WORKERS__INVOICES__LISTEN", ports[1]) as worker,
        ):
            for name, port in zip(("bridge", "invoices"), ports, strict=True):
                await until(partial(is_healthy, compose, name, port), f"{name} is healthy")
            admin.execute("""select shop.place_order(gen_random_uuid(), 1, '[{"sku": "CUP", "quantity": 1}]')""")
            await until(lambda: [*invoices.glob("*.pdf")] != [], "an invoice", 60)
            await until(
                lambda: admin.execute("select count(path) from shop.invoices").fetchone() == (1,), "its row says so"
            )
            assert bridge.stop() == worker.stop() == 0
