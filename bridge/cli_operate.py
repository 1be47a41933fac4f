"""`pgbridge status` and `replay`: thin commands; what they do is in operate/."""

import asyncio
import json
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from bridge.commands.replay import Part, Replayed
from bridge.commands.replay import replay as replay_log
from bridge.commands.status import status_text
from bridge.errors import UsageError
from bridge.postgres.status import Status, rates, watch
from bridge.process.logs import configure
from bridge.process.tasks import run
from bridge.process.terminal import (
    Moment,
    config_option,
    dry_run_option,
    exit_codes,
    json_option,
    rate_option,
    stop_on_interrupt,
    table,
)
from bridge.settings import load


@click.command()
@config_option
@json_option
@click.option("--watch", "watching", is_flag=True, help="Looks again and again, with rates, until Ctrl-C.")
@click.option("--interval", type=click.FloatRange(0.1), default=2.0, show_default=True, help="Seconds between looks.")
@exit_codes
def status(config: Path | None, as_json: bool, watching: bool, interval: float) -> None:
    """Shows who leads, what waits, and what endangers the database. Ends with 1 when nobody leads."""
    settings = load(config)
    led = False

    async def look() -> None:
        nonlocal led
        before: Status | None = None
        async for now in watch(settings, interval if watching else None):
            led = any(bridge.name == settings.name and bridge.leader for bridge in now.bridges)
            if as_json:
                click.echo(json.dumps(_status_json(before, now), default=datetime.isoformat))
            else:
                if before is not None and sys.stdout.isatty():
                    click.clear()
                click.echo(status_text(settings, before, now))
            before = now

    try:
        run(look())
    except KeyboardInterrupt:
        sys.exit(130)
    if not led:
        click.echo(f"No bridge named {settings.name!r} is running; start one with: pgbridge run", err=True)
        sys.exit(1)


def _status_json(before: Status | None, now: Status) -> dict[str, Any]:
    told = asdict(now)
    for bridge in told["bridges"]:
        rate = rates(before, now, bridge["name"]) if before else None
        bridge |= {"emitted_per_second": rate and rate.emitted, "settled_per_second": rate and rate.settled}
    return told


@click.command()
@click.option("--from", "since", type=Moment(), required=True, help='From this time: "2026-02-03 14:05", or "2h" ago.')
@click.option("--to", "until", type=Moment(), help="Up to, and without, this time; default: now.")
@click.option("--topic", "topics", multiple=True, metavar="PATTERN", help="Only these; `*` one word, `#` any number.")
@rate_option
@dry_run_option
@config_option
@json_option
@exit_codes
def replay(
    since: datetime, until: datetime | None, topics: tuple[str, ...], rate: float | None, dry_run: bool,
    config: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Publishes part of the log again, in order, under the same event ids, with the header `replayed: true`."""
    settings = load(config)
    configure(settings.observe)
    part = Part(since, until or Moment().convert("0s", None, None), topics)
    if part.since >= part.until:
        raise UsageError(f"--from {part.since.isoformat()} is not before --to {part.until.isoformat()}")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))

    async def work(bar: Progress) -> tuple[Replayed, bool]:
        stop = asyncio.Event()
        stop_on_interrupt(stop)
        task = bar.add_task("reading")

        def show(so_far: Replayed) -> None:
            text = f"{so_far.confirmed} published, {so_far.refused} refused"
            done = so_far.position - so_far.begin
            bar.update(task, description=text, total=max(1, so_far.end - so_far.begin), completed=done)

        told = await replay_log(settings, part, rate=rate, dry_run=dry_run, stop=stop, progress=show)
        return told, stop.is_set()

    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        told, stopped = run(work(bar))
    if told.log_begins is not None:
        click.echo(f"The log begins at {told.log_begins.isoformat()}; events before that are pruned.", err=True)
    if as_json:
        click.echo(json.dumps({"confirmed": told.confirmed, "refused": told.refused, "by_topic": told.by_topic}))
    elif dry_run:
        table([{"topic": topic, "events": str(count)} for topic, count in sorted(told.by_topic.items())])
        click.echo(f"{told.by_topic.total()} would be published.", err=True)
    else:
        click.echo(f"{told.confirmed} published, {told.refused} refused (see: pgbridge dead list).")
    sys.exit(130 if stopped else int(bool(told.refused)))
