"""What a handler returned, as PostgreSQL can hold it."""

import json
from collections.abc import Mapping
from typing import Any


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


def storable(text: str) -> str:
    """As text and jsonb can hold it, which have neither NUL nor half a surrogate pair."""
    return text.encode(errors="replace").decode().replace("\0", "\ufffd")
