"""A group of commands that loads a command's module only when the command is called or asked for its help."""

from collections.abc import Mapping
from importlib import import_module

import click

from bridge.process.extras import how_to_install


class LazyGroup(click.Group):
    """Knows its commands by name; `--help` of the group imports none of them, which would take most of a second."""

    def __init__(self, *args: object, lazy: Mapping[str, tuple[str, str]], **kwargs: object) -> None:
        """`lazy`: by name, the place of the command, ``package.module:attribute``, and its one line of help."""
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # what click.Group takes, passed on as it is
        self._lazy = lazy

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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in self._lazy.items()])
