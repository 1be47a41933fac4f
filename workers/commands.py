"""`pgbridge-worker run`: runs one worker process. `pgbridge-worker list`: lists the workers of the settings."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from bridge.process.exposition import Labelled
from bridge.process.health import serving
from bridge.process.lazy import flush_each_line
from bridge.process.logs import configure
from bridge.process.tasks import run_daemon, stop_on_signals
from bridge.process.terminal import config_option, exit_codes, json_option, print_json, table
from bridge.process.traces import recording
from bridge.settings import Settings, load
from workers.build import build
from workers.loading import load_handler
from workers.metrics import REGISTRY


@click.command()
@click.argument("name")
@config_option
@exit_codes
def run_worker(name: str, config: Path | None) -> None:
    """Runs one process of the worker NAME until SIGTERM or SIGINT. Several may run side by side."""
    settings = load(config, of="workers")
    configure(settings.observe)
    flush_each_line()
    run_daemon(_run(name, settings, partial(load, config, of="workers")))


async def _run(name: str, settings: Settings, load_again: Callable[[], object]) -> None:
    with recording(settings, f"pgbridge-worker-{name}") as spans:
        worker = build(name, settings, spans)
        stop = stop_on_signals("worker", load_again)
        served = Labelled(REGISTRY, bridge=settings.name, worker=name)
        with serving(f"workers.{name}.listen", settings.workers[name].listen, worker.health, served):
            await worker.run(stop)


@click.command()
@config_option
@json_option
@exit_codes
def list_workers(config: Path | None, as_json: bool) -> None:
    """Lists the workers that the settings define."""
    settings = load(config, of="workers")
    workers = [_fields(name, settings) for name in sorted(settings.workers)]
    if as_json:
        print_json(workers, indent=2)
    elif workers:
        table([_row(worker) for worker in workers], whole=("name", "handler", "reply"), wrapped=True)
    else:
        click.echo("The settings define no worker; add a table [workers.<name>].")


def _fields(name: str, settings: Settings) -> dict[str, Any]:
    own = settings.workers[name]
    return {
        "name": name,
        "handler": own.handler,
        "topics": own.subscribe or list(load_handler(own.handler, name, own.path).topics),
        "sink": settings.sink_of(name),
        "concurrency": own.concurrency,
        "reply": own.reply,
    }


def _row(worker: dict[str, Any]) -> dict[str, str]:
    return {
        "name": worker["name"],
        "sink": worker["sink"],
        "concurrency": str(worker["concurrency"]),
        "handler": worker["handler"],
        "reply": worker["reply"] or "-",
        "topics": ", ".join(worker["topics"]),
    }
