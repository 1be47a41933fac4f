"""What `pgbridge check` finds: one line each."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from bridge.errors import PgbridgeError


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked."""

    subject: str
    """What it is about: docs/check.md lists them."""
    ok: bool
    text: str
    """What was found; when it is wrong, with what to do about it."""
    exit_code: int = 0
    """What `check` ends with when this is the first one that is wrong."""
    warning: bool = False
    """Whether it works and is still not as it should be."""


def warning(subject: str, text: str) -> Finding:
    """Of what works, and is not as it should be."""
    return Finding(subject, ok=True, text=text, warning=True)


def failure(subject: str, error: PgbridgeError) -> Finding:
    """Of what is wrong."""
    return Finding(subject, ok=False, text=str(error), exit_code=error.exit_code)


async def tried(subject: str, look: Callable[[], Awaitable[str]]) -> Finding:
    """What `look` returns in words, or the error that it raises."""
    try:
        return Finding(subject, ok=True, text=await look())
    except PgbridgeError as error:
        return failure(subject, error)
