"""`pgbridge-worker new`: writes what a worker begins with: its handler, a test that passes, and its settings."""

import keyword
import os
import re
import shlex
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path
from string import Template
from typing import Final

import click
from pydantic import TypeAdapter, ValidationError

from bridge.errors import PgbridgeError, UsageError
from bridge.process.terminal import exit_codes
from bridge.settings.load import CONFIG_VARIABLE
from bridge.settings.models import Name, TopicPattern
from pgbridge import in_the_way
from workers.loading import packages_like_ours

_HANDLER: Final = Template('''\
"""The worker `$name`."""

from typing import Any

from pydantic import BaseModel
from workers import Event, handler


class $model(BaseModel):
    """The payload of `$topic`. One that does not fit is rejected; further fields are ignored."""

    id: int


@handler("$topic", payload=$model)
async def handle(event: Event, payload: $model) -> dict[str, Any]:
    """Raise Reject for what can never be handled, and Retry to be asked again later."""
    return {"id": payload.id}
''')

_TEST: Final = Template('''\
"""The worker `$name`, without broker and database."""

import pytest
from workers import Reject
from workers.testing import make_event, run

from $module import handle


def test_the_reply_names_what_was_handled() -> None:
    assert run(handle, make_event("$topic", {"id": 7})) == {"id": 7}


def test_a_payload_without_id_is_rejected() -> None:
    with pytest.raises(Reject, match="payload.id: is missing"):
        run(handle, make_event("$topic", {}))
''')

_SETTINGS: Final = Template("""\
name = "$bridge"

[postgres]
dsn = "postgresql://localhost/$bridge"

[sinks.events]
type = "rabbitmq"
url = "amqp://guest:guest@localhost"

[[routes]]
topic = "#"
sink = "events"
""")

_WORKER: Final = Template("""
[workers.$name]
handler = "$module:handle"
path = "."
""")


@click.command("new")
@click.argument("name")
@click.option("--topic", default="shop.order.placed", show_default=True, help="The topic that it handles.")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    help="Where to write it; default: the current folder.",
)
@exit_codes
def new_worker(name: str, topic: str, folder: Path) -> None:
    """Writes a new worker: a handler, a test that passes, and settings.

    It replaces no file, and adds the worker to a bridge.toml that is there.
    """
    _require_names(name, topic)
    module = name.replace("-", "_")
    settings = folder / "bridge.toml"
    words = {"name": name, "module": module, "topic": topic, "model": _model(topic), "bridge": _bridge(topic)}
    _require_room(folder, module)
    there = settings.exists()
    worker = _WORKER.substitute(words)
    files = {
        folder / f"{module}.py": _HANDLER.substitute(words),
        folder / f"test_{module}.py": _TEST.substitute(words),
        settings: _addition(settings, name, worker) if there else _SETTINGS.substitute(words) + worker,
    }
    _write(files)
    for file in files:
        click.echo(f"{'added to' if there and file == settings else 'wrote'} {file}")
    _tell_next_steps(name, module, folder, there)


def _require_names(name: str, topic: str) -> None:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise UsageError(
            f"NAME: {name!r} is no name of a worker; it has up to 63 small letters, digits, - and _, and a letter first"
        ) from None
    if name in ("dsn", "dsn_file"):
        raise UsageError(f"NAME: workers.{name} is the workers' login; choose another name")
    try:
        TypeAdapter(TopicPattern).validate_python(topic)
    except ValidationError as error:
        raise UsageError(f"--topic: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    if {"*", "#"} & set(topic.split(".")) or not topic.isprintable() or set('"\\{') & set(topic):
        raise UsageError("--topic: write the topic of one event, as in shop.order.placed; patterns are for the code")


def _require_room(folder: Path, module: str) -> None:
    """Raises UsageError where a file is in the way, or the new module would be in the way of others."""
    for place in (folder / f"{module}.py", folder / f"test_{module}.py", folder / module):
        if place.exists():
            raise UsageError(f"{place} exists already; nothing was written. Choose another name, or another --folder")
    for other in packages_like_ours([folder]):
        if other.is_file() or (other / "__init__.py").exists():
            raise UsageError(f"{in_the_way(other.stem, other.resolve())}; nothing was written")
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or PathFinder.find_spec(module) is not None:
        raise UsageError(f"NAME: Python knows another {module!r}, which {module}.py would hide; try {module}-worker")


def _addition(settings: Path, name: str, table: str) -> str:
    """What is to be added to settings that are there. Raises UsageError where they cannot take it."""
    try:
        text = settings.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{settings}: cannot be read: {error.strerror}; nothing was written") from error
    except ValueError as error:
        raise UsageError(f"{settings}: is not TOML: {error}; nothing was written") from error
    workers, sinks = data.get("workers"), data.get("sinks")
    if isinstance(workers, dict) and name in workers:
        raise UsageError(f"{settings}: workers.{name} is there already; nothing was written")
    if isinstance(sinks, dict) and len(sinks) > 1:
        first, *others = sinks
        table += f'sink = "{first}"  # or {", ".join(others)}\n'
    addition = table if text.endswith("\n") or not text else f"\n{table}"
    try:
        tomllib.loads(text + addition)
    except ValueError as error:
        raise UsageError(
            f"{settings}: takes no table [workers.{name}] at its end: {error}; nothing was written"
        ) from error
    return addition


def _write(files: dict[Path, str]) -> None:
    """All of them or none; only what is there already is added to."""
    made: list[Path] = []
    try:
        for file, text in files.items():
            is_new = not file.exists()
            with file.open("x" if is_new else "a", encoding="utf-8") as out:
                if is_new:
                    made.append(file)
                out.write(text)
    except OSError as error:
        for file in made:
            file.unlink()
        raise PgbridgeError(f"{error.filename}: cannot be written: {error.strerror}; nothing was written") from error


def _model(topic: str) -> str:
    """A class named for the event: OrderPlaced for shop.order.placed."""
    words = re.findall(r"[a-z0-9]+", ".".join(topic.split(".")[-2:]).lower())
    name = "".join(word.capitalize() for word in words)
    return name if name.isidentifier() and name not in ("BaseModel", "Event") else "Payload"


def _bridge(topic: str) -> str:
    """A name for bridge and database: the topic's first word, where it may be one."""
    word = topic.split(".")[0]
    return word if re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", word) else "main"


def _tell_next_steps(name: str, module: str, folder: Path, there: bool) -> None:
    steps = [
        *([] if folder == Path() else [f"cd {shlex.quote(str(folder))}"]),
        *([f"unset {CONFIG_VARIABLE}"] if CONFIG_VARIABLE in os.environ else []),  # it names other settings
        f"pytest test_{module}.py",
        f"echo '{{\"id\": 7}}' | pgbridge-worker try {name} -",
        *([] if there else ["edit bridge.toml: where PostgreSQL and the broker are", "pgbridge migrate"]),
        "pgbridge topology --apply",
        f"pgbridge-worker run {name}",
    ]
    click.echo("\nNext:")
    for step in steps:
        click.echo(f"  {step}")
