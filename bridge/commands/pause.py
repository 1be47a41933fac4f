"""`pgbridge pause` and `resume`: a sink or a worker takes nothing new until a person says so."""

from collections.abc import Callable
from pathlib import Path

import click

from bridge.errors import UsageError
from bridge.postgres.connection import connect
from bridge.postgres.pause import REACTION, Pausable, end_pause, set_pause
from bridge.process.person import current_person
from bridge.process.tasks import run
from bridge.process.terminal import config_option, exit_codes
from bridge.settings import Settings, load


def _what(command: Callable[..., None]) -> Callable[..., None]:
    sink = click.option("--sink", metavar="NAME", help="A sink of the settings.")
    worker = click.option("--worker", metavar="NAME", help="A worker of the settings, with all its processes.")
    return sink(worker(command))


def _chosen(settings: Settings, sink: str | None, worker: str | None, *, known: bool) -> Pausable:
    """Raises UsageError for what is not in the settings, where it is to be `known`."""
    if not settings.reads_outbox:
        raise UsageError('with channels.buffer = "memory" nothing is kept in the database, so nothing can be paused')
    match sink, worker:
        case str(), None if sink in settings.sinks or not known:
            return Pausable("sink", settings.name, sink)
        case None, str() if worker in settings.workers or not known:
            return Pausable("worker", "", worker)
        case str(), None:
            raise UsageError(f"there is no sink {sink!r}; the settings have: {', '.join(settings.sinks) or 'none'}")
        case None, str():
            raise UsageError(
                f"there is no worker {worker!r}; the settings have: {', '.join(settings.workers) or 'none'}"
            )
        case _:
            raise UsageError("name either --sink or --worker")


async def _pause(settings: Settings, what: Pausable, why: str) -> bool:
    async with await connect(settings.postgres, "pgbridge pause") as connection:
        return await set_pause(connection, what, current_person(), why)


async def _resume(settings: Settings, what: Pausable) -> bool:
    async with await connect(settings.postgres, "pgbridge pause") as connection:
        return await end_pause(connection, what, current_person())


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
    done = run(_pause(settings, what, why))
    said = f"is paused: it takes nothing more {REACTION}" if done else "was paused already; its reason stays"
    click.echo(f"The {what.kind} {what.name} {said}.", err=True)


@click.command()
@_what
@config_option
@exit_codes
def resume(sink: str | None, worker: str | None, config: Path | None) -> None:
    """Lets a paused sink or worker go on where it was."""
    settings = load(config)
    # What the settings do not name any more may still be paused.
    what = _chosen(settings, sink, worker, known=False)
    done = run(_resume(settings, what))
    said = f"goes on, {REACTION}" if done else "was not paused"
    click.echo(f"The {what.kind} {what.name} {said}.", err=True)
