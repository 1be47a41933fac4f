"""What the brokers have of what the settings need, and how it is declared."""

import json
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

import click

from bridge.brokers.contract import Declaration
from bridge.brokers.registry import broker_of
from bridge.process.tasks import run as run_loop
from bridge.process.terminal import config_option, exit_codes, json_option, table
from bridge.settings import Settings, load


async def declarations(settings: Settings, *, apply: bool) -> Sequence[tuple[str, Sequence[Declaration]]]:
    """Pairs of an owner (``sink <name>``, ``worker <name>``) and its declarations; with `apply`, declares the missing.

    Raises BrokerUnavailableError, SettingsError.
    """
    found = [
        (f"sink {name}", await broker_of(sink).sink(sink).topology(apply=apply))
        for name, sink in settings.sinks.items()
    ]
    # The bridge never imports the workers, so what they want comes through an entry point.
    for point in entry_points(group="pgbridge.subscriptions"):
        for worker, (sink, subscription) in point.load()(settings).items():
            queue = broker_of(settings.sinks[sink]).queue(settings.sinks[sink], subscription)
            found.append((f"worker {worker}", await queue.topology(apply=apply)))
    return found


@click.command()
@config_option
@click.option("--apply", is_flag=True, help="Declares what is missing.")
@json_option
@exit_codes
def topology(config: Path | None, apply: bool, as_json: bool) -> None:
    """Shows what the brokers have of what these settings need."""
    settings = load(config)
    rows: list[dict[str, str]] = []

    async def look() -> None:
        for owner, declared in await declarations(settings, apply=apply):
            rows.extend(
                {"owner": owner, "kind": d.kind, "name": d.name, "state": d.state, "detail": d.detail} for d in declared
            )

    run_loop(look())
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        table(rows)
    if any(row["state"] in ("missing", "differs") for row in rows):
        click.echo("Something is missing or differs; declare what is missing with: pgbridge topology --apply", err=True)
        sys.exit(1)
