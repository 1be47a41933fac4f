"""`pgbridge demo`: runs the embedded world, see `bridge.demo`."""

import sys
from pathlib import Path

import click

from bridge.errors import UsageError
from bridge.process.terminal import exit_codes, json_option


@click.command()
@click.option("--broker", type=click.Choice(["embedded", "rabbitmq", "pubsub"]), default="embedded", show_default=True)
@click.option("--orders", type=click.IntRange(1), default=200, show_default=True, help="How many orders are placed.")
@click.option("--rate", type=click.FloatRange(0.1), default=20.0, show_default=True, help="Orders a second.")
@click.option("--kill", is_flag=True, help="Kills bridge, workers and database on the way.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="A folder to work in and to keep.")
@json_option
@exit_codes
def demo(broker: str, orders: int, rate: float, kill: bool, keep: Path | None, as_json: bool) -> None:
    """Runs the embedded world: a shop from orders to invoices and payments, live.

    It ends with a count of what was lost, which is 0.
    """
    try:
        from bridge.demo.run import run as run_demo
    except ImportError as error:
        raise UsageError(f"the demo needs the package {error.name!r}: pip install 'pgbridge[demo]'") from error
    sys.exit(run_demo(broker, orders, rate, kill, as_json, keep))
