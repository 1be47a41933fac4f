"""`pgbridge dead`: shows, replays and discards dead letters. How they are found and acted on is in dead_letters.py."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, Final, Literal, Never

import click

from bridge.brokers.contract import Letter
from bridge.commands.dead_groups import Group, grouped, place_of
from bridge.commands.dead_letters import Choice, Outcome, find, replay_or_discard, selected_ids, show
from bridge.errors import PgbridgeError, UsageError
from bridge.process.logs import configure
from bridge.process.person import current_person
from bridge.process.tasks import run
from bridge.process.terminal import (
    Moment,
    complain,
    config_option,
    dry_run_option,
    exit_codes,
    field,
    heading,
    json_option,
    moment,
    print_json,
    rate_option,
    stop_on_interrupt,
    table,
    topic_option,
)
from bridge.process.visible import one_line, visible
from bridge.settings import load

_GROUPS: Final = "groups"
"""What `dead list --group` without an id stands for."""


_group_option = click.option(
    "--group", "groups", multiple=True, metavar="ID", help="Letters of this group, see `pgbridge dead list --group`."
)


def _choosing(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that choose letters. The command gets them, with its ids and its limit, as one `choice`."""

    @topic_option
    @click.option("--code", "codes", multiple=True, help="As `unroutable`, `too_large`, `no_route`, `rejected`.")
    @click.option("--sink", "sinks", multiple=True, help="Letters of the outbox that this sink refused.")
    @click.option("--worker", "workers", multiple=True, help="Letters of this worker's queue.")
    @click.option("--since", type=Moment(), help='Given up since then: "2026-02-03 14:05", or "2h" ago.')
    @wraps(command)
    def with_choice(
        *,
        topics: tuple[str, ...],
        codes: tuple[str, ...],
        sinks: tuple[str, ...],
        workers: tuple[str, ...],
        since: datetime | None,
        ids: tuple[str, ...] = (),
        limit: int | None = None,
        groups: tuple[str, ...] = (),
        **others: Any,
    ) -> None:
        command(choice=Choice(selected_ids(ids), topics, codes, sinks, workers, since, limit, groups), **others)

    return with_choice


@click.group()
def dead() -> None:
    """Shows, replays and discards dead letters.

    They are those of the outbox, which a sink refused, and those of the workers' queues.
    """


@dead.command("list")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Most letters shown.")
@click.option(
    "--group",
    is_flag=False,
    flag_value=_GROUPS,
    metavar="[ID]",
    help="Without an id: a line for each group of one worker or sink, code and reason. With one: the letters of it.",
)
@config_option
@json_option
@exit_codes
@_choosing
def list_letters(choice: Choice, group: str | None, config: Path | None, as_json: bool) -> None:
    """Lists dead letters, oldest first, or the groups that they form.

    Letters of one group failed at one worker or sink, with one code and for one reason, whatever numbers and UUIDs the
    reason holds. `pgbridge dead replay --group ID` replays them.
    """
    if group == _GROUPS:
        _list_groups(choice, config, as_json)
    limit = choice.limit or 0
    chosen = replace(choice, limit=limit + 1, groups=() if group is None else (group,))
    found, exit_code = _find(config, chosen)
    if as_json:
        print_json([_letter_json(letter, payload=False) for letter in found[:limit]], indent=2)
    elif found:
        _print_letters(found[:limit])
    elif not exit_code:
        click.echo("There are no such dead letters.")
    if len(found) > limit:
        click.echo(f"There are more than {limit}; --limit shows more, filters fewer.", err=True)
    sys.exit(exit_code)


def _list_groups(choice: Choice, config: Path | None, as_json: bool) -> Never:
    """Every letter counts, whatever the limit of a list is."""
    found, exit_code = _find(config, replace(choice, limit=None))
    groups = grouped(found)
    if as_json:
        print_json([asdict(group) for group in groups], indent=2)
    elif groups:
        table([_group_row(group) for group in groups], whole=("group",))
    elif not exit_code:
        click.echo("There are no such dead letters.")
    sys.exit(exit_code)


def _group_row(group: Group) -> dict[str, str]:
    return {
        "group": group.id,
        "letters": str(group.letters),
        "first": moment(group.first),
        "last": moment(group.last),
        "from": group.place,
        "code": group.code,
        "reason": group.reason,
    }


def _print_letters(letters: Sequence[Letter]) -> None:
    table([_letter_row(letter) for letter in letters], whole=("id",))


def _find(config: Path | None, choice: Choice) -> tuple[list[Letter], int]:
    """The letters, and the exit code of the first box that could not be looked into; each such box is named."""
    settings = load(config)
    exit_code = 0

    def unreachable(box: str, error: PgbridgeError) -> None:
        nonlocal exit_code
        exit_code = exit_code or error.exit_code
        complain(f"the dead letters of {box}: {error}")

    return run(find(settings, choice, unreachable)), exit_code


def _letter_row(letter: Letter) -> dict[str, str]:
    return {
        "id": letter.id,
        "failed at": moment(letter.failed_at),
        "code": letter.code,
        "topic": letter.topic or "(no event)",
        "from": place_of(letter),
        "reason": letter.reason,
    }


def _letter_json(letter: Letter, *, payload: bool) -> dict[str, Any]:
    fields = asdict(letter)
    del fields["payload"]
    return fields | ({"payload": (letter.payload or b"").decode(errors="replace")} if payload else {})


@dead.command("show")
@click.argument("id_", metavar="ID")
@config_option
@json_option
@exit_codes
def show_letter(id_: str, config: Path | None, as_json: bool) -> None:
    """Shows one dead letter with its headers, trace and payload.

    Trace and payload are printed as they are, however long their lines.
    """
    (one,) = selected_ids([id_])
    fields = _letter_json(run(show(load(config), one)), payload=True)
    if as_json:
        print_json(fields, indent=2)
        return
    long = {name: fields.pop(name) for name in ("trace", "payload")}
    headers = fields.pop("headers")
    for name, value in (fields | {f"header {name}": value for name, value in headers.items()}).items():
        click.echo(field(name, _shown(value)))
    for name, value in long.items():
        if value:
            click.echo(f"\n{heading(name)}\n{visible(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, datetime):
        return moment(value)
    return "-" if value is None else str(value)


@dead.command("replay")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="Every dead letter there is.")
@click.option("--limit", type=click.IntRange(1), help="Most letters that are replayed.")
@_group_option
@rate_option
@dry_run_option
@config_option
@exit_codes
@_choosing
def replay_letters(choice: Choice, everything: bool, rate: float | None, dry_run: bool, config: Path | None) -> None:
    """Publishes dead letters again under the same event ids, with the header `replayed`.

    Letters of the outbox go to the sink that refused them, letters of a worker back to its queue; those of a worker
    with on_dead_letter = "hold" in the order of each key.
    """
    _act(config, "replay", choice, everything, dry_run, rate=rate)


@dead.command("discard")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="Every dead letter there is.")
@click.option("--limit", type=click.IntRange(1), help="Most letters that are discarded.")
@_group_option
@click.option("--why", required=True, help="The reason, for the audit in bridge.dead_letter_audit.")
@dry_run_option
@config_option
@exit_codes
@_choosing
def discard_letters(choice: Choice, everything: bool, why: str, dry_run: bool, config: Path | None) -> None:
    """Deletes dead letters for good; who did and why stays on record.

    A letter that holds its key still does so without it: `pgbridge-worker release NAME KEY --event ID` lets it go.
    """
    _act(config, "discard", choice, everything, dry_run, why=why)


def _act(
    config: Path | None,
    action: Literal["replay", "discard"],
    choice: Choice,
    everything: bool,
    dry_run: bool,
    *,
    why: str = "",
    rate: float | None = None,
) -> None:
    if choice.is_empty and not everything:
        raise UsageError(f"which letters? Name ids or filters, or say --all: pgbridge dead {action} --help")
    if dry_run:
        found, exit_code = _find(config, choice)
        _print_letters(found)
        click.echo(f"{len(found)} would be {action}ed.", err=True)
        sys.exit(exit_code)
    settings = load(config)
    configure(settings.observe)

    def report(letter: Letter, problem: str | None) -> None:
        click.echo(one_line(f"{letter.id}  {f'{action}ed' if problem is None else f'refused again: {problem}'}"))

    async def act() -> Outcome:
        stop = asyncio.Event()
        stop_on_interrupt(stop)
        return await replay_or_discard(
            settings, action, choice, person=current_person(), why=why, rate=rate, report=report, stop=stop
        )

    outcome = run(act())
    missing = [] if outcome.stopped else sorted(set(choice.ids) - outcome.seen)
    empty = [] if outcome.stopped else sorted(set(choice.groups) - outcome.groups)
    click.echo(f"{outcome.done} {action}ed.", err=True)
    if outcome.refused:
        click.echo(f"{outcome.refused} refused again; they stay, with the new reason.", err=True)
    if missing:
        click.echo(f"There are no such letters: {', '.join(missing)}", err=True)
    if empty:
        click.echo(f"There is no such group: {', '.join(empty)}; pgbridge dead list --group shows them.", err=True)
    sys.exit(130 if outcome.stopped else int(bool(outcome.refused or missing or empty)))
