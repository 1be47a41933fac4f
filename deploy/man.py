"""Writes the manual pages from what commands and settings say of themselves: python deploy/man.py FOLDER

There is a page for each program and one for each of its commands (`man pgbridge dead`), which has the commands below it
in sections, and bridge.toml(5).
"""

import inspect
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

import bridge.cli
import workers.cli
from bridge import __version__
from bridge.settings.document import settings_page

PROGRAMS: Final = {"pgbridge": bridge.cli.main, "pgbridge-worker": workers.cli.main}

SETTINGS: Final = "bridge.toml"

FILES: Final = {
    "/etc/pgbridge/bridge.toml": "The settings of bridge and workers, where no others are named.",
    "/etc/pgbridge/credentials/": "Secrets, for root alone: folders `bridge` and `workers`, and in each a file "
    "for each secret, named as its key (`postgres.dsn`).",
    "/usr/share/doc/pgbridge/": "Documentation, and examples of settings.",
}

EXIT_CODES: Final = {
    "0": "Done.",
    "1": "Failed.",
    "2": "The command line is wrong.",
    "69": "Something has to be put right elsewhere: a server, a login, a privilege, the schema.",
    "78": "Settings, a file or a handler must change.",
}

_LITERALLY: Final = str.maketrans({"\\": "\\e", "-": "\\-", "'": "\\(aq", "^": "\\(ha", "~": "\\(ti"})
"""What troff takes for something else: hyphens, quotes and accents of typography."""


def troff(text: str) -> str:
    """Markdown within a paragraph as troff: `code` and **strong** are bold."""
    parts = []
    for part in re.split(r"(`[^`]+`)", " ".join(text.split())):
        literal = part.translate(_LITERALLY)
        if part.startswith("`") and part.endswith("`") and len(part) > 1:
            parts.append(f"\\fB{literal[1:-1]}\\fR")
            continue
        literal = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", literal)
        literal = re.sub(r"\*\*(.+?)\*\*", r"\\fB\1\\fR", literal)
        parts.append(re.sub(r"\*(\w+)\*", r"\\fI\1\\fR", literal))
    return re.sub(r"^\.", r"\\&.", "".join(parts))


def page(name: str, section: int, summary: str, lines: Iterator[str]) -> str:
    """A whole page."""
    day = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    head = [f'.TH "{troff(name)}" {section} {day} "pgbridge {__version__}" "pgbridge"', ".SH NAME"]
    return "\n".join([*head, f"{troff(name)} \\- {troff(summary)}", *lines, ""])


def entry(term: str, meaning: str) -> Iterator[str]:
    """A line of a list, and what it means; `term` is troff already."""
    yield from (".TP", term, troff(meaning))


def paragraphs(text: str) -> Iterator[str]:
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        yield from (".PP", troff(paragraph))


def usage(command: click.Command, context: click.Context) -> str:
    pieces = troff(" ".join(command.collect_usage_pieces(context)))
    return f"\\fB{troff(context.command_path)}\\fR {pieces}"


def summary_of(command: click.Command) -> str:
    return command.get_short_help_str(limit=300).removesuffix(".")


def options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and (record[1] or isinstance(parameter, click.Option)):
            yield from entry(f"\\fB{troff(record[0])}\\fR", record[1])


def below(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """The commands of a group, in the order of its help."""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None and not found.hidden:
                yield found, click.Context(found, info_name=name, parent=context)


def program_page(name: str, group: click.Group) -> str:
    context = click.Context(group, info_name=name, **group.context_settings)

    def lines() -> Iterator[str]:
        yield from (".SH SYNOPSIS", usage(group, context), ".SH DESCRIPTION", *paragraphs(group.help or ""))
        yield from paragraphs(f"Each command has a page of its own: `man {name} COMMAND`.")
        yield from (".SH OPTIONS", *options(group, context), ".SH COMMANDS")
        for command, inner in below(group, context):
            page_name = inner.command_path.replace(" ", "-")
            yield from entry(f".BR {troff(page_name)} (1)", command.get_short_help_str(limit=300))
        yield ".SH EXIT STATUS"
        for code, meaning in EXIT_CODES.items():
            yield from entry(f"\\fB{code}\\fR", meaning)
        yield ".SH FILES"
        for file, meaning in FILES.items():
            yield from entry(f"\\fI{troff(file)}\\fR", meaning)
        other = next(program for program in PROGRAMS if program != name)
        yield from (".SH SEE ALSO", f".BR {troff(other)} (1),", f".BR {SETTINGS} (5)")

    return page(name, 1, summary_of(group), lines())


def command_page(program: str, command: click.Command, context: click.Context) -> str:
    def lines() -> Iterator[str]:
        yield from (".SH SYNOPSIS", usage(command, context), ".SH DESCRIPTION", *paragraphs(command.help or ""))
        yield from (".SH OPTIONS", *options(command, context))
        for number, (inner, inner_context) in enumerate(below(command, context)):
            if number == 0:
                yield ".SH COMMANDS"
            yield f".SS {troff(inner_context.command_path)}"
            yield from (
                ".PP",
                usage(inner, inner_context),
                *paragraphs(inner.help or ""),
                *options(inner, inner_context),
            )
        yield from (".SH SEE ALSO", f".BR {troff(program)} (1),", f".BR {SETTINGS} (5)")

    return page(context.command_path.replace(" ", "-"), 1, summary_of(command), lines())


def settings_manual() -> str:
    """bridge.toml(5), of docs/settings.md: headings, paragraphs, lists, and tables of four columns."""

    def lines() -> Iterator[str]:
        for block in settings_page().split("\n\n"):
            if block.startswith("# "):
                yield ".SH DESCRIPTION"
            elif block.startswith("## "):
                heading = troff(block.removeprefix("## ").replace("`", "")).replace('"', "\\(dq")
                yield f".SH {heading}"
            elif block.startswith("|"):
                for row in block.strip().splitlines()[2:]:
                    key, kind, default, meaning = (
                        cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]
                    )
                    yield from entry(f"{troff(key)} ({troff(kind)}; {troff(default)})", meaning)
            elif block.startswith("- "):
                for item in block.removeprefix("- ").split("\n- "):
                    yield from (".IP \\(bu 2", troff(item))
            elif not block.startswith("This page is generated"):
                yield from paragraphs(block)
        yield from (".SH SEE ALSO", ".BR pgbridge (1),", ".BR pgbridge\\-worker (1)")

    return page(SETTINGS, 5, "settings of pgbridge and its workers", lines())


def write(folder: Path) -> None:
    for section in ("man1", "man5"):
        (folder / section).mkdir(parents=True, exist_ok=True)
    for program, group in PROGRAMS.items():
        (folder / "man1" / f"{program}.1").write_text(program_page(program, group), encoding="utf-8")
        context = click.Context(group, info_name=program, **group.context_settings)
        for command, inner in below(group, context):
            file = f"{inner.command_path.replace(' ', '-')}.1"
            (folder / "man1" / file).write_text(command_page(program, command, inner), encoding="utf-8")
    (folder / "man5" / f"{SETTINGS}.5").write_text(settings_manual(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
