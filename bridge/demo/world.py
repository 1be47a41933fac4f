"""The demo's world: a folder, a database with the shop, a broker, the processes between them, and who is outside."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psycopg
from psycopg import sql

from bridge.demo.brokers import make_broker, require
from bridge.demo.partner import Partner
from bridge.demo.servers import PostgresServer, free_port
from bridge.demo.servers.process import LOOPBACK
from bridge.demo.services import Service, inherited_environment
from bridge.errors import PgbridgeError
from bridge.postgres.schema import migrate, sql_folder

DATABASE: Final = "shop"

WORKERS: Final = ("invoices", "payments", "webhooks")

LOGINS: Final[Mapping[str, str]] = {
    "shop_bridge": "bridge_relay",
    "shop_worker": "bridge_worker",
    "shop_checkout": "shop_seller",
    "shop_console": "bridge_operator",
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

[workers.payments]
handler = "workers.payments:pay"
reply = "shop.payment_done"
timeout = "5s"
retry_initial = "200ms"

[workers.payments.options]
api_key = "sk_test_fake"
# A Stripe that moves no money; leave this out for Stripe's own.
api_base = "{stripe}"
timeout = "2s"

[workers.webhooks]
handler = "workers.webhooks:fan_out"
subscribe = ["shop.order.placed"]
reply = "bridge.webhook_fan_out"
effects = false
timeout = "5s"
retry_initial = "200ms"

[workers.webhooks.options]
# The partner's endpoint is on this machine, where webhooks never go unless that is allowed.
allow = ["127.0.0.0/8"]

[observe]
log_format = "json"
"""


class World:
    """Entered, it runs database and broker; left, nothing of it runs any more, however it is left."""

    def __init__(self, folder: Path, broker: str) -> None:
        """`folder` exists, is empty, and may be entered by others. Raises MissingProgramError."""
        for module in ("typst", "stripe", "httpx", "httpcore", "cryptography", "starlette", "uvicorn", "jinja2"):
            require(module, "demo")
        self.folder = folder
        self.config = folder / "bridge.toml"
        self.invoices = folder / "invoices"
        self.postgres = PostgresServer(folder)
        self.broker = make_broker(broker, folder)
        config = ("--config", str(self.config))
        self.bridge = Service(
            "bridge", ["bridge.cli", "run", *config], ready='"action": "bridge.started"', folder=folder
        )
        self.workers = [
            Service(name, ["workers.cli", "run", name, *config], ready='"action": "worker.started"', folder=folder)
            for name in WORKERS
        ]
        self.sender = Service(
            "sender",
            ["workers.cli", "deliver", "webhooks", *config],
            ready='"action": "webhook.started"',
            folder=folder,
        )
        self.partner = Partner()
        port = free_port()
        self.stripe_url = f"http://{LOOPBACK}:{port}"
        self.stripe = Service(
            "stripe", ["workers.payments.fake", "--port", str(port)], ready="takes the key", folder=folder
        )
        address = f"{LOOPBACK}:{free_port()}"
        self.console_url = f"http://{address}"
        self.console = Service(
            "console",
            ["bridge.cli", "console", *config],
            ready='"action": "console.started"',
            folder=folder,
            settings={
                "PGBRIDGE_POSTGRES__DSN": self.dsn("shop_console"),
                "PGBRIDGE_CONSOLE__LISTEN": address,
            },
        )
        self._stack = ExitStack()

    @property
    def services(self) -> tuple[Service, ...]:
        """In the order in which they are stopped: the workers' last replies are still carried."""
        return *self.workers, self.sender, self.bridge

    def charges(self) -> list[dict[str, Any]]:
        """Whenever money moved, as Stripe has it: ``amount``, and ``metadata`` with the order's number."""
        with urllib.request.urlopen(f"{self.stripe_url}/_fake/ledger", timeout=10) as answer:  # noqa: S310 - on loopback
            found: list[dict[str, Any]] = json.load(answer)["charges"]
            return found

    def dsn(self, user: str = "postgres") -> str:
        """The shop's database, as the superuser or one of LOGINS."""
        return self.postgres.dsn(DATABASE, user)

    def __enter__(self) -> Self:
        with self._stack:
            self._stack.enter_context(self.postgres)
            self._stack.enter_context(self.broker.server)
            self._stack.enter_context(self.partner)
            for service in (self.stripe, self.console, *self.services):
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
            asked = connection.execute(
                "select signing_secret from bridge.add_endpoint(%s, '{shop.order.placed}', 'a partner')",
                [self.partner.url],
            )
            [(self.partner.secret,)] = asked.fetchall()

    def _write_settings(self) -> None:
        self.invoices.mkdir()
        self.config.write_text(
            _SETTINGS.format(
                dsn=json.dumps(self.dsn("shop_bridge")),
                worker_dsn=json.dumps(self.dsn("shop_worker")),
                sink=self.broker.sink,
                invoices=json.dumps(str(self.invoices), ensure_ascii=False),
                stripe=self.stripe_url,
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
