"""`pgbridge-worker held` and `release`: which keys of a worker its dead letters hold, and letting them go."""

from pathlib import Path
from typing import Any
from uuid import UUID

import click

from bridge.errors import UsageError
from bridge.postgres.connection import connect, database_errors
from bridge.process.person import current_person
from bridge.process.tasks import run
from bridge.process.terminal import config_option, exit_codes, json_option, moment, print_json, table
from bridge.settings import Settings, WorkerSettings, load

_HELD = """
select key, min(since), (array_agg(event_id::text order by place))[1], count(*)
  from bridge.held where worker = %s group by key order by min(place)
"""


@click.command()
@click.argument("name")
@config_option
@json_option
@exit_codes
def held_keys(name: str, config: Path | None, as_json: bool) -> None:
    """Lists the keys of the worker NAME that dead letters hold, the longest held first.

    Once the cause is mended, `pgbridge dead replay --worker NAME` replays the letters in the order of each key.
    """
    settings = load(config)
    wanted = settings.worker(name)
    keys = run(_held(settings, name))
    if not keys:
        _require_holds(name, wanted)
    if as_json:
        print_json(keys, indent=2)
    elif keys:
        table([_row(key) for key in keys], whole=("first event", "key"))
    else:
        click.echo("No key is held.")


def _row(key: dict[str, Any]) -> dict[str, str]:
    return {
        "first event": key["first_event"],
        "since": moment(key["since"]),
        "events": str(key["events"]),
        "key": key["key"],
    }


async def _held(settings: Settings, name: str) -> list[dict[str, Any]]:
    connection = await connect(settings.postgres, "pgbridge held")
    async with connection:
        with database_errors():
            rows = await (await connection.execute(_HELD, [name])).fetchall()
    return [dict(zip(("key", "since", "first_event", "events"), row, strict=True)) for row in rows]


@click.command()
@click.argument("name")
@click.argument("key")
@click.option("--event", type=click.UUID, help="Only this one, as after its dead letter was discarded.")
@config_option
@exit_codes
def release_key(name: str, key: str, event: UUID | None, config: Path | None) -> None:
    """Lets a held KEY of the worker NAME go on without the events that hold it.

    Their dead letters stay until they are replayed or discarded; a replay then runs at once, whatever the key has done
    by then. With --event the others still hold the key, and the next of them may be replayed.
    """
    settings = load(config)
    wanted = settings.worker(name)
    released = run(_release(settings, name, key, event))
    if released:
        click.echo(f"{released} released.", err=True)
        return
    _require_holds(name, wanted)
    if event is None:
        raise UsageError(f"the key {key!r} is not held; `pgbridge-worker held {name}` shows those that are")
    raise UsageError(
        f"the event {event} does not hold the key {key!r}; `pgbridge dead list --worker {name}` shows dead letters"
    )


async def _release(settings: Settings, name: str, key: str, event: UUID | None) -> int:
    person = current_person()
    connection = await connect(settings.postgres, "pgbridge release")
    async with connection:
        with database_errors():
            asked = await connection.execute("select bridge.release_held(%s, %s, %s, %s)", [name, key, event, person])
            [(released,)] = await asked.fetchall()
    return int(released)


def _require_holds(name: str, settings: WorkerSettings) -> None:
    """Raises UsageError for a worker that holds no keys. One that did before may have left some."""
    if not settings.holds:
        raise UsageError(
            f'the worker {name!r} holds no keys: workers.{name}.on_dead_letter is "pass". With "hold" (and ordered = '
            "true) a dead letter holds its key"
        )
