"""`python -m tests.pictures`: the pictures of docs/, of commands that run on servers of their own in 80 columns."""

import asyncio
import json
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import psycopg
from rich.console import Console
from rich.text import Text

from bridge.postgres.schema import migrate
from tests.support.daemons import Daemon, run_command
from tests.support.environment import ROOT
from tests.support.servers import PostgresServer, RabbitMQServer
from tests.support.shop import SHOP
from tests.support.until import rows_become

FOLDER: Final = ROOT / "docs" / "pictures"
COLUMNS: Final = 80

SETTINGS: Final = """
name = "shop"

[postgres]
dsn = {dsn}

[channels]
listen = ["orders"]

[sinks.events]
type = "rabbitmq"
url = {url}
max_message_bytes = 2000

[[routes]]
topic = "shop.#"
sink = "events"

[workers.invoices]
handler = "tests.support.worker_handlers:refuse"
subscribe = ["shop.invoice.requested"]

[workers.stock]
handler = "tests.support.worker_handlers:echo"
reply = "shop.rendered"
"""

EVENTS: Final = """
select bridge.emit('shop.order.placed', to_jsonb(n), 'customer-' || n) from generate_series(1, 40) n;
select bridge.emit('shop.invoice.requested', to_jsonb(n), 'customer-' || n) from generate_series(1, 7) n;
select bridge.emit('shop.order.scanned', to_jsonb(repeat('x', 3000 + n)), 'customer-' || n)
  from generate_series(1, 3) n;
"""

# rich's own names a font at another host.
FORMAT: Final = """\
<svg viewBox="0 28 {width} {terminal_height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
  <rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
<rect y="28" width="{width}" height="{terminal_height}" rx="8" fill="#0c0c0c"/>
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def typed(config: Path, *words: str) -> str:
    """What a command prints on a terminal of 80 columns, behind its prompt."""
    controller, terminal = pty.openpty()
    environ = {
        **os.environ,
        "COLUMNS": str(COLUMNS),
        "LINES": "50",
        "TERM": "xterm-256color",
        "PGBRIDGE_CONFIG": str(config),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "bridge.cli", *words], cwd=ROOT, env=environ, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        printed = b""
        while True:
            try:
                printed += os.read(controller, 65_536)
            except OSError:  # the other side has closed it
                break
    os.close(controller)
    assert process.returncode in (0, 1), printed.decode()
    return f"$ pgbridge {' '.join(words)}\n{printed.decode()}".replace("\r\n", "\n")


def draw(name: str, text: str) -> None:
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115 - ends with the process
    # The empty line at the end is room below the last one.
    console.print(Text.from_ansi(text.rstrip("\n") + "\n "), overflow="ignore", no_wrap=True)
    picture = console.export_svg(title="", code_format=FORMAT, unique_id=name)
    (FOLDER / f"{name}.svg").write_text(picture)


async def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pgbridge-pictures-") as place:
        folder = Path(place)
        folder.chmod(0o755)
        with PostgresServer(folder / "postgres") as postgres, RabbitMQServer(folder / "rabbitmq") as rabbitmq:
            dsn = postgres.create_database("shop")
            migrate(dsn)
            with psycopg.connect(dsn, autocommit=True) as admin:
                admin.execute(SHOP)
            text = SETTINGS.format(dsn=json.dumps(dsn), url=json.dumps(rabbitmq.url))
            bridge = Daemon(folder / "bridge", text)
            config = bridge.config
            assert run_command("topology", "--apply", "--config", str(config)).returncode == 0
            invoices = Daemon(folder / "invoices", config, "run", "invoices", module="workers.cli")
            stock = Daemon(folder / "stock", config, "run", "stock", module="workers.cli")
            with bridge, invoices, stock:
                bridge.wait_for("bridge.leading")
                with psycopg.connect(dsn, autocommit=True) as admin:
                    admin.execute(EVENTS.encode())
                    [(event,)] = admin.execute(
                        "select event_id from bridge.outbox where topic = 'shop.invoice.requested' order by id limit 1"
                    ).fetchall()
                await rows_become(dsn, "select count(*)::int from shop.invoice", [(40,)])
                await rows_become(
                    dsn, "select count(*)::int from bridge.dead_letter", [(43,)]
                )  # and 40 replies that nobody takes
                draw("status", typed(config, "status"))
                draw("check", typed(config, "check"))
                draw("dead", typed(config, "dead", "list", "--group"))
                draw("where", typed(config, "where", str(event)))


if __name__ == "__main__":
    asyncio.run(main())
