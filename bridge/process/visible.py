"""What others wrote, shown so that it does nothing to a terminal: control characters of both sets (C0 and C1), and what
turns the direction of text around or has no width, are written out."""

import json
import re
from collections.abc import Callable
from typing import Any, Final

_NOT_PRINTABLE: Final = re.compile(r"[^ -~\n]")
"""What may need to be written out, in a text that is JSON."""


def visible(text: str) -> str:
    """Text of several lines."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t" else _escaped(one) for one in text)


def one_line(text: str) -> str:
    """Text that stays in its line, whatever it holds."""
    return text if text.isprintable() else visible(text).replace("\n", "\\n").replace("\t", "\\t")


def json_text(value: object, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """The value as JSON, in which people can read what is not ASCII. It may be read from a terminal, too, and JSON
    itself escapes C0 only; what is escaped here is the same to whoever parses it. Raises as `json.dumps`."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=default)
    return text if text.isprintable() else _NOT_PRINTABLE.sub(_in_json, text)


def _escaped(one: str) -> str:
    return one.encode("unicode_escape").decode()


def _in_json(found: re.Match[str]) -> str:
    one = found[0]
    # Beside the line breaks of an indent, all of them stand in strings.
    return one if one.isprintable() else json.dumps(one)[1:-1]
