"""`python -m tests.bench`: measures, prints the table, and writes it to build/bench.json."""

import platform
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import click

from tests.bench import (
    backfill,
    brokers,
    console,
    gaps,
    latency,
    ordered,
    relay,
    scale,
    sql,
    trickle,
    trouble,
    webhooks,
    workers,
)
from tests.bench.quiet import at_rest
from tests.bench.registry import ORDER, measure, selected
from tests.bench.results import Row, table, write_json
from tests.bench.rounds import Plan, say
from tests.bench.world import World

REGISTERED = (
    relay, brokers, sql, backfill, workers, ordered, latency, trickle, scale, gaps, trouble, console, webhooks,
)  # fmt: skip
"""Importing these modules registers their themes."""

OUTPUT = Path("build/bench.json")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Two rounds at most and small sizes: shows that it works, no more.")
@click.option("--only", multiple=True, metavar="ROW", help="Only rows whose names begin so; may be repeated.")
@click.option("--rounds", type=click.IntRange(1), help="Rounds; default 5, with --quick 1.")
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, show_default=True, help="The JSON file.")
@click.option(
    "--beside",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="PYTHON",
    help="The interpreter of another checkout's environment, whose bridge takes part in the rows of bridges.",
)
@click.option("--list", "list_only", is_flag=True, help="Lists the themes and ends.")
@click.argument("more", nargs=-1, metavar="[ROW ...]")
def main(
    quick: bool,
    only: tuple[str, ...],
    rounds: int | None,
    output: Path,
    beside: Path | None,
    list_only: bool,
    more: tuple[str, ...],
) -> None:
    """Measures pgbridge beside its peers. ROWs that follow --only's are taken as well."""
    if list_only:
        click.echo("\n".join(ORDER))
        return
    try:
        names = selected([*only, *more])
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    # As an exception, so that the servers and their folder go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    rows: list[Row] = []
    if rest := at_rest():
        say(f"the machine is not quiet: {rest}")
    rounds = rounds or (1 if quick else 5)
    plan = Plan(rounds, repeats=0 if quick else rounds)
    with World(quick=quick, rounds=plan, beside=beside) as world:
        for name in names:
            rows += measure(name, world)
            write_json(rows, output)
        click.echo(f"\n{_machine()}; {world.describe()}\n")
    click.echo(table(rows))
    say(f"\n{time.monotonic() - began:.0f} s; written to {output}")
    sys.exit(1 if any(row.error for row in rows) else 0)


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine())
    cores = sum(line.startswith("processor") for line in lines)
    return (
        f"{cores} cores of {model}, Linux {platform.release()}, Python {platform.python_version()}, "
        f"psycopg {version('psycopg')}, uvloop {version('uvloop')}"
    )


if __name__ == "__main__":
    main()
