"""Where settings come from, and what a mistake in them is called: one line each, with its key.

Later ones win: `bridge.toml`; for a command outside of systemd, the files from which the units take their credentials
(``credentials/bridge/sinks.events.url`` beside it); environment variables (``PGBRIDGE_POSTGRES__DSN`` is
``postgres.dsn``); credentials in ``$CREDENTIALS_DIRECTORY``.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from bridge.errors import SettingsError
from bridge.settings.installed import points
from bridge.settings.models import PostgresSettings, Settings, SinkSettings

ENVIRONMENT_PREFIX: Final = "PGBRIDGE_"
CONFIG_VARIABLE: Final = "PGBRIDGE_CONFIG"
CREDENTIALS_VARIABLE: Final = "CREDENTIALS_DIRECTORY"
"""As systemd names it."""
_OF_A_FOLDER: Final = re.compile("^(?:bridge|workers|console)_")
"""How systemd begins the names of credentials that come from a folder: LoadCredential=bridge:/a/folder."""
DEFAULT_PATHS: Final = (Path("bridge.toml"), Path("/etc/pgbridge/bridge.toml"))


Process = Literal["bridge", "workers", "console"]
"""A kind of process. systemd hands each the credentials of a folder of its own."""


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ, *, of: Process = "bridge") -> Settings:
    """The settings in `path`; without one, of ``$PGBRIDGE_CONFIG``, ``bridge.toml`` or ``/etc/pgbridge/bridge.toml``.

    `of`: whose credentials count where a command outside of systemd finds those of both.

    Raises SettingsError with one line a mistake, each naming its key.
    """
    path = path or find(environ)
    folders = Units([], []) if environ.get(CREDENTIALS_VARIABLE) else units(path.parent, of)
    with _told(path, folders.closed):
        return _validate(_merged(path, environ, folders.readable), path.parent)


def load_postgres(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> PostgresSettings:
    """How `load` finds the database, for whoever has no login at a broker, and is to be told nothing of the rest."""
    path = path or find(environ)
    folders = Units([], []) if environ.get(CREDENTIALS_VARIABLE) else units(path.parent)
    with _told(path, folders.closed):
        try:
            return PostgresSettings.model_validate(_merged(path, environ, folders.readable).get("postgres", {}))
        except ValidationError as error:
            raise _Mistakes(_explain(error, PostgresSettings, "postgres")) from None


def _merged(path: Path, environ: Mapping[str, str], folders: Sequence[Path]) -> dict[str, Any]:
    data = read(path)
    for folder in folders:
        _overlay(data, _from_credentials(folder), "a credential")
    _overlay(data, _from_environment(environ), "the environment")
    if named := environ.get(CREDENTIALS_VARIABLE):
        _overlay(data, _from_credentials(Path(named)), "a credential")
    return data


@contextmanager
def _told(path: Path, closed: Sequence[Path]) -> Iterator[None]:
    """Raises SettingsError of the mistakes that are found within."""
    try:
        yield
    except _Mistakes as mistakes:
        lines = "\n".join(f"  {line}" for line in mistakes.lines)
        for folder in closed:
            lines += f"\n  what {folder} holds is missing, which this user may not read: use sudo, or --credentials"
        raise SettingsError(f"{path}:\n{lines}") from None


_OWN_KEY: Final = re.compile(r"\w+(\.\w+)*: ")
"""How a message begins that is about one key of the table that was validated, such as dsn_file or
tls.ca_file."""


class _Mistakes(Exception):  # noqa: N818 - never leaves this module
    def __init__(self, lines: list[str]) -> None:
        self.lines = lines


def find(environ: Mapping[str, str] = os.environ) -> Path:
    """The settings file of ``$PGBRIDGE_CONFIG``, ``bridge.toml`` or ``/etc/pgbridge/bridge.toml``.

    Raises SettingsError.
    """
    if named := environ.get(CONFIG_VARIABLE):
        return Path(named)
    for path in DEFAULT_PATHS:
        if path.exists():
            return path
    raise SettingsError(
        f"no settings: neither {' nor '.join(map(str, DEFAULT_PATHS))} exists. "
        f"Name the file with --config or {CONFIG_VARIABLE}"
    )


def read(path: Path) -> dict[str, Any]:
    """The tables of a settings file, as they are written. Raises SettingsError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: is not TOML: {error}") from error


def _from_environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", "."): value
        for name, value in environ.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name != CONFIG_VARIABLE
    }


class Units(NamedTuple):
    """The folders from which the units take their credentials."""

    readable: list[Path]
    closed: list[Path]
    """Those that this user may not look into."""


def units(beside: Path, of: Process = "bridge") -> Units:
    """For a command outside of systemd: those beside the settings; what several have is that of this process."""
    found = Units([], [])
    for unit in (*(other for other in ("workers", "bridge") if other != of), of):
        folder = beside / "credentials" / unit
        try:
            if folder.is_dir():
                (found.readable if os.access(folder, os.R_OK | os.X_OK) else found.closed).append(folder)
        except PermissionError:
            found.closed.append(folder)
    return found


def _from_credentials(folder: Path) -> dict[str, str]:
    try:
        files = {_OF_A_FOLDER.sub("", file.name): file for file in sorted(folder.iterdir()) if file.is_file()}
        return {
            key: file.read_text(encoding="utf-8").rstrip("\n")
            for key, file in files.items()
            if key.split(".")[0] in Settings.model_fields
        }
    except OSError as error:
        raise SettingsError(f"the credential {error.filename} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"a credential in {folder} is not UTF-8") from error


def _overlay(data: MutableMapping[str, Any], values: Mapping[str, str], source: str) -> None:
    for dotted, text in values.items():
        *parents, last = dotted.split(".")
        table: Any = data
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise SettingsError(f"{dotted} (from {source}): {parent} is not a table")
        table[last] = _as_toml(dotted, text, source)
        # A value given here replaces the file that the settings name for the same secret.
        table.pop(f"{last}_file", None)


def _as_toml(dotted: str, text: str, source: str) -> Any:
    if not text.startswith(("[", "{")):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{dotted} (from {source}): is not a TOML value: {error}") from error


def _validate(data: dict[str, Any], folder: Path) -> Settings:
    mistakes: list[str] = []
    sinks = data.get("sinks", {})
    if isinstance(sinks, dict):
        built = {}
        for name, table in sinks.items():
            try:
                built[name] = _sink(name, table)
            except _Mistakes as error:
                mistakes += error.lines
                # Stands in for the broken one, so that every other mistake is found in the same run.
                built[name] = _Broken(type="broken")
        data = {**data, "sinks": built}
    try:
        settings = Settings.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        raise _Mistakes(mistakes + _explain(error, Settings)) from None
    if mistakes:
        raise _Mistakes(mistakes)
    return settings


class _Broken(SinkSettings):
    """Of which nothing else is to be said."""

    keeps_history: ClassVar[bool] = True


def _sink(name: str, table: object) -> SinkSettings:
    kinds = {point.name: point for point in points("pgbridge.brokers")}
    kind = table.get("type") if isinstance(table, dict) else None
    if kind not in kinds:
        known = ", ".join(sorted(kinds))
        problem = "is missing" if kind is None else f"there is no broker of type {kind!r}"
        raise _Mistakes([f"sinks.{name}.type: {problem}; installed: {known}"])
    broker = kinds[kind].load()
    if not _is_installed(broker.requires):
        raise _Mistakes(
            [f"sinks.{name}.type: {kind!r} needs the package {broker.requires!r}: pip install 'pgbridge[{kind}]'"]
        )
    model: type[SinkSettings] = broker.settings
    try:
        return model.model_validate(table, context={"sink": name})
    except ValidationError as error:
        raise _Mistakes(_explain(error, model, f"sinks.{name}")) from None


def _is_installed(module: str | None) -> bool:
    try:
        return module is None or find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def _explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    lines = []
    for detail in error.errors(include_input=False, include_url=False):
        key = ".".join([*([prefix] if prefix else []), *(str(part) for part in detail["loc"] if part != "[key]")])
        match detail["type"]:
            case "extra_forbidden":
                known = _fields_at(model, detail["loc"][:-1])
                close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
                instead = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
                lines.append(f"{key}: unknown key; {instead}")
            case "missing":
                lines.append(f"{key}: is missing")
            case _:
                message = detail["msg"].removeprefix("Value error, ")
                joint = "." if _OWN_KEY.match(message) else ": "
                lines.append(f"{key}{joint}{message}" if key else message)
    return lines


def _fields_at(model: Any, loc: tuple[int | str, ...]) -> list[str]:
    """The fields of the model at `loc`, found by walking its annotations."""
    for part in loc:
        if isinstance(part, str) and part in getattr(model, "model_fields", {}):
            model = model.model_fields[part].annotation
        while not hasattr(model, "model_fields") and getattr(model, "__args__", None):
            model = next((arg for arg in reversed(model.__args__) if arg is not type(None)), None)
    return sorted(getattr(model, "model_fields", {}))
