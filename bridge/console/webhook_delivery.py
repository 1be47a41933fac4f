"""The page of one delivery of a webhook: its attempts, and what is sent."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from starlette.requests import Request

from bridge.console.parts import Page, Parts
from bridge.console.payload import indented
from bridge.console.webhooks import number_of
from bridge.errors import PgbridgeError, UsageError
from bridge.postgres import webhooks
from bridge.postgres.events import CONTENT
from bridge.postgres.webhooks import Attempt, Message

_ATTEMPTS: Final = 50
"""The latest; a schedule has fewer, but somebody may send again and again."""


@dataclass(frozen=True, slots=True)
class Look:
    """What there is to be shown."""

    message: Message
    attempts: Sequence[Attempt]

    @property
    def is_whole(self) -> bool:
        """Whether all of the body is shown."""
        return len(self.message.body) < CONTENT or self.message.size == len(self.message.body.encode())

    @property
    def body(self) -> str:
        """For reading."""
        return (indented(self.message.body) if self.is_whole else None) or self.message.body


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    number = number_of("delivery", str(request.path_params["id"]))
    seen = await parts.reader.look()
    shown: dict[str, Any] = {
        "seen": seen, "heading": f"Delivery {number}", "look": None, "problem": None, "most_attempts": _ATTEMPTS,
    }  # fmt: skip
    if seen.outage is not None:
        return shown
    try:
        return {**shown, "look": await parts.recent.get(("delivery", number), 0.0, partial(_look, parts, number))}
    except UsageError:
        raise
    except PgbridgeError as error:  # as for a login that may not see it
        return {**shown, "problem": str(error)}


async def _look(parts: Parts, number: int) -> Look:
    async with parts.database.connection() as connection:
        message = await webhooks.delivery(connection, number, CONTENT)
        if message is None:
            raise UsageError(f"there is no delivery {number}; it may be past the retention")
        return Look(message, await webhooks.attempts(connection, number, _ATTEMPTS))


PAGE: Final = Page("webhook_delivery", "/webhooks/deliveries/{id}", "Delivery", _show, in_menu=False)
