"""`pgbridge-worker`: runs one worker process, or lists the workers that the settings define."""

import json
import sys
from datetime import timedelta
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast

import click
from rich.console import Console
from rich.table import Table

from bridge import __version__
from bridge.errors import SettingsError, UsageError
from bridge.observe.exit_codes import exit_codes
from bridge.process.health import serving
from bridge.process.logs import configure
from bridge.process.tasks import run_daemon
from bridge.settings import Settings, SinkSettings, load
from workers.handler import load_handler
from workers.inbox import Inbox
from workers.queues import Queue, Subscription
from workers.worker import Worker, stop_on_signals, subscription

_REMEMBERED = timedelta(days=30)
"""How long finished events are remembered at least."""


class QueueClass(Protocol):
    """What an entry point of the group `pgbridge.queues` names."""

    def __call__(self, settings: SinkSettings, subscription: Subscription, /) -> Queue: ...


def queue_class(sink: str, settings: SinkSettings) -> QueueClass:
    """The class that consumes from a sink's broker. Raises SettingsError when there is none, or its package lacks."""
    kinds = {point.name: point for point in entry_points(group="pgbridge.queues")}
    if settings.type not in kinds:
        raise SettingsError(
            f"sinks.{sink}.type: workers cannot consume from {settings.type!r}; installed: {', '.join(sorted(kinds))}"
        )
    try:
        return cast("QueueClass", kinds[settings.type].load())
    except ImportError as error:
        raise SettingsError(
            f"sinks.{sink}.type: {settings.type!r} lacks the package {error.name!r}: "
            f"pip install 'pgbridge[{settings.type}]'"
        ) from None


def build(name: str, settings: Settings) -> Worker:
    """The worker `name`, ready to run. Raises UsageError for an unknown name, SettingsError for wrong settings."""
    if name not in settings.workers:
        known = ", ".join(sorted(settings.workers)) or "none"
        raise UsageError(f"there is no worker {name!r} in the settings; known: {known}")
    own = settings.workers[name]
    try:
        handler = load_handler(own.handler)
        sink = settings.sink_of(name)
    except (SettingsError, ValueError) as error:
        raise SettingsError(str(error) if str(error).startswith("workers.") else f"workers.{name}.{error}") from error
    run = handler.configured(own.options, name)
    if not (own.subscribe or handler.topics):
        raise SettingsError(f"workers.{name}.subscribe: the handler names no topics, so the settings must")
    make = queue_class(sink, settings.sinks[sink])
    wanted = subscription(name, own, handler.topics)
    kept = timedelta(seconds=2 * settings.outbox.retention) if settings.outbox else _REMEMBERED
    return Worker(
        name,
        own,
        run,
        lambda: make(settings.sinks[sink], wanted),
        Inbox(name, settings.postgres, concurrency=own.concurrency, reply=own.reply),
        keep_finished=max(kept, _REMEMBERED),
    )


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
    stop_on_signals(worker)
    with serving(f"workers.{name}.listen", settings.workers[name].listen, worker.health):
        await worker.run()


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
    try:
        sink = settings.sink_of(name)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return {
        "name": name,
        "handler": own.handler,
        "topics": own.subscribe or list(load_handler(own.handler).topics),
        "sink": sink,
        "concurrency": own.concurrency,
        "reply": own.reply,
    }


if __name__ == "__main__":
    main()
