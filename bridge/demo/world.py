"""The demo's world: a folder, a database with the shop, a broker, and the processes between them."""

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psycopg
from psycopg import sql

from bridge.demo.brokers import make_broker, require
from bridge.demo.servers import PostgresServer
from bridge.demo.services import Service, inherited_environment
from bridge.errors import PgbridgeError
from bridge.postgres.schema import migrate, sql_folder

DATABASE: Final = "shop"

LOGINS: Final[Mapping[str, str]] = {
    "shop_bridge": "bridge_relay",
    "shop_worker": "bridge_worker",
    "shop_checkout": "shop_seller",
}
"""Login roles, each in the one group that has exactly the rights it needs. The checkout's is in bridge_emitter."""

_SETTINGS: Final = """\
# What `pgbridge demo` runs on.
name = "shop"

[postgres]
dsn = {dsn}

[channels]
listen = ["Low Stock"]
buffer = "outbox"

[sinks.events]
{sink}
[[routes]]
topic = "#"
sink = "events"

[workers]
dsn = {worker_dsn}

[workers.invoices]
handler = "workers.invoices:render"
reply = "shop.invoice_rendered"
# NATS notices a killed worker only when twice this time and 30 s have passed, and gives what it had in hand to another.
timeout = "5s"
retry_initial = "200ms"

[workers.invoices.options]
path = {invoices}

[observe]
log_format = "json"
"""


class World:
    """Entered, it runs database and broker; left, nothing of it runs any more, however it is left."""

    def __init__(self, folder: Path, broker: str) -> None:
        """`folder` exists, is empty, and may be entered by others. Raises MissingProgramError."""
        require("typst", "demo")
        self.folder = folder
        self.config = folder / "bridge.toml"
        self.invoices = folder / "invoices"
        self.postgres = PostgresServer(folder)
        self.broker = make_broker(broker, folder)
        config = ("--config", str(self.config))
        self.bridge = Service(
            "bridge", ["bridge.cli", "run", *config], ready='"action": "bridge.started"', folder=folder
        )
        self.worker = Service(
            "worker",
            ["workers.cli", "run", "invoices", *config],
            ready='"action": "worker.started"',
            folder=folder,
        )
        self._stack = ExitStack()

    @property
    def services(self) -> tuple[Service, Service]:
        """In the order in which they are stopped: the worker's last replies are still carried."""
        return self.worker, self.bridge

    def dsn(self, user: str = "postgres") -> str:
        """The shop's database, as the superuser or one of LOGINS."""
        return self.postgres.dsn(DATABASE, user)

    def __enter__(self) -> Self:
        with self._stack:
            self._stack.enter_context(self.postgres)
            self._stack.enter_context(self.broker.server)
            for service in self.services:
                self._stack.callback(service.kill)
            self._install_shop()
            self._write_settings()
            self._declare_topology()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _install_shop(self) -> None:
        self.postgres.create_database(DATABASE)
        migrate(self.dsn())
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            connection.execute((sql_folder() / "examples" / "shop.sql").read_bytes())
            for login, group in LOGINS.items():
                connection.execute(
                    sql.SQL("create role {} login in role {}").format(sql.Identifier(login), sql.Identifier(group))
                )

    def _write_settings(self) -> None:
        self.invoices.mkdir()
        self.config.write_text(
            _SETTINGS.format(
                dsn=json.dumps(self.dsn("shop_bridge")),
                worker_dsn=json.dumps(self.dsn("shop_worker")),
                sink=self.broker.sink,
                invoices=json.dumps(str(self.invoices), ensure_ascii=False),
            ),
            encoding="utf-8",
        )

    def _declare_topology(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "bridge.cli", "topology", "--apply", "--config", str(self.config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            cwd=self.folder,
            env=inherited_environment(),
        )
        if done.returncode != 0:
            raise PgbridgeError(f"pgbridge topology --apply ended with {done.returncode}:\n{done.stdout}")
