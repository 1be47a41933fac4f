"""A group of commands that loads a command's module only when the command is called or asked for its help."""

import io
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from bridge.process.extras import how_to_install


class LazyGroup(click.Group):
    """Knows its commands by name; `--help` of the group imports none of them, which would take most of a second."""

    def __init__(self, *args: object, lazy: Mapping[str, tuple[str, str]], **kwargs: object) -> None:
        """`lazy`: by name, the place of the command, ``package.module:attribute``, and its one line of help."""
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # what click.Group takes, passed on as it is
        self._lazy = lazy

    def main(self, *args: Any, **kwargs: Any) -> Any:
        buffer_output()
        return super().main(*args, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        module, _, attribute = self._lazy[cmd_name][0].partition(":")
        try:
            command: click.Command = getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            how = how_to_install(error.name or "")
            if how is None:
                raise
            raise click.UsageError(f"`{cmd_name}` needs the package {error.name}: {how}") from error
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completes names of commands without loading them, as click would: a second for each press of Tab."""
        names = [
            CompletionItem(name, help=help_line)
            for name, (_, help_line) in self._lazy.items()
            if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in self._lazy.items()])


def buffer_output() -> None:
    """Gives standard output a buffer where Python was told to go without one (PYTHONUNBUFFERED, as containers have it).

    Without one, what an interrupted write leaves over is dropped without a word: JSON for programs ended in the middle.
    Commands flush what they print, so it comes as soon as before.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and isinstance(sys.stdout.buffer, io.RawIOBase):
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(sys.stdout.detach()), sys.stdout.encoding, sys.stdout.errors, write_through=True
        )


def flush_each_line() -> None:
    """Lets what a handler prints be seen at once in the journal or a file, and not when the process ends."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
