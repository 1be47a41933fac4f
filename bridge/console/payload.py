"""A payload as a person reads it."""

import json
from typing import Final

_INDENT: Final = "  "
_DEEPEST: Final = 50


def indented(text: str) -> str | None:
    """JSON with a line for each member, and every number and text as it stands; None for what is no JSON, or has more
    levels than can be read."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return None
    found: list[str] = []
    depth = 0
    place = 0
    while place < len(text):
        one = text[place]
        if one == '"':
            end = _end_of_string(text, place)
            found.append(text[place:end])
            place = end
            continue
        if one in "[{":
            close = _next_mark(text, place + 1)
            if text[close] in "]}":
                found.append(one + text[close])
                place = close + 1
                continue
            depth += 1
            if depth > _DEEPEST:
                return None
            found.append(f"{one}\n{_INDENT * depth}")
        elif one in "]}":
            depth -= 1
            found.append(f"\n{_INDENT * depth}{one}")
        elif one == ",":
            found.append(f",\n{_INDENT * depth}")
        elif one == ":":
            found.append(": ")
        elif not one.isspace():
            found.append(one)
        place += 1
    return "".join(found)


def _end_of_string(text: str, begin: int) -> int:
    place = begin + 1
    while text[place] != '"':
        place += 2 if text[place] == "\\" else 1
    return place + 1


def _next_mark(text: str, place: int) -> int:
    while text[place].isspace():
        place += 1
    return place
