"""README's "Use it", followed to the letter on fresh servers: from an empty database and broker to a PDF.

What a reader is not told to type is done here, too: `pip install` installs this working tree, and places are those of
the test's own servers and folder.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psycopg
import pytest

from bridge.demo.servers.rabbitmq import SCRIPTS
from tests.support import environment
from tests.support.servers import RabbitMQServer
from tests.support.strict_postgres import PasswordServer
from tests.support.until import until

pytestmark = pytest.mark.rabbitmq

README: Final = (environment.ROOT / "README.md").read_text()

PIP: Final = (
    "/opt/pgbridge/bin/pip install '.[invoices]'          # or [nats], [pubsub], [payments], [webhooks], [otel]\n"
)

WAITS: Final = """
until grep -q channels.listening {log} && [ "$(grep -c worker.started {log})" = 2 ]; do sleep 0.1; done
"""
"""What a reader does between starting the daemons and the order: they look whether these run."""


def blocks() -> list[str]:
    """The indented ones of the section, up to the settings."""
    [section] = re.findall(r"^## Use it\n(.*?)^## ", README, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", section, flags=re.MULTILINE)
    return [textwrap.dedent(block).strip("\n") + "\n" for block in found if block.strip()]


@pytest.fixture(scope="module")
def server(server_folder: Path) -> Iterator[PasswordServer]:
    """Asks for passwords, as a real one does."""
    with PasswordServer(server_folder / "readme") as started:
        yield started


async def test_an_order_becomes_a_pdf_by_the_readme(
    server: PasswordServer, rabbitmq: RabbitMQServer, tmp_path: Path
) -> None:
    package, install, init, use, settings, *_ = blocks()
    assert package.startswith("make deb"), "tests/packages follows that way"
    assert PIP in install
    assert use.count("psql -d shop -c ") == 1
    log = tmp_path / "log"
    places = {
        "/etc/pgbridge": f"{tmp_path}/etc",
        "/var/lib/pgbridge": f"{tmp_path}/lib",
        "/opt/pgbridge": f"{tmp_path}/opt",
        "postgresql://localhost/": f"postgresql://127.0.0.1:{server.port}/",
        "amqp://localhost/": f"amqp://127.0.0.1:{rabbitmq.port}/",
    }

    def here(text: str) -> str:
        for place, ours in places.items():
            text = text.replace(place, ours)
        return text

    install = install.replace("python3.11 -m venv ", f"{sys.executable} -m venv --without-pip ")
    install = install.replace(PIP, f"{sys.executable} -m {environment.__name__} /opt/pgbridge\n")
    use = use.replace("psql -d shop -c ", f"{WAITS.format(log=log)}psql -d shop -c ")
    script = tmp_path / "script"
    # What init writes for the shipped worker holds a place, too.
    moved = f"sed -i s,/var/lib/pgbridge,{tmp_path}/lib, {tmp_path}/etc/bridge.toml\n"
    script.write_text("\n".join(["set -euo pipefail", here(install), here(init), moved, here(use), "wait"]))
    with (
        log.open("w") as out,
        subprocess.Popen(
            ["bash", "--noprofile", "--norc", str(script)],
            cwd=environment.ROOT,
            env={
                **environment.environment(tmp_path / "opt" / "bin"),
                **rabbitmq.environment,
                "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
                "PGBRIDGE_CONFIG": f"{tmp_path}/etc/bridge.toml",
                "PGHOST": "127.0.0.1",
                "PGPORT": str(server.port),
                "PGUSER": "postgres",
            },
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as shell,
    ):
        try:
            await until(
                lambda: "order more: {'sku': 'CUP'" in log.read_text() and bool(rendered(server)),
                "an invoice, and a word on cups",
                60,
            )
        except AssertionError as error:
            raise AssertionError(log.read_text()) from error
        else:
            assert shell.poll() is None, log.read_text()
        finally:
            os.killpg(shell.pid, signal.SIGTERM)
    said = log.read_text()
    assert not re.search(r"^(FAIL|warn)  (?!channel Low Stock)", said, flags=re.MULTILINE), said
    [(path, dead)] = rendered(server)
    assert Path(path).read_bytes().startswith(b"%PDF")
    assert dead == 0
    toml = (tmp_path / "etc" / "bridge.toml").read_text()
    assert toml.partition("\n")[2] == here(settings)


def rendered(server: PasswordServer) -> list[tuple[str, int]]:
    try:
        with psycopg.connect(server.dsn("shop")) as connection:
            query = (
                "select path, (select count(*) from bridge.dead_letter)::int from shop.invoices where path is not null"
            )
            return connection.execute(query).fetchall()
    except (psycopg.OperationalError, psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return []
