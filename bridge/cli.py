"""`pgbridge`: the group of commands. Each is loaded when it is called, so that `--help` answers at once."""

from typing import Final

import click

from bridge import __version__
from bridge.process.lazy import LazyGroup
from pgbridge import require_ours

COMMANDS: Final = {
    "asyncapi": (
        "bridge.commands.asyncapi:asyncapi",
        "Writes an AsyncAPI document of what this database emits, and where it goes.",
    ),
    "backfill": (
        "bridge.commands.backfill:backfill",
        "Sends the present rows of a watched table as events, beside its changes.",
    ),
    "check": ("bridge.commands.check:check", "Checks settings, database, privileges, brokers, topology and workers."),
    "console": ("bridge.commands.console:console", "Serves the web console until SIGTERM or SIGINT."),
    "cursor": ("bridge.commands.cursor:cursor", "Shows, moves and removes the positions of sinks in the log."),
    "dead": ("bridge.commands.dead:dead", "Shows, replays and discards dead letters."),
    "demo": (
        "bridge.commands.demo:demo",
        "Runs the embedded world: a shop from orders to invoices and payments, live.",
    ),
    "emit": ("bridge.commands.events:emit", "Sends one event to TOPIC and prints its id."),
    "init": ("bridge.commands.init:init", "Writes bridge.toml, the DBA's SQL, and the broker's accounts."),
    "migrate": ("bridge.commands.migrate:migrate", "Installs the schema `bridge`, or upgrades it."),
    "pause": ("bridge.commands.pause:pause", "Pauses a sink or a worker, until `pgbridge resume`."),
    "replay": ("bridge.commands.replay:replay", "Publishes part of the log again, in order."),
    "resume": ("bridge.commands.pause:resume", "Lets a paused sink or worker go on where it was."),
    "run": ("bridge.commands.run:run", "Runs the bridge until SIGTERM or SIGINT."),
    "scheduled": ("bridge.commands.scheduled:scheduled", "Lists and cancels events that wait for their time."),
    "status": ("bridge.commands.status:status", "Shows who leads, what waits, and what endangers the database."),
    "tail": ("bridge.commands.events:tail", "Shows events as they are committed, without consuming them."),
    "topology": ("bridge.commands.topology:topology", "Shows what the brokers have of what these settings need."),
    "where": ("bridge.commands.where:where", "Follows one event through log, sinks, dead letters and workers."),
}
"""By name: where the command is, and the line that `pgbridge --help` shows for it."""


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Carries committed PostgreSQL events to message queues."""


if __name__ == "__main__":
    require_ours("pgbridge")
    main()
