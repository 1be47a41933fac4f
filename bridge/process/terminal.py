"""What the commands share: options, how they print, how they stop, and what they end with."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click
from rich.console import Console
from rich.table import Table

from bridge.errors import PgbridgeError, UsageError
from bridge.process.logs import journal_prefix
from bridge.settings.load import CREDENTIALS_VARIABLE
from bridge.settings.models import parse_duration

F = TypeVar("F", bound=Callable[..., Any])

_config_option = click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The settings; default: $PGBRIDGE_CONFIG, bridge.toml or /etc/pgbridge/bridge.toml.",
)


def _use_credentials(_context: click.Context, _option: click.Parameter, folder: Path | None) -> None:
    if folder is not None:
        os.environ[CREDENTIALS_VARIABLE] = str(folder)


_credentials_option = click.option(
    "--credentials",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    expose_value=False,
    callback=_use_credentials,
    help="Files that are named as keys; default: those of the units, in credentials/ beside the settings.",
)


def config_option(command: F) -> F:
    """Where the settings are, and their secrets; the command gets the first as `config`."""
    return _config_option(_credentials_option(command))


json_option = click.option("--json", "as_json", is_flag=True, help="For programs: JSON.")
topic_option = click.option(
    "--topic", "topics", multiple=True, metavar="PATTERN", help="Only these topics; `*` one word, `#` any number."
)
rate_option = click.option(
    "--rate", type=click.FloatRange(0.01), help="Most events a second; default: as fast as it goes."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Shows what would be done; does nothing.")


class Moment(click.ParamType[datetime]):
    """A time: ISO 8601 (local without an offset), or how long ago, as in ``2h``."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        if re.fullmatch(r"[\d.]+\s*[a-z]+", value):
            try:
                return datetime.now(UTC) - timedelta(seconds=parse_duration(value))
            except ValueError as error:
                self.fail(f"{value!r} {error}", param, ctx)
        try:
            return datetime.fromisoformat(value).astimezone(UTC)
        except ValueError:
            self.fail(
                f'{value!r} is not a time; write "2026-02-03 14:05", "2026-02-03T14:05:00Z", or how long ago: "2h"',
                param,
                ctx,
            )


def named_values(option: str, texts: Sequence[str]) -> dict[str, str]:
    """What an option of the form NAME=VALUE was given. Raises UsageError."""
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{option} {text!r} is not of the form NAME=VALUE")
        pairs[name] = value
    return pairs


def print_json(value: object, *, indent: int | None = None) -> None:
    """Prints a value for programs: on one line, or indented; times as ISO 8601."""
    click.echo(json.dumps(value, indent=indent, ensure_ascii=False, default=datetime.isoformat))


def complain(message: str) -> None:
    """Prints an error on standard error, behind the program's name; in the journal with the priority of an error."""
    prefix = journal_prefix("error")
    said = f"{click.get_current_context().find_root().info_name}: {message}"
    click.echo("\n".join(prefix + line for line in said.splitlines()), err=True)


def table(rows: Sequence[Mapping[str, str]]) -> None:
    """Prints rows under the keys of the first one."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in rows[0] if rows else ():
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*row.values())
    # In a pipe nothing is folded: programs such as grep read lines.
    Console(width=None if sys.stdout.isatty() else 10_000, markup=False).print(shown)


def visible(text: str) -> str:
    """Text that somebody else wrote, with control characters, which could do something to a terminal, written out.
    Lines stay lines."""
    return "".join(one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text)


def age(seconds: float | None) -> str:
    """A length of time in its two largest units; a dash for None."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    parts = [f"{count} {unit}" for count, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (left, "s")) if count]
    return " ".join(parts[:2])


def stop_on_interrupt(stop: asyncio.Event) -> None:
    """The first Ctrl-C sets `stop`, so that what is in flight is settled; the next one interrupts."""
    loop = asyncio.get_running_loop()

    def asked(number: signal.Signals) -> None:
        stop.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked, number)


P = ParamSpec("P")


def exit_codes(command: Callable[P, None]) -> Callable[P, None]:
    """For click commands: a PgbridgeError becomes one message on standard error, and its `exit_code`."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except PgbridgeError as error:
            complain(str(error))
            sys.exit(error.exit_code)

    return run
