"""How a payload is read for a handler that has a model of it."""

import json
from typing import Any, NoReturn


def read_json(payload: bytes) -> Any:
    """The JSON in a payload, whose numbers a model reads exactly: a field of type Decimal gets every digit.

    Raises ValueError and RecursionError for what is not JSON.
    """
    return json.loads(payload, parse_float=_Number, parse_constant=_refuse)


class _Number(float):
    """A number with a fraction, which remembers how it was written. pydantic makes a Decimal of a float's text."""

    _written: str

    def __new__(cls, written: str) -> "_Number":
        number = super().__new__(cls, written)
        number._written = written
        return number

    def __str__(self) -> str:
        return self._written


def _refuse(constant: str) -> NoReturn:
    """Python's reader would take them."""
    raise ValueError(f"it has no {constant}")
