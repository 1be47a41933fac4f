"""What the commands share: options, how they print, how they stop, and what they end with."""

import asyncio
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import click
from rich.cells import cell_len, set_cell_size

from bridge.errors import PgbridgeError, UsageError
from bridge.process.logs import journal_prefix, keep_off_output
from bridge.process.visible import json_text, one_line, visible
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
    _direction = -1
    _in_words = "how long ago"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        if re.fullmatch(r"[\d.]+\s*[a-z]+", value):
            try:
                return datetime.now(UTC) + self._direction * timedelta(seconds=parse_duration(value))
            except ValueError as error:
                self.fail(f"{value!r} {error}", param, ctx)
            except OverflowError:
                self.fail(f"{value!r} is no time of this calendar", param, ctx)
        try:
            return datetime.fromisoformat(value).astimezone(UTC)
        except ValueError:
            self.fail(
                f'{value!r} is not a time; write "2026-02-03 14:05", "2026-02-03T14:05:00Z", or {self._in_words}: "2h"',
                param,
                ctx,
            )


class Due(Moment):
    """A time to come: as a Moment, but that ``2h`` is in two hours."""

    _direction = 1
    _in_words = "in how long"


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
    click.echo(json_text(value, indent=indent, default=datetime.isoformat))


def complain(message: str) -> None:
    """Prints an error on standard error, behind the program's name; in the journal with the priority of an error."""
    prefix = journal_prefix("error")
    said = visible(f"{click.get_current_context().find_root().info_name}: {message}")
    click.echo("\n".join(prefix + line for line in said.split("\n")), err=True)


_NARROW: Final = 80
"""Columns where there is no terminal, and of the usual one."""
_LEAST_LAST: Final = 24
"""Columns that the last field of a row has at least, before it gets a line of its own."""
_GAP: Final = "  "


def columns() -> int:
    """How wide the terminal is; 80 where standard output is none."""
    return shutil.get_terminal_size((_NARROW, 24)).columns if sys.stdout.isatty() else _NARROW


def moment(at: datetime | None, *, exact: bool = False) -> str:
    """A time as people read it, on this machine's clock and with its zone; a dash for None. `exact`: to the
    microsecond."""
    if at is None:
        return "-"
    return f"{at.astimezone():{'%Y-%m-%d %H:%M:%S.%f %Z' if exact else '%Y-%m-%d %H:%M:%S %Z'}}"


def table(rows: Sequence[Mapping[str, str]], *, whole: Collection[str] = (), wrapped: bool = False) -> None:
    """Prints rows, aligned, under the keys of the first one, within the width of the terminal.

    A row takes as many lines as its fields need. Those named in `whole` are never cut, so that they can be copied;
    others take a third of the width at most. The last field has what is left: it is shortened, or with `wrapped` goes
    on below.
    """
    if not rows:
        return
    names = list(rows[0])
    cells = [{name: one_line(row[name]) for name in names} for row in rows]
    width = columns()
    widths = {name: max(cell_len(name), *(cell_len(row[name]) for row in cells)) for name in names}
    for name in names:
        if name not in (*whole, names[-1]):
            widths[name] = max(cell_len(name), min(widths[name], width // 3))
    lines = _fill(names, widths, width)
    header = {name: name for name in names}
    for row in (header, *cells):
        for number, line in enumerate(lines):
            text = "" if number == 0 else _GAP
            for name in line[:-1]:
                text += _padded(_cut(row[name], widths[name]), widths[name]) + _GAP
            last = line[-1]
            left = width - cell_len(text)
            if last != names[-1]:
                shown = [_cut(row[last], widths[last])]
            elif last in whole or row is header:
                shown = [row[last]]
            else:
                shown = _wrap(row[last], left) if wrapped else [_cut(row[last], left)]
            text += ("\n" + " " * cell_len(text)).join(shown)
            text = "\n".join(one.rstrip() for one in text.split("\n"))
            if text or number == 0:
                click.echo(click.style(text, bold=True) if row is header else text)


def _fill(names: Sequence[str], widths: Mapping[str, int], width: int) -> Sequence[Sequence[str]]:
    """The names in lines, each as full as it may be."""
    lines: list[list[str]] = [[]]
    room = width
    for name in names:
        wanted = min(widths[name], _LEAST_LAST) if name == names[-1] else widths[name]
        if lines[-1] and wanted > room:
            lines.append([])
            room = width - len(_GAP)
        lines[-1].append(name)
        room -= widths[name] + len(_GAP)
    return lines


def heading(text: str) -> str:
    """A line above others."""
    return click.style(one_line(text), bold=True)


def field(name: str, value: str, *, indent: int = 0, label: int = 12) -> str:
    """A line that says one thing under its name, which has `label` columns; what is too long for the terminal goes on
    below, between words only, so that ids stay whole."""
    head = f"{' ' * indent}{one_line(name):<{label}}{_GAP}"
    return head + ("\n" + " " * len(head)).join(_wrap(one_line(value), columns() - len(head)))


_WHOLE: Final = re.compile(r"`[^`]*`|(?<=[Rr]un: )[^;]*?(?=\.?$|\. |;)|\bpgbridge(?:-worker)? [a-z]+(?: --?[a-z-]+)*")
"""Commands in a text: they are to be copied, and so never broken."""

_KEPT: Final = "\x00"
"""Stands for a space at which nothing is broken."""


def wrapped(text: str, *, first: int, rest: int) -> str:
    """A text behind `first` columns of its line, that goes on below behind `rest` columns where it is too long for the
    terminal; between words only, and commands stay whole."""
    kept = _WHOLE.sub(lambda found: found[0].replace(" ", _KEPT), one_line(text))
    lines = textwrap.wrap(
        kept,
        columns(),
        initial_indent=" " * first,
        subsequent_indent=" " * rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines).replace(_KEPT, " ")[first:]


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False) or [text]


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def _cut(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, max(width - 1, 0)).rstrip() + "…"


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
        keep_off_output()
        try:
            command(*args, **kwargs)
        except PgbridgeError as error:
            complain(str(error))
            sys.exit(error.exit_code)

    return run
