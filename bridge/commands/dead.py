"""`pgbridge dead`: shows, replays and discards dead letters. How they are found and ended is in letters.py."""

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from bridge.brokers.contract import Letter
from bridge.commands import letters
from bridge.commands.letters import Choice
from bridge.errors import PgbridgeError, UsageError
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

C = TypeVar("C", bound=Callable[..., Any])


def _choosing(command: C) -> C:
    for option in (
        click.option("--topic", "topics", multiple=True, metavar="PATTERN", help="`*` one word, `#` any number."),
        click.option("--code", "codes", multiple=True, help="As `unroutable`, `too_large`, `no_route`, `rejected`."),
        click.option("--sink", "sinks", multiple=True, help="Letters of the outbox that this sink refused."),
        click.option("--worker", "workers", multiple=True, help="Letters of this worker's queue."),
        click.option("--since", type=Moment(), help='Given up since then: "2026-02-03 14:05", or "2h" ago.'),
    ):
        command = option(command)
    return command


@click.group()
def dead() -> None:
    """Shows, replays and discards dead letters, those of the outbox and those of the workers' queues."""


@dead.command("list")
@_choosing
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Most letters shown.")
@config_option
@json_option
@exit_codes
def list_letters(
    topics: tuple[str, ...], codes: tuple[str, ...], sinks: tuple[str, ...], workers: tuple[str, ...],
    since: datetime | None, limit: int, config: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Lists dead letters, oldest first."""
    found, worst = _find(config, Choice((), topics, codes, sinks, workers, since, limit + 1))
    if as_json:
        click.echo(json.dumps([_letter_json(letter, payload=False) for letter in found[:limit]], indent=2))
    elif found:
        table([_letter_row(letter) for letter in found[:limit]])
    elif not worst:
        click.echo("There are no such dead letters.")
    if len(found) > limit:
        click.echo(f"There are more than {limit}; --limit shows more, filters fewer.", err=True)
    sys.exit(worst)


def _find(config: Path | None, choice: Choice) -> tuple[list[Letter], int]:
    """The letters, and the exit code for boxes that could not be looked into, which are told."""
    settings = load(config)
    found: list[Letter] = []
    worst = 0

    def unreachable(box: str, error: PgbridgeError) -> None:
        nonlocal worst
        worst = worst or error.exit_code
        click.echo(f"pgbridge: {box}: {error}", err=True)

    async def look() -> None:
        found.extend(await letters.find(settings, choice, unreachable))

    run(look())
    return found, worst


def _letter_row(letter: Letter) -> dict[str, str]:
    return {
        "id": letter.id,
        "failed at": f"{letter.failed_at.astimezone():%Y-%m-%d %H:%M:%S}" if letter.failed_at else "-",
        "topic": letter.topic or "(no event)",
        "key": letter.key or "-",
        "sink": letter.sink or "-",
        "code": letter.code,
        "attempts": str(letter.attempts),
        "reason": letter.reason if len(letter.reason) <= 120 else f"{letter.reason[:119]}…",
    }


def _letter_json(letter: Letter, *, payload: bool) -> dict[str, Any]:
    fields = asdict(letter) | {
        "failed_at": letter.failed_at and letter.failed_at.isoformat(),
        "created_at": letter.created_at and letter.created_at.isoformat(),
    }
    del fields["payload"]
    return fields | ({"payload": (letter.payload or b"").decode(errors="replace")} if payload else {})


@dead.command("show")
@click.argument("id_", metavar="ID")
@config_option
@json_option
@exit_codes
def show_letter(id_: str, config: Path | None, as_json: bool) -> None:
    """Shows one dead letter with its headers, trace and payload."""
    settings = load(config)

    async def look() -> None:
        fields = _letter_json(await letters.show(settings, letters.selected_ids([id_])[0]), payload=True)
        if as_json:
            click.echo(json.dumps(fields, indent=2, ensure_ascii=False))
            return
        long = {name: fields.pop(name) for name in ("trace", "payload")}
        for name, value in fields.items():
            text = "-" if value is None else json.dumps(value, ensure_ascii=False) if name == "headers" else value
            click.echo(f"{click.style(name, bold=True):<12}  {text}" if sys.stdout.isatty() else f"{name:<12}  {text}")
        for name, value in long.items():
            if value:
                click.echo(f"\n{click.style(name, bold=True)}\n{value}")

    run(look())


@dead.command("replay")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@_choosing
@click.option("--all", "everything", is_flag=True, help="Every dead letter there is.")
@click.option("--limit", type=click.IntRange(1), help="Most letters that are replayed.")
@rate_option
@dry_run_option
@config_option
@exit_codes
def replay_letters(
    ids: tuple[str, ...], topics: tuple[str, ...], codes: tuple[str, ...], sinks: tuple[str, ...],
    workers: tuple[str, ...], since: datetime | None, everything: bool, limit: int | None, rate: float | None,
    dry_run: bool, config: Path | None,
) -> None:  # fmt: skip
    """Publishes dead letters again under the same event ids, with the header `replayed: true`.

    Letters of the outbox go to the sink that refused them, letters of a worker back to its queue.
    """
    choice = Choice(letters.selected_ids(ids), topics, codes, sinks, workers, since, limit)
    _end(config, "replay", choice, everything, dry_run, rate=rate)


@dead.command("discard")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@_choosing
@click.option("--all", "everything", is_flag=True, help="Every dead letter there is.")
@click.option("--limit", type=click.IntRange(1), help="Most letters that are discarded.")
@click.option("--why", required=True, help="The reason, for the audit in bridge.dead_letter_audit.")
@dry_run_option
@config_option
@exit_codes
def discard_letters(
    ids: tuple[str, ...], topics: tuple[str, ...], codes: tuple[str, ...], sinks: tuple[str, ...],
    workers: tuple[str, ...], since: datetime | None, everything: bool, limit: int | None, why: str,
    dry_run: bool, config: Path | None,
) -> None:  # fmt: skip
    """Deletes dead letters for good; who did and why stays on record."""
    choice = Choice(letters.selected_ids(ids), topics, codes, sinks, workers, since, limit)
    _end(config, "discard", choice, everything, dry_run, why=why)


def _end(
    config: Path | None, action: Literal["replay", "discard"], choice: Choice, everything: bool, dry_run: bool,
    *, why: str = "", rate: float | None = None,
) -> None:  # fmt: skip
    if choice.is_empty and not everything:
        raise UsageError(f"which letters? Name ids or filters, or say --all: pgbridge dead {action} --help")
    if dry_run:
        found, worst = _find(config, choice)
        table([_letter_row(letter) for letter in found])
        click.echo(f"{len(found)} would be {action}ed.", err=True)
        sys.exit(worst)
    settings = load(config)
    configure(settings.observe)

    def told(letter: Letter, problem: str | None) -> None:
        click.echo(f"{letter.id}  {f'{action}ed' if problem is None else f'refused again: {problem}'}")

    async def act() -> letters.Ended:
        stop = asyncio.Event()
        stop_on_interrupt(stop)
        return await letters.end(settings, action, choice, why=why, rate=rate, told=told, stop=stop)

    ended = run(act())
    missing = [] if ended.stopped else sorted(set(choice.ids) - ended.seen)
    click.echo(f"{ended.done} {action}ed, {ended.refused} refused again.", err=True)
    if missing:
        click.echo(f"There are no such letters: {', '.join(missing)}", err=True)
    sys.exit(130 if ended.stopped else int(bool(ended.refused or missing)))
