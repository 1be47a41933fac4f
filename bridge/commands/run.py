"""`pgbridge run`: the daemon, see `bridge.daemon`."""

from functools import partial
from pathlib import Path

import click

from bridge.daemon import run_until_signalled
from bridge.process.logs import configure
from bridge.process.tasks import run_daemon
from bridge.process.terminal import config_option, exit_codes
from bridge.settings import load


@click.command()
@config_option
@exit_codes
def run(config: Path | None) -> None:
    """Runs the bridge until SIGTERM or SIGINT. Several of one name stand by for each other.

    SIGHUP has it read its settings again, as it has every daemon of ours.
    """
    settings = load(config)
    configure(settings.observe)
    run_daemon(run_until_signalled(settings, partial(load, config)))
