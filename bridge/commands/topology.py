"""`pgbridge topology`: what the brokers have of what the settings need, and declaring what is missing."""

from collections.abc import Sequence
from pathlib import Path

import click

from bridge.brokers.contract import Declaration
from bridge.brokers.registry import broker_of
from bridge.errors import TopologyError
from bridge.process.tasks import run
from bridge.process.terminal import config_option, exit_codes, json_option, print_json, table
from bridge.settings import Settings, load
from bridge.settings.installed import points

Declared = Sequence[tuple[str, Sequence[Declaration]]]
"""Pairs of an owner, ``sink <name>`` or ``worker <name>``, and what it needs."""


async def declarations(settings: Settings, workers: Settings, *, apply: bool) -> Declared:
    """What every sink and worker needs, and whether its broker has it; with `apply`, declares what is missing first.
    `workers`: the settings as the workers read them.

    Raises BrokerUnavailableError, RefusedError, SettingsError.
    """
    found = [
        (f"sink {name}", await broker_of(sink).sink(sink).topology(apply=apply))
        for name, sink in settings.sinks.items()
    ]
    # The bridge never imports the workers, so what they want comes through an entry point.
    for point in points("pgbridge.subscriptions"):
        for worker, (sink, subscription) in point.load()(workers).items():
            queue = broker_of(workers.sinks[sink]).queue(workers.sinks[sink], subscription)
            found.append((f"worker {worker}", await queue.topology(apply=apply)))
    return found


def require_complete(declared: Declared) -> None:
    """Raises TopologyError that names everything that is missing or differs, and what to do about it."""
    found = [(owner, one) for owner, all_of_it in declared for one in all_of_it]
    missing = [f"{one.kind} {one.name} ({owner})" for owner, one in found if one.state == "missing"]
    differs = [f"{one.kind} {one.name} ({owner}): {one.detail}" for owner, one in found if one.state == "differs"]
    sentences = []
    if missing:
        sentences.append(f"missing: {', '.join(missing)}. Declare what is missing: pgbridge topology --apply")
    if differs:
        sentences.append(f"different: {'; '.join(differs)}. Change it on the broker, or change the settings")
    if sentences:
        raise TopologyError(". ".join(sentences))


@click.command()
@config_option
@click.option("--apply", is_flag=True, help="Declares what is missing.")
@json_option
@exit_codes
def topology(config: Path | None, apply: bool, as_json: bool) -> None:
    """Shows what the brokers have of what these settings need. Ends with 69 when something is missing or different."""
    declared = run(declarations(load(config), load(config, of="workers"), apply=apply))
    rows = [
        {"owner": owner, "kind": one.kind, "name": one.name, "state": one.state, "detail": one.detail}
        for owner, all_of_it in declared
        for one in all_of_it
    ]
    if as_json:
        print_json(rows, indent=2)
    else:
        table(rows, whole=("owner", "name"), wrapped=True)
    require_complete(declared)
