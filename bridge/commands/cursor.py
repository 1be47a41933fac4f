"""`pgbridge cursor`: where each sink is in the log. It is moved to repeat events, or to skip them, on purpose."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import psycopg

from bridge.errors import PgbridgeError, UsageError
from bridge.postgres.connection import connect, database_errors
from bridge.postgres.status import Bridge, SinkPosition, look
from bridge.postgres.wire import Connection
from bridge.process.tasks import run
from bridge.process.terminal import Moment, age, config_option, exit_codes, json_option, print_json, table
from bridge.settings import Settings, load

_BOUND = 1_000_000
"""Events that are counted before a position is moved; beyond them it says "more than"."""

bridge_option = click.option("--bridge", "name", help="The bridge; default: the one of the settings.")


class Place(click.ParamType[int | str | datetime]):
    """An id of the log, ``now``, ``beginning``, or a time."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str | datetime:
        if isinstance(value, int | datetime):
            return value
        text = str(value)
        if text in ("now", "beginning"):
            return text
        return int(text) if text.isdecimal() else Moment().convert(text, param, ctx)


async def positions(settings: Settings) -> tuple[Bridge, ...]:
    """Every bridge of the database. Raises what `connect` and `look` raise."""
    connection = await connect(settings.postgres, "pgbridge cursor")
    async with connection:
        return (await look(connection, settings.outbox_or_default.retention)).bridges


async def move(
    settings: Settings, name: str, sink: str, place: int | str | datetime, *, skip: bool, dry_run: bool
) -> tuple[int, int, int]:
    """Moves a position; the id it was at, the id it is at, and how many of its events lie between, up to a bound.

    Raises UsageError where there is no such position, and where events would be skipped without `skip`.
    """
    connection = await connect(settings.postgres, "pgbridge cursor")
    async with connection:
        old = await _position(connection, settings, name, sink)
        new = await _id_of(connection, place)
        low, high = sorted((old.mark, new))
        between = (await _ask(connection, "bridge.events_between", name, sink, low, high, _BOUND)) + (
            old.held if new > old.mark else 0
        )
        if new > old.mark and between and not skip:
            raise UsageError(
                f"{_many(between)} events would never be published to {_shown(sink)}; add --skip if that is meant"
            )
        if not dry_run:
            await _ask(connection, "bridge.set_position", name, sink, new)
    return old.mark, new, between


async def forget(settings: Settings, name: str, sink: str, *, skip: bool) -> int:
    """Removes a position; how many events it had not settled. Raises UsageError as `move` does."""
    connection = await connect(settings.postgres, "pgbridge cursor")
    async with connection:
        old = await _position(connection, settings, name, sink)
        if old.backlog and not skip:
            raise UsageError(
                f"{_many(old.backlog)} events were not published to {_shown(sink)}, and nobody would; add --skip if "
                "that is meant"
            )
        await _ask(connection, "bridge.forget_position", name, sink)
    return old.backlog


async def _position(connection: Connection, settings: Settings, name: str, sink: str) -> SinkPosition:
    status = await look(connection, settings.outbox_or_default.retention)
    known = [position for bridge in status.bridges if bridge.name == name for position in bridge.sinks]
    for position in known:
        if position.sink == sink:
            return position
    names = ", ".join(repr(position.sink) for position in known) or "none"
    raise UsageError(f"the bridge {name!r} has no position of the sink {sink!r}; it has {names}")


async def _id_of(connection: Connection, place: int | str | datetime) -> int:
    """The id up to which all counts as settled."""
    if isinstance(place, int):
        return place
    if place == "beginning":
        return 0
    if place == "now":
        with database_errors():
            cursor = await connection.execute("select greatest(last_id, last_value) from bridge.sequence_state()")
            return int((await cursor.fetchall())[0][0])
    return max(0, int(await _ask(connection, "bridge.position_at", place)) - 1)


async def _ask(connection: Connection, function: str, *values: object) -> Any:
    """The value of one of our SQL functions. Raises UsageError while the bridge runs."""
    call = psycopg.sql.SQL("select {}({})").format(
        psycopg.sql.Identifier(*function.split(".")),
        psycopg.sql.SQL(", ").join([psycopg.sql.Placeholder()] * len(values)),
    )
    try:
        with database_errors():
            cursor = await connection.execute(call, values)
            return (await cursor.fetchall())[0][0]
    except PgbridgeError as error:
        if isinstance(error.__cause__, psycopg.errors.ObjectInUse):
            diag = error.__cause__.diag
            raise UsageError(f"{diag.message_primary}. {diag.message_hint}") from error
        raise


def _many(count: int) -> str:
    return f"more than {count}" if count >= _BOUND else str(count)


def _shown(sink: str) -> str:
    return f"the sink {sink!r}" if sink else "the dead letters (events without a route)"


@click.group()
def cursor() -> None:
    """Shows, moves and removes the positions of sinks in the log."""


@cursor.command()
@config_option
@json_option
@exit_codes
def show(config: Path | None, as_json: bool) -> None:
    """Shows where every sink of every bridge is. The sink '' is the position that finds events without a route."""
    bridges = run(positions(load(config)))
    if as_json:
        print_json([{"bridge": bridge.name, **asdict(sink)} for bridge in bridges for sink in bridge.sinks])
        return
    table(
        [
            {
                "bridge": bridge.name,
                "sink": sink.sink or "''",
                "mark": f"{sink.mark} of {bridge.last_id}",
                "gaps": str(sink.gaps),
                "held": str(sink.held),
                "backlog": f"{'' if sink.backlog_exact else '~'}{sink.backlog}",
                "stored": f"{age(sink.stored_seconds)} ago",
            }
            for bridge in bridges
            for sink in bridge.sinks
        ],
        whole=("bridge", "sink", "mark"),
    )


@cursor.command(name="set")
@click.argument("sink")
@click.option("--to", "place", type=Place(), required=True, help="An id, `beginning`, `now`, a time, or how long ago.")
@bridge_option
@click.option("--skip", is_flag=True, help="Moves forward, too: the events between are never published.")
@click.option("--dry-run", is_flag=True, help="Says what would be repeated or skipped; does nothing.")
@config_option
@exit_codes
def set_(
    sink: str, place: int | str | datetime, name: str | None, skip: bool, dry_run: bool, config: Path | None
) -> None:
    """Moves the position of SINK. All up to it counts as published, all behind it is published, again if it was before.

    The bridge must not run.
    """
    settings = load(config)
    old, new, count = run(move(settings, name or settings.name, sink, place, skip=skip or dry_run, dry_run=dry_run))
    what = "will be published again" if new < old else "are skipped"
    would = "would be moved" if dry_run else "moved"
    click.echo(f"{would} from {old} to {new}: {_many(count)} events {what}")


@cursor.command(name="forget")
@click.argument("sink")
@bridge_option
@click.option("--skip", is_flag=True, help="Although some of its events were not published.")
@config_option
@exit_codes
def forget_(sink: str, name: str | None, skip: bool, config: Path | None) -> None:
    """Removes the position of SINK: it keeps no events from being pruned any more, and begins anew if it comes back.

    The bridge must not run.
    """
    settings = load(config)
    lost = run(forget(settings, name or settings.name, sink, skip=skip))
    click.echo(f"forgotten; {_many(lost)} of its events were not published")
