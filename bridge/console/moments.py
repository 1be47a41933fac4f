"""Times as people write them into a form."""

from datetime import UTC, datetime, timedelta

from bridge.errors import UsageError
from bridge.settings.models import parse_duration


def moment_of(field: str, text: str | None) -> datetime | None:
    """A time: ISO 8601, in UTC without an offset, or how long ago. Raises UsageError, which names the field."""
    if text is None:
        return None
    try:
        if text[-1:].isalpha() and text[-1:] != "Z":
            return datetime.now(UTC) - timedelta(seconds=parse_duration(text))
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise UsageError(
            f'{field}: {text!r} is not a time; write "2026-02-03 14:05", which is in UTC, or how long ago: "2h"'
        ) from None
