"""`pgbridge-worker`: the group of commands. Each is loaded when it is called, see `bridge.process.lazy`."""

from typing import Final

import click

from bridge import __version__
from bridge.process.lazy import LazyGroup
from pgbridge import require_ours

COMMANDS: Final = {
    "deliver": (
        "workers.webhooks.commands:deliver",
        "Sends the webhooks of the worker NAME until SIGTERM or SIGINT.",
    ),
    "held": (
        "workers.holds:held_keys",
        "Lists the keys of the worker NAME that dead letters hold, the longest held first.",
    ),
    "list": ("workers.commands:list_workers", "Lists the workers that the settings define."),
    "listen": (
        "workers.payments.listen:listen",
        "Receives Stripe's webhooks for the worker NAME until SIGTERM or SIGINT, and records them as events.",
    ),
    "new": ("workers.new:new_worker", "Writes a new worker: a handler, a test that passes, and settings."),
    "reconcile": (
        "workers.payments.reconcile:reconcile",
        "Asks Stripe what became of payments of the worker NAME that were begun and have no outcome.",
    ),
    "release": (
        "workers.holds:release_key",
        "Lets a held KEY of the worker NAME go on without the events that hold it.",
    ),
    "run": ("workers.commands:run_worker", "Runs one process of the worker NAME until SIGTERM or SIGINT."),
    "try": (
        "workers.trial:try_worker",
        "Runs the handler of the worker NAME on a payload, without broker and database.",
    ),
    "webhooks": (
        "workers.webhooks.endpoints:webhooks",
        "Adds, shows and mends the endpoints that webhooks are sent to.",
    ),
}
"""By name: where the command is, and the line that `pgbridge-worker --help` shows for it."""


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Runs the workers that act on the events of pgbridge."""


if __name__ == "__main__":
    require_ours("pgbridge-worker")
    main()
