"""`pgbridge console`: the web console, see `bridge.console`."""

from functools import partial
from pathlib import Path

import click

from bridge.errors import SettingsError
from bridge.process.extras import how_to_install
from bridge.process.logs import configure
from bridge.process.tasks import run_daemon
from bridge.process.terminal import config_option, exit_codes
from bridge.settings import load


@click.command()
@config_option
@exit_codes
def console(config: Path | None) -> None:
    """Serves the web console until SIGTERM or SIGINT.

    Its address is `console.listen` in the settings, http://127.0.0.1:8417 by default, where it needs no login. The
    database's login, `postgres.dsn`, is that of a bridge_operator, or of a bridge_viewer for looking only.
    """
    settings = load(config, of="console")
    configure(settings.observe)
    try:
        from bridge.console.server import run_until_signalled
    except ModuleNotFoundError as error:
        how = how_to_install(error.name or "")
        if how is None:
            raise
        raise SettingsError(f"the console needs the package {error.name}: {how}") from error
    run_daemon(run_until_signalled(settings, partial(load, config, of="console")))
