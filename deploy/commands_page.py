"""Writes docs/commands.md from what the commands say of themselves: python deploy/commands_page.py docs"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
from man import EXIT_CODES, PROGRAMS, below

_INTRODUCTION: Final = """\
# Commands

`pgbridge` is for the bridge and whoever operates it, `pgbridge-worker` for workers. Each command has `--help`, and a
manual page in the [Debian package](operations.md#debian-package).

This page is generated from the commands: `make docs`.
"""


def commands_page() -> str:
    """docs/commands.md."""
    return "\n".join([_INTRODUCTION, *_exit_codes(), *(line for name in PROGRAMS for line in _program(name))])


def _exit_codes() -> Iterator[str]:
    yield from ("## Exit codes", "", "| code | meaning |", "|---|---|")
    for code, meaning in EXIT_CODES.items():
        yield f"| {code} | {meaning} |"
    yield ""


def _program(name: str) -> Iterator[str]:
    group = PROGRAMS[name]
    context = click.Context(group, info_name=name, **group.context_settings)
    yield from (f"## {name}", "", inspect.cleandoc(group.help or ""), "")
    for command, inner in below(group, context):
        yield from _command(command, inner)
        for further, innermost in below(command, inner):
            yield from _command(further, innermost)


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    """Its name and what it takes, its help, and its options. A group has none but `--help`."""
    yield from (f"### {context.command_path}", "")
    if not isinstance(command, click.Group):
        pieces = " ".join(command.collect_usage_pieces(context))
        yield from ("```", f"{context.command_path} {pieces}", "```", "")
    yield from (inspect.cleandoc(command.help or ""), "")
    options = list(_options(command, context))
    if options:
        yield from ("| option | meaning |", "|---|---|", *options, "")


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None:
            names, meaning = (" ".join(text.split()).replace("|", "\\|") for text in record)
            yield f"| `{names}` | {meaning} |"


if __name__ == "__main__":
    (Path(sys.argv[1]) / "commands.md").write_text(commands_page(), encoding="utf-8")
