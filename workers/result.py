"""What a handler returned, as PostgreSQL can hold it."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

LARGEST_RECORD: Final = 1_000_000
"""Characters of an effect's result as JSON."""

_UNSTORABLE: Final = re.compile(r"\\u(0000|d[89a-f]..)")
"""In JSON: what may stand for a NUL or half a surrogate pair, which jsonb does not take."""

_LONGEST_NUMBER: Final = 10_000
"""Bits of an integer that Python writes without being asked twice."""

_DEEPEST: Final = 50
"""Levels of what is recorded as nearly as it can be: as deep as cycles are followed."""


class ReplyError(Exception):
    """The reply function, or the conversion of the result, raised. The message is PostgreSQL's, or ours."""


def outcome_text(result: object) -> str | None:
    """What a handler returned, as JSON. Raises ReplyError where it has no such form."""
    if result is None:
        return None
    if not isinstance(result, Mapping):
        raise ReplyError(f"the handler returned a {type(result).__name__}; a dict or None is wanted")
    try:
        return json_text(result)
    except (TypeError, ValueError, RecursionError) as error:
        raise ReplyError(f"the handler's result has no form in JSON: {error}") from error


def json_text(value: Mapping[str, Any] | None) -> str:
    """A result as JSON. Raises TypeError for what JSON does not have, ValueError for NaN, infinities and cycles."""
    return json.dumps(value, allow_nan=False, default=_plain)


def _plain(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


def recordable(result: Mapping[str, Any]) -> tuple[str, str]:
    """The result of an effect, as JSON that jsonb takes; and what is not as it was, or nothing.

    It never raises: the effect has happened, and whatever can be kept of it must be.
    """
    try:
        text, reason = json_text(result), ""
    except (TypeError, ValueError, RecursionError) as error:
        text, reason = json.dumps(_nearly(result)), f"it has no form in JSON: {error}"
    if not reason and _UNSTORABLE.search(text):
        near = json.dumps(_nearly(result))
        text, reason = near, "" if near == text else "it has a NUL or half a character in it"
    if len(text) > LARGEST_RECORD:
        reason = f"it has {len(text)} characters as JSON, more than {LARGEST_RECORD}"
        text = json.dumps({"unrecorded": reason, "beginning": text[:10_000]})
    return text, reason


def recorded(value: Mapping[str, Any], what: str = "the effect's result") -> dict[str, Any]:
    """The result of an effect as it comes back. Raises ValueError, which names `what`, where it would not be what it
    was."""
    text, reason = recordable(value)
    if reason:
        raise ValueError(f"{what}: {reason}")
    return dict(json.loads(text))


def _nearly(value: object, depth: int = 0) -> Any:
    match value:
        case None | bool():
            return value
        case int() if value.bit_length() < _LONGEST_NUMBER:
            return value
        case float() if math.isfinite(value):
            return value
        case Mapping() if depth < _DEEPEST:
            return {_words(key): _nearly(each, depth + 1) for key, each in value.items()}
        case list() | tuple() | set() | frozenset() if depth < _DEEPEST:
            return [_nearly(each, depth + 1) for each in value]
        case _:
            return _words(value)


def _words(value: object) -> str:
    try:
        return storable(str(value))
    except Exception:  # noqa: BLE001 - whatever its __str__ raises, its name is all that can be kept
        return f"<{type(value).__name__}>"


def storable(text: str) -> str:
    """As text and jsonb can hold it, which have neither NUL nor half a surrogate pair."""
    return text.encode(errors="replace").decode().replace("\0", "\ufffd")
