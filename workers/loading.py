"""Where a worker's handler comes from: its module, which is looked for in the worker's `path` first.

A process imports for one worker, but for `list`, `check` and `topology`, which import for each in turn. So what one
worker's folders gave is forgotten before the next one's are looked into: two workers may both have a ``handlers.py``.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from bridge.errors import SettingsError, UsageError
from bridge.process.extras import how_to_install
from bridge.settings import Settings, WorkerSettings
from pgbridge import OURS
from workers.handler import Handler, Options

OptionsT = TypeVar("OptionsT", bound=Options)

_HOME: Final = Path(__file__).resolve().parent.parent
"""The folder that our own packages are in."""

_BEFORE: Final = {*OURS, *(name.partition(".")[0] for name in sys.modules)}
"""Packages that were loaded before any handler, and that every worker shares."""

_in_front: list[str] = []
"""The folders of the last worker, which stand in front of sys.path."""


def load_handler(place: str, worker: str, path: Sequence[Path] = ()) -> Handler:
    """The handler at ``package.module:function``. The folders of `path` are looked into before all others, and stay in
    front of ``sys.path`` for what the handler imports later.

    Raises SettingsError, naming the worker's key and what is wrong.
    """
    key = f"workers.{worker}.handler"
    module_name, _, attribute = place.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise SettingsError(f"{key}: {place!r} is not of the form package.module:function")
    for folder in path:
        try:
            os.scandir(folder).close()
        except OSError as error:
            raise SettingsError(
                f"workers.{worker}.path: {folder} is no folder that can be read: {error.strerror}"
            ) from error
    _put_in_front([str(folder) for folder in path])
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise SettingsError(f"{key}: cannot import {module_name}: {_why(error, module_name, worker)}") from error
    found = getattr(module, attribute, None)
    if not isinstance(found, Handler):
        raise SettingsError(f"{key}: {module_name} has no @handler named {attribute}")
    return found


def load_options(settings: Settings, worker: str, model: type[OptionsT]) -> OptionsT:
    """The options of a worker whose handler takes those of this model. Raises UsageError where it does not, or there is
    no such worker, and SettingsError as `load_handler` and `require_reply`, and for options that are wrong."""
    own = settings.worker(worker)
    handler = load_handler(own.handler, worker, own.path)
    options = handler.options_of(own.options, worker)
    if not isinstance(options, model):
        raise UsageError(
            f"this is for workers whose handler takes {model.__name__}, and {own.handler}, of the worker {worker!r}, "
            "does not"
        )
    require_reply(worker, own, handler)
    return options


def require_reply(name: str, settings: WorkerSettings, handler: Handler) -> None:
    """Raises SettingsError where nothing would come of what the handler returns."""
    if handler.needs_reply and settings.reply is None:
        raise SettingsError(
            f"workers.{name}.reply: is missing; {settings.handler} does nothing but return what the reply is to take"
        )


def packages_like_ours(folders: Sequence[Path]) -> Iterator[Path]:
    """The packages and modules in these folders that are named as ours and are not ours."""
    for folder in folders:
        for name in OURS:
            for place in (folder / name, folder / f"{name}.py"):
                if place.exists() and place.resolve() != _HOME / name:
                    yield place


def _put_in_front(folders: list[str]) -> None:
    """In place of those of the worker before. Of the modules that handlers have loaded, those that came from there are
    forgotten, and those for which these folders have others."""
    left = {folder for folder in _in_front if folder not in folders}
    own = {entry.stem for folder in folders for entry in Path(folder).iterdir()}
    for package in {name.partition(".")[0] for name in sys.modules} - _BEFORE:
        place = _folder_of(package)
        if place in left or (package in own and place not in folders):
            for name in [name for name in sys.modules if name.partition(".")[0] == package]:
                del sys.modules[name]
    for folder in _in_front:
        if folder in sys.path:  # else the worker's own modules have taken it off
            sys.path.remove(folder)
    sys.path[:0] = _in_front[:] = folders
    importlib.invalidate_caches()


def _folder_of(package: str) -> str | None:
    """The entry of sys.path that a loaded package, or module outside of any, came from."""
    spec = getattr(sys.modules.get(package), "__spec__", None)
    if spec is None:
        return None
    places = [*(spec.submodule_search_locations or []), *([spec.origin] if spec.has_location else [])]
    return str(Path(places[0]).parent) if places else None


def _why(error: Exception, module_name: str, worker: str) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({error.filename}, line {error.lineno})"
    if not isinstance(error, ImportError):
        return f"{type(error).__name__}: {error} ({_line_of(error)})"
    missing = error.name or ""
    package = missing.partition(".")[0]
    if package in OURS:
        others = packages_like_ours([*map(Path, _in_front), Path.cwd()])
        other = next((place for place in others if place.stem == package), None)
        if other is not None:
            return f"`{package}` is pgbridge's own package, so {other} cannot be imported under this name. Rename it"
        if isinstance(error, ModuleNotFoundError):
            return f"{error}. `{package}` is pgbridge's own package; yours needs another name"
        return f"{error} ({_line_of(error)})"
    if how := how_to_install(missing):
        return f"{error}. It comes with: {how}"
    if module_name == missing or module_name.startswith(f"{missing}."):
        here = Path.cwd()
        if (here / package).is_dir() or (here / f"{package}.py").is_file():
            return f'{error}. It is in the current folder: set workers.{worker}.path = "{here}"'
        return f"{error}. Name its folder in workers.{worker}.path, or install the package that holds it"
    return f"{error} ({_line_of(error)}). Install what it needs, or name its folder in workers.{worker}.path"


def _line_of(error: Exception) -> str:
    """Where in the author's own code it came from, if there."""
    frames = traceback.extract_tb(error.__traceback__)
    installed = (sys.prefix, sys.base_prefix, "<", *(str(_HOME / name) for name in OURS))
    own = [frame for frame in frames if not frame.filename.startswith(installed)] or frames
    return f"{own[-1].filename}, line {own[-1].lineno}"
