"""The files that secrets come from, and which of them every user of this machine may read."""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from bridge.settings.load import CREDENTIALS_VARIABLE, read, units

_PUBLIC: Final = re.compile(r"(?:ca|cert)_file")
"""Files that need not be secret."""

_SECRET: Final = re.compile(r"(?:.*_)?(?:secret|password|token|credentials|api_key)")
"""Keys whose values are secret, whatever they look like."""

_WITH_PASSWORD: Final = re.compile(
    r"\w+://(?!guest:guest@)[^/@\s]*:[^/@\s]+@|\b(?:nats|tls)://[^/@\s]+@|\bpassword\s*=\s*\S"
)
"""A URL or a connection string that holds a password, or NATS' token; that of a fresh RabbitMQ is no secret."""


def open_to_all(path: Path, environ: Mapping[str, str] = os.environ) -> Iterator[tuple[str, Path]]:
    """Each file that holds a secret of these settings and that everybody may read, with the key that it sets; the
    settings file itself with the key of the first secret in it. Raises SettingsError."""
    for key, file in _files(path, environ):
        if file.exists() and file.stat().st_mode & stat.S_IROTH:
            yield key, file


def _files(path: Path, environ: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    values = list(_values(read(path), ()))
    inside = next((keys for keys, value in values if _is_secret(keys[-1], value)), None)
    if inside is not None:
        yield ".".join(inside), path
    for keys, value in values:
        if keys[-1].endswith("_file") and not _PUBLIC.fullmatch(keys[-1]):
            yield ".".join(keys), Path(value)
    named = environ.get(CREDENTIALS_VARIABLE)
    for folder in [Path(named)] if named else units(path.parent).readable:
        for file in sorted(folder.iterdir()):
            yield file.name, file


def _values(table: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text of a table, with the keys that lead to it."""
    for key, value in table.items():
        match value:
            case dict():
                yield from _values(value, (*keys, key))
            case str():
                yield (*keys, key), value


def _is_secret(key: str, value: str) -> bool:
    return bool(value) and bool(_SECRET.fullmatch(key) or _WITH_PASSWORD.search(value))
