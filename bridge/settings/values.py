"""How single values are written in the settings: durations, sizes, secrets."""

import re
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, SecretStr, WithJsonSchema

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|KiB|MiB|GiB)")


def parse_duration(value: object) -> float:
    """Seconds of ``"500ms"``, ``"30s"``, ``"5m"``, ``"2h"``, ``"7d"`` or a number. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())):
        seconds = float(match[1]) * _SECONDS[match[2]]
    else:
        raise ValueError('is no duration; write a number and a unit, as in "500ms", "30s", "5m", "2h", "7d"')
    if seconds < 0:
        raise ValueError("is negative; a duration is zero or more")
    return seconds


def parse_size(value: object) -> int:
    """Bytes of ``"64MB"``, ``"1MiB"`` or a whole number. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(float(match[1]) * _BYTES[match[2]])
    raise ValueError('is no size; write a number and a unit, as in "10MB" or "64MiB"')


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema({"type": ["string", "number"], "examples": ["500ms", "30s", "7d"]}),
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"type": ["string", "integer"], "examples": ["10MB", "64MiB"]}),
]
Secret = Annotated[SecretStr, PlainSerializer(lambda _: "**********", return_type=str)]
"""Shown as stars wherever it is printed; `get_secret_value()` gives it."""
