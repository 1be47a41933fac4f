"""`pgbridge scheduled`: events that wait for their time, and taking them back."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from bridge.postgres.connection import connect
from bridge.postgres.scheduled import Scheduled, cancel_scheduled, next_scheduled
from bridge.process.tasks import run
from bridge.process.terminal import (
    complain,
    config_option,
    exit_codes,
    json_option,
    moment,
    print_json,
    table,
    topic_option,
)
from bridge.settings import Settings, load


async def _next(settings: Settings, topics: tuple[str, ...], most: int) -> list[Scheduled]:
    connection = await connect(settings.postgres, "pgbridge scheduled")
    async with connection:
        return await next_scheduled(connection, topics, most)


async def _cancel(settings: Settings, event_ids: tuple[str, ...]) -> list[str]:
    """Cancels each; gives those that were not waiting."""
    connection = await connect(settings.postgres, "pgbridge scheduled")
    async with connection:
        return [event_id for event_id in event_ids if not await cancel_scheduled(connection, event_id)]


@click.group()
def scheduled() -> None:
    """Lists and cancels events that wait for their time."""


@scheduled.command("list")
@topic_option
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Most events shown.")
@config_option
@json_option
@exit_codes
def list_scheduled(topics: tuple[str, ...], limit: int, config: Path | None, as_json: bool) -> None:
    """Lists events that wait for their time, the next one first."""
    found = run(_next(load(config), topics, limit + 1))
    if as_json:
        print_json([asdict(event) for event in found[:limit]], indent=2)
        return
    if not found:
        click.echo("No such event waits for its time.")
    table(
        [{"event": e.event_id, "at": moment(e.at), "topic": e.topic, "key": e.key or ""} for e in found[:limit]],
        whole=("event", "at"),
    )
    if len(found) > limit:
        click.echo(f"There are more than {limit}; see --limit and --topic.", err=True)


@scheduled.command("cancel")
@click.argument("event_ids", nargs=-1, required=True, type=click.UUID, metavar="EVENT_ID...")
@config_option
@exit_codes
def cancel(event_ids: tuple[object, ...], config: Path | None) -> None:
    """Takes events back that wait for their time. Ends with 1 where one of them does not."""
    late = run(_cancel(load(config), tuple(map(str, event_ids))))
    click.echo(f"{len(event_ids) - len(late)} cancelled", err=True)
    for event_id in late:
        complain(f"the event {event_id} does not wait for its time; see: pgbridge where {event_id}")
    if late:
        sys.exit(1)
