"""What a handler returned, as PostgreSQL can hold it."""

import json
from collections.abc import Mapping
from typing import Any


def outcome(result: object) -> str | None:
    """A handler's result as JSON; None for none.

    Raises TypeError for what is neither a mapping nor None, or has no form in JSON, and ValueError for NaN, infinities
    and cycles; the text is for the author of the handler.
    """
    if result is None:
        return None
    if not isinstance(result, Mapping):
        raise TypeError(f"the handler returned a {type(result).__name__}; a dict or None is wanted")
    try:
        return json_text(result)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the handler's result has no form in JSON: {error}") from error


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
