"""`pgbridge asyncapi`: a document of what this database emits, for those who consume it."""

from pathlib import Path
from typing import Any, Final, Literal

import click
import yaml

from bridge.commands.asyncapi_document import Document, document
from bridge.errors import UsageError
from bridge.postgres.connection import connect
from bridge.postgres.emitted import Emitted, look
from bridge.process.tasks import run
from bridge.process.terminal import complain, config_option, exit_codes
from bridge.process.visible import json_text
from bridge.settings import Settings, load

_WIDTH: Final = 120
"""Columns of a document's lines, as far as they are text."""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes what YAML 1.1 and 1.2 read alike: the first has no number `1e3`, and the second has."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else "'" if text[:1] in set("0123456789+-.") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _write_text)


def as_text(content: dict[str, Any], form: Literal["yaml", "json"]) -> str:
    """A document as YAML or JSON, with a line break at its end."""
    if form == "json":
        return json_text(content, indent=2) + "\n"
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH)
    return text


async def _document(settings: Settings, title: str | None, version: str | None) -> Document:
    connection = await connect(settings.postgres, "pgbridge asyncapi")
    async with connection:
        # Without the log there is no schema of ours, and nothing is sent but what pg_notify() sends.
        emitted = await look(connection) if settings.reads_outbox else Emitted((), {}, ())
        return document(settings, connection.info.dbname, emitted, title=title, version=version)


@click.command()
@config_option
@click.option(
    "--format",
    "form",
    type=click.Choice(["yaml", "json"]),
    help="Default: yaml, but json for an output whose name ends with .json.",
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="The file to write; default: standard output."
)
@click.option("--title", help="The document's title; default: `Events of` and the bridge's name.")
@click.option(
    "--doc-version", help="The document's version; default: made of what it says, so that it changes with that."
)
@exit_codes
def asyncapi(
    config: Path | None,
    form: Literal["yaml", "json"] | None,
    output: Path | None,
    title: str | None,
    doc_version: str | None,
) -> None:
    """Writes an AsyncAPI document of what this database emits, and where it goes.

    It knows of watched tables, of schemas that bridge.register_schema() was given, and of the channels that the
    settings name. It says on standard error what it has left out.
    """
    made = run(_document(load(config), title, doc_version))
    for sentence in made.left_out:
        complain(sentence)
    text = as_text(made.content, form or ("json" if output is not None and output.suffix == ".json" else "yaml"))
    if output is None:
        click.echo(text, nl=False)
    else:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--output: {output} cannot be written: {error.strerror}") from error
        click.echo(f"wrote {output}", err=True)
