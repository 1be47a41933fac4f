"""`pgbridge init`: from nothing to settings, logins and accounts, least privilege each."""

import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Final

import click
from pydantic import TypeAdapter, ValidationError

from bridge.brokers.accounts import SINK, Accounts, Installation
from bridge.brokers.contract import Broker
from bridge.brokers.registry import GROUP
from bridge.errors import PgbridgeError, SettingsError, UsageError
from bridge.postgres.logins import Logins, logins
from bridge.process.terminal import exit_codes
from bridge.settings import load
from bridge.settings.installed import points
from bridge.settings.load import CREDENTIALS_VARIABLE, DEFAULT_PATHS
from bridge.settings.models import Channel, Name, TopicPattern

_SECRET_FILE: Final = 0o600
_SECRET_FOLDER: Final = 0o700
_SETTINGS_FILE: Final = 0o644


@dataclass(frozen=True, slots=True)
class _Answers:
    name: str
    database: str
    broker: str
    at: str
    listen: Sequence[str]
    topics: Sequence[str]
    """Patterns; none: every topic."""
    workers: Mapping[str, str]
    """By name, the lines of its table in the settings."""


@click.command()
@click.option("--name", help="The bridge's name, with which logins and accounts begin.")
@click.option("--database", metavar="DSN", help="Where PostgreSQL is, without user and password.")
@click.option("--broker", metavar="KIND", help="rabbitmq, nats or pubsub.")
@click.option("--at", metavar="PLACE", help="Where the broker is, without user and password.")
@click.option("--listen", multiple=True, metavar="CHANNEL", help="A channel of plain pg_notify; may be repeated.")
@click.option(
    "--topic", "topics", multiple=True, metavar="PATTERN", help="Only these topics go to the broker; may be repeated."
)
@click.option(
    "--worker",
    "workers",
    multiple=True,
    metavar="NAME[=MODULE:FUNCTION]",
    help="A worker, and its handler; may be repeated. `invoices` ships with pgbridge.",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Where to write; default: the current folder.",
)
@exit_codes
def init(
    name: str | None,
    database: str | None,
    broker: str | None,
    at: str | None,
    listen: tuple[str, ...],
    topics: tuple[str, ...],
    workers: tuple[str, ...],
    folder: Path,
) -> None:
    """Writes bridge.toml, the DBA's SQL, and the broker's accounts.

    In a terminal it asks for what the options do not say. Each kind of process gets a login of its own in PostgreSQL
    and at the broker, with a password that is made up here and the rights that it needs. It replaces no file, and talks
    to no server: what it prints at the end says what to do with the files.
    """
    answers = _ask(name, database, broker, at, listen, topics, workers)
    installation = Installation(answers.name, tuple(answers.workers), answers.at)
    try:
        database_logins = logins(answers.name, answers.database, workers=bool(answers.workers))
    except ValueError as error:
        raise UsageError(f"--database: {error}") from None
    try:
        accounts = _broker(answers.broker).accounts(installation)
    except ValueError as error:
        raise UsageError(f"--at: {error}") from None
    files = _files(answers, database_logins, accounts)
    _require_settings_that_load(files)
    _write(folder, files)
    for file in files:
        click.echo(f"wrote {folder / file}")
    _tell_next_steps(folder, answers, database_logins, accounts)


# Asking ---------------------------------------------------------------------------------------------------------------


def _ask(
    name: str | None,
    database: str | None,
    broker: str | None,
    at: str | None,
    listen: Sequence[str],
    topics: Sequence[str],
    workers: Sequence[str],
) -> _Answers:
    """Raises UsageError for what is wrong, or missing where nobody can be asked."""
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    everything = name is None and database is None and broker is None

    def answer(given: str | None, option: str, question: str, default: str, check: Callable[[str], str]) -> str:
        if given is None and not asks:
            raise UsageError(f"{option}: is missing; outside of a terminal nobody can be asked for it")
        if given is not None:
            try:
                return check(given)
            except ValueError as error:
                raise UsageError(f"{option}: {error}") from None
        return str(click.prompt(question, default=default, value_proc=_asking(check)))

    name = answer(name, "--name", "Name of the bridge", "shop", _name)
    database = answer(database, "--database", "PostgreSQL", f"postgresql://localhost/{name}", str)
    kinds = _kinds()
    broker = answer(broker, "--broker", f"Broker ({', '.join(kinds)})", next(iter(kinds)), _kind)
    at = answer(at, "--at", "Where is it", kinds[broker], str)
    if asks and everything and not (listen or topics or workers):
        listen = click.prompt("Channels of plain pg_notify, with spaces between", default="").split()
        workers = click.prompt("Workers, NAME or NAME=MODULE:FUNCTION", default="invoices").split()
    return _Answers(
        name, database, broker, at, [*map(_channel, listen)], [*map(_topic, topics)], dict(map(_worker, workers))
    )


def _asking(check: Callable[[str], str]) -> Callable[[str], str]:
    """As click's questions want it: what is wrong is told, and asked again."""

    def checked(text: str) -> str:
        try:
            return check(text)
        except ValueError as error:
            raise click.UsageError(str(error)) from None

    return checked


def _name(text: str) -> str:
    try:
        return TypeAdapter(Name).validate_python(text)
    except ValidationError:
        raise ValueError(
            f"{text!r} is no name; it has up to 63 small letters, digits, - and _, and a letter first"
        ) from None


def _channel(text: str) -> str:
    try:
        return TypeAdapter(Channel).validate_python(text)
    except ValidationError as error:
        raise UsageError(f"--listen: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _topic(text: str) -> str:
    try:
        return TypeAdapter(TopicPattern).validate_python(text)
    except ValidationError as error:
        raise UsageError(f"--topic: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _kinds() -> Mapping[str, str]:
    """By broker, a place where it may be."""
    known = {point.name: point.load() for point in points(GROUP)}
    first = ("rabbitmq", "nats", "pubsub")
    order = sorted(known, key=lambda kind: (first.index(kind) if kind in first else len(first), kind))
    return {kind: known[kind].example for kind in order if known[kind].example is not None}


def _kind(text: str) -> str:
    if text not in (kinds := _kinds()):
        raise ValueError(f"there is no broker {text!r}; installed: {', '.join(kinds)}")
    return text


def _broker(kind: str) -> Broker:
    broker: Broker = next(iter(points(GROUP).select(name=kind))).load()
    return broker


def _worker(text: str) -> tuple[str, str]:
    """A worker's name, and the lines of its table."""
    name, said, handler = text.partition("=")
    try:
        _name(name)
    except ValueError as error:
        raise UsageError(f"--worker: {error}") from None
    if name == "dsn":
        raise UsageError("--worker: workers.dsn is the workers' login; choose another name")
    if said:
        if not re.fullmatch(r"\w+(\.\w+)*:\w+", handler):
            raise UsageError(f"--worker: {handler!r} is not of the form MODULE:FUNCTION")
        return name, f'handler = "{handler}"\n' + _path_to(handler.partition(":")[0])
    # The bridge never imports the workers, so what ships with them comes through an entry point.
    for point in points("pgbridge.templates"):
        shipped: Mapping[str, str] = point.load()
        if name in shipped:
            return name, shipped[name]
    module = name.replace("-", "_")
    return name, f'handler = "{module}:handle"              # `pgbridge-worker new {name}` writes one\n' + _path_to(
        module
    )


def _path_to(module: str) -> str:
    """What the settings say of where a module is that Python does not find by itself: beside them."""
    return "" if PathFinder.find_spec(module.partition(".")[0]) else 'path = "."\n'


# Writing --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    text: str
    mode: int = _SECRET_FILE


def _files(answers: _Answers, database: Logins, accounts: Accounts) -> Mapping[Path, _File]:
    files = {
        Path("bridge.toml"): _File(_settings(answers, accounts), _SETTINGS_FILE),
        Path("database.sql"): _File(database.script),
        Path(accounts.file): _File(accounts.text),
    }
    keys = {"workers": "workers.dsn"}
    for process, dsn in database.dsns.items():
        files[Path("credentials") / process / keys.get(process, "postgres.dsn")] = _File(f"{dsn}\n")
    # Who tends dead letters is also asked what the workers would be.
    if "workers" in database.dsns:
        files[Path("credentials/operator/workers.dsn")] = _File(f"{database.dsns['operator']}\n")
    for account, secrets in accounts.secrets.items():
        for key, value in secrets.items():
            files[Path("credentials") / account / f"sinks.{SINK}.{key}"] = _File(f"{value}\n")
    # The web console is a unit of its own, and does what an operator may.
    operator = Path("credentials/operator")
    return files | {operator.parent / "console" / file.name: files[file] for file in files if file.parent == operator}


def _settings(answers: _Answers, accounts: Accounts) -> str:
    quoted = json.dumps
    lines = [
        "# Secrets are in credentials/, in a folder for each kind of process. Every setting: docs/settings.md.",
        f"name = {quoted(answers.name)}",
    ]
    if answers.topics:
        lines += ['unrouted = "drop"                            # events of other topics are for nobody']
    if answers.listen:
        lines += ["", "[channels]", f"listen = [{', '.join(map(quoted, answers.listen))}]"]
    lines += ["", f"[sinks.{SINK}]", f"type = {quoted(answers.broker)}"]
    lines += [f"{key} = {quoted(value)}" for key, value in accounts.settings.items()]
    for topic in answers.topics:
        lines += ["", "[[routes]]", f"topic = {quoted(topic)}", f'sink = "{SINK}"']
    if not answers.topics:
        lines += ["", "[[routes]]", 'topic = "#"                                  # every topic', f'sink = "{SINK}"']
    for name, table in answers.workers.items():
        lines += ["", f"[workers.{name}]", table.rstrip("\n")]
    return "\n".join([*lines, ""])


def _require_settings_that_load(files: Mapping[Path, _File]) -> None:
    """Raises UsageError for what only the settings find wrong, before anything is written."""
    with tempfile.TemporaryDirectory(prefix="pgbridge-init-") as place:
        _write(Path(place), files)
        for process in ("bridge", "workers", "operator"):
            folder = Path(place) / "credentials" / process
            if not folder.is_dir():
                continue
            try:
                load(Path(place) / "bridge.toml", {CREDENTIALS_VARIABLE: str(folder)})
            except SettingsError as error:
                said = str(error).replace(f"{place}/", "")
                raise UsageError(f"these answers make settings that cannot be used: {said}") from None


def _write(folder: Path, files: Mapping[Path, _File]) -> None:
    """All of them or none. Raises UsageError where one is there already."""
    for file in files:
        if (folder / file).exists():
            raise UsageError(f"{folder / file} exists already; nothing was written. Choose another --folder")
    made: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            place = folder / file
            for parent in reversed(file.parents[:-1]):
                (folder / parent).mkdir(mode=_SECRET_FOLDER, exist_ok=True)
            opened = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, content.mode)
            made.append(place)
            with open(opened, "w", encoding="utf-8") as out:
                out.write(content.text)
            place.chmod(content.mode)
    except OSError as error:
        for place in made:
            place.unlink()
        raise PgbridgeError(f"{error.filename}: cannot be written: {error.strerror}; nothing was written") from error


def _tell_next_steps(folder: Path, answers: _Answers, database: Logins, accounts: Accounts) -> None:
    def at(file: str) -> str:
        return shlex.quote(str(folder / file))

    config = "" if (folder / "bridge.toml") in DEFAULT_PATHS else f" --config {at('bridge.toml')}"
    click.echo("\nNext, in this order:")
    for number, step in enumerate(
        (
            "as a superuser of PostgreSQL, once the database is there:\n"
            f"     psql -v ON_ERROR_STOP=1 -d {shlex.quote(database.database)} -f {at('database.sql')}",
            f"pgbridge migrate{config} --credentials {at('credentials/owner')}",
            accounts.how.format(file=at(accounts.file)),
            f"pgbridge topology --apply{config} --credentials {at('credentials/operator')}",
            f"pgbridge check{config}",
            f"pgbridge run{config}",
            *(f"pgbridge-worker run {name}{config}" for name in answers.workers),
        ),
        start=1,
    ):
        click.echo(f"  {number}. {step}")
    done_with = "database.sql" if accounts.stays else f"database.sql and {accounts.file}"
    click.echo(f"\nThen delete {done_with}, which nothing needs any more.")
