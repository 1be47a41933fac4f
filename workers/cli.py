"""`pgbridge-worker`: runs one worker process, or lists the workers that the settings define."""

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bridge import __version__
from bridge.process.health import serving
from bridge.process.logs import configure
from bridge.process.tasks import run_daemon, stop_on_signals
from bridge.process.terminal import exit_codes
from bridge.settings import Settings, load
from workers.handler import load_handler
from workers.worker import build

_config = click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The settings; default: $PGBRIDGE_CONFIG, bridge.toml or /etc/pgbridge/bridge.toml.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Runs the workers that act on the events of pgbridge."""


@main.command("run")
@click.argument("name")
@_config
@exit_codes
def run_worker(name: str, config: Path | None) -> None:
    """Runs one process of the worker NAME until SIGTERM or SIGINT; several may run side by side."""
    settings = load(config)
    configure(settings.observe)
    run_daemon(_run(name, settings))


async def _run(name: str, settings: Settings) -> None:
    worker = build(name, settings)
    stop = stop_on_signals("worker")
    with serving(f"workers.{name}.listen", settings.workers[name].listen, worker.health):
        await worker.run(stop)


@main.command("list")
@_config
@click.option("--json", "as_json", is_flag=True, help="For programs: a JSON array.")
@exit_codes
def list_workers(config: Path | None, as_json: bool) -> None:
    """Lists the workers that the settings define."""
    settings = load(config)
    rows = [_row(name, settings) for name in sorted(settings.workers)]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo("The settings define no worker; add a table [workers.<name>].")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "handler", "topics", "sink", "concurrency", "reply"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row["name"],
            row["handler"],
            ", ".join(row["topics"]),
            row["sink"],
            str(row["concurrency"]),
            row["reply"] or "-",
        )
    # In a pipe nothing is folded: programs such as grep read lines.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def _row(name: str, settings: Settings) -> dict[str, Any]:
    own = settings.workers[name]
    return {
        "name": name,
        "handler": own.handler,
        "topics": own.subscribe or list(load_handler(own.handler, name).topics),
        "sink": settings.sink_of(name),
        "concurrency": own.concurrency,
        "reply": own.reply,
    }


if __name__ == "__main__":
    main()
