"""`pgbridge check`: looks at everything that must be right before the daemons can run, and prints a line for each.

It takes no message, publishes none and stores nothing, so it may be called at any time, also beside running daemons.
"""

import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

import click

from bridge.commands.check_brokers import (
    Judged,
    Subscriptions,
    of_sinks,
    of_topology,
    of_workers,
    subscriptions,
    weighed,
)
from bridge.commands.check_database import of_database, of_logins
from bridge.commands.check_room import of_room
from bridge.commands.check_settings import (
    of_channels,
    of_files,
    of_ports,
    of_routes,
    of_servers,
    of_subscriptions,
    of_traces,
    of_unled_sinks,
)
from bridge.commands.finding import Finding, failure
from bridge.errors import SettingsError
from bridge.process.tasks import run
from bridge.process.terminal import config_option, exit_codes, json_option, print_json, wrapped
from bridge.settings import Process, Settings, find, load

__all__ = ["Finding", "check", "findings"]

BOTH: Final[Sequence[Process]] = ("bridge", "workers")


async def findings(
    settings: Settings,
    workers: Settings | None = None,
    *,
    processes: Sequence[Process] = BOTH,
    config: Path | None = None,
) -> AsyncIterator[Finding]:
    """Checks one thing after the other, and leaves out what a failure before has made meaningless.

    `workers`: the settings as the workers read them, where those have credentials of their own. `config`: the file that
    all of it comes from, to look at who may read that.
    """
    theirs = settings if workers is None else workers
    bridge_runs, workers_run = "bridge" in processes, "workers" in processes and bool(theirs.workers)
    workers_login = "workers" in processes and (workers_run or theirs.workers_login is not None)
    for finding in _of_this_machine(settings, theirs, processes, config):
        yield finding
    database_ok = True
    if bridge_runs:
        async for finding in of_database(settings):
            yield finding
            database_ok = database_ok and (finding.ok or finding.subject not in ("postgres", "schema"))
    logins = [*([settings.postgres] if bridge_runs else []), *([theirs.workers_postgres] if workers_login else [])]
    async for finding in of_logins(logins):
        yield finding
    if database_ok:
        async for finding in of_room(settings, theirs, bridge=bridge_runs, workers=workers_run):
            yield finding
    for finding in of_channels(settings) if bridge_runs else ():
        yield finding
    found = await of_sinks(settings) if bridge_runs else []
    wanted: Subscriptions = {}
    try:
        wanted = subscriptions(theirs) if workers_run else {}
    except SettingsError as error:
        topology = failure("topology", error)
    else:
        topology = await of_topology(settings, theirs, wanted, processes)
        if bridge_runs:
            for finding in of_subscriptions(settings, wanted):
                yield finding
    # Behind a database that cannot be used, the same would be said of each worker that has its login.
    if topology.ok and (database_ok or theirs.workers_login is not None):
        found += await of_workers(theirs, wanted)
    brokers = list(zip(weighed(found), found, strict=True))
    for finding in _of(brokers, "bridge"):
        yield finding
    yield topology
    for finding in _of(brokers, "workers"):
        yield finding


def _of(brokers: Sequence[tuple[Finding, Judged]], process: Process) -> Sequence[Finding]:
    return [finding for finding, judged in brokers if judged.process == process]


def _of_this_machine(
    settings: Settings, workers: Settings, processes: Sequence[Process], config: Path | None
) -> Sequence[Finding]:
    found: list[Finding] = list(of_files(config)) if config is not None else []
    found += of_ports(settings, processes)
    if "bridge" in processes:
        found += [of_routes(settings), *of_unled_sinks(settings), *of_servers(settings)]
    if "workers" in processes and (workers.sinks != settings.sinks or "bridge" not in processes):
        found += of_servers(workers)
    return [*found, *of_traces(settings)]


@click.command()
@config_option
@click.option(
    "--for",
    "process",
    type=click.Choice(BOTH),
    help="Looks only at what this kind of process needs, with its credentials.",
)
@json_option
@exit_codes
def check(config: Path | None, process: Process | None, as_json: bool) -> None:
    """Checks settings, database, privileges, brokers, topology and workers.

    Prints one line for each, with what to do about what is wrong, and ends with the code of the first that is wrong.
    """
    config = config or find()
    settings, workers = load(config), load(config, of="workers")
    if process == "workers":
        settings = workers
    first_wrong = 0

    async def look() -> None:
        nonlocal first_wrong
        if not as_json:
            _print(Finding("settings", ok=True, text=f"name {settings.name!r}"))
        processes: Sequence[Process] = BOTH if process is None else (process,)
        async for finding in findings(settings, workers, processes=processes, config=config):
            first_wrong = first_wrong or finding.exit_code
            if as_json:
                print_json({name: getattr(finding, name) for name in ("subject", "ok", "warning", "text")})
            else:
                _print(finding)

    run(look())
    sys.exit(first_wrong)


def _print(finding: Finding) -> None:
    mark = click.style("ok  ", fg="green") if finding.ok else click.style("FAIL", fg="red")
    if finding.warning:
        mark = click.style("warn", fg="yellow")
    subject = f"{finding.subject:<18} "
    click.echo(f"{mark}  {subject}" + wrapped(finding.text, first=6 + len(subject), rest=25))
