"""`pgbridge pause` and `resume`: a sink or a worker takes nothing new until a person says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import click

from bridge.errors import UsageError
from bridge.postgres.connection import connect, database_errors
from bridge.process.person import current_person
from bridge.process.tasks import run
from bridge.process.terminal import config_option, exit_codes
from bridge.settings import Settings, load

_REACTION: Final = "within some 3 seconds"


def _what(command: Callable[..., None]) -> Callable[..., None]:
    sink = click.option("--sink", metavar="NAME", help="A sink of the settings.")
    worker = click.option("--worker", metavar="NAME", help="A worker of the settings, with all its processes.")
    return sink(worker(command))


def _chosen(settings: Settings, sink: str | None, worker: str | None, *, known: bool) -> tuple[str, str, str]:
    """Kind, bridge and name, as `bridge.pause` has them. Raises UsageError for what is not in the settings, where it
    is to be `known`."""
    if not settings.reads_outbox:
        raise UsageError('with channels.buffer = "memory" nothing is kept in the database, so nothing can be paused')
    match sink, worker:
        case str(), None if sink in settings.sinks or not known:
            return "sink", settings.name, sink
        case None, str() if worker in settings.workers or not known:
            return "worker", "", worker
        case str(), None:
            raise UsageError(f"there is no sink {sink!r}; the settings have: {', '.join(settings.sinks) or 'none'}")
        case None, str():
            raise UsageError(
                f"there is no worker {worker!r}; the settings have: {', '.join(settings.workers) or 'none'}"
            )
        case _:
            raise UsageError("name either --sink or --worker")


async def _ask(settings: Settings, query: str, *values: object) -> bool:
    connection = await connect(settings.postgres, "pgbridge pause")
    async with connection:
        with database_errors():
            [(answer,)] = await (await connection.execute(query, values)).fetchall()
    return bool(answer)


@click.command()
@_what
@click.option("--why", default="", metavar="TEXT", help="The reason, which `pgbridge status` shows.")
@config_option
@exit_codes
def pause(sink: str | None, worker: str | None, why: str, config: Path | None) -> None:
    """Pauses a sink or a worker, until `pgbridge resume`.

    A paused sink reads no more events; what it had read goes on its way, its position stays, and other sinks go on. A
    paused worker takes no more events, in none of its processes; handlers that run finish. A pause outlasts restarts.
    """
    settings = load(config)
    what = _chosen(settings, sink, worker, known=True)
    person = current_person()
    done = run(_ask(settings, "select bridge.set_pause(%s, %s, %s, %s, %s)", *what, person, why))
    said = f"is paused: it takes nothing more {_REACTION}" if done else "was paused already; its reason stays"
    click.echo(f"The {what[0]} {what[2]} {said}.", err=True)


@click.command()
@_what
@config_option
@exit_codes
def resume(sink: str | None, worker: str | None, config: Path | None) -> None:
    """Lets a paused sink or worker go on where it was."""
    settings = load(config)
    # What the settings do not name any more may still be paused.
    what = _chosen(settings, sink, worker, known=False)
    done = run(_ask(settings, "select bridge.end_pause(%s, %s, %s)", *what))
    said = f"goes on, {_REACTION}" if done else "was not paused"
    click.echo(f"The {what[0]} {what[2]} {said}.", err=True)
