"""The page of one endpoint of webhooks: how it is, its deliveries, and what a recovery would send again."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from starlette.requests import Request

from bridge.console.moments import moment_of
from bridge.console.parts import Page, Parts
from bridge.console.webhooks import MOST_RECOVERED, TOO_MANY, number_of, recover_command, shown_url, state_of
from bridge.errors import PgbridgeError, UsageError
from bridge.postgres import webhooks
from bridge.postgres.webhooks import Delivery, Endpoint, Recoverable

_SHOWN: Final = 20
"""Deliveries of each kind: being sent, due next, finished last."""

_COUNT_TO: Final = 1000
"""Deliveries of each state that are counted; so many stand for more, too."""


@dataclass(frozen=True, slots=True)
class Look:
    """What there is to be shown."""

    endpoint: Endpoint
    deliveries: Sequence[Delivery]


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    number = number_of("endpoint", str(request.path_params["id"]))
    seen = await parts.reader.look()
    since = request.query_params.get("since", "").strip()
    shown: dict[str, Any] = {
        "seen": seen, "heading": f"Endpoint {number}", "number": number, "look": None, "problem": None,
        "since": since, "since_at": None, "found": None, "wrong": None, "count_to": _COUNT_TO,
    }  # fmt: skip
    if seen.outage is not None:
        return shown
    try:
        look = await parts.recent.get(("webhook", number), 0.0, partial(_look, parts, number))
    except UsageError:
        raise
    except PgbridgeError as error:  # as for a login that may not see it
        return {**shown, "problem": str(error)}
    shown |= {
        "look": look,
        "state": state_of(look.endpoint),
        "words": look.endpoint.words(datetime.now(UTC)),
        "url": shown_url(look.endpoint.url),
    }
    if since:
        try:
            at = moment_of("since", since)
            key = ("recoverable", number, since)
            found = None if at is None else await parts.recent.get(key, 0.0, partial(_count, parts, number, at))
            shown |= {"found": found, "since_at": at}
            if at is not None and found is not None and found.total > MOST_RECOVERED:
                shown |= {"found": None, "wrong": f"{TOO_MANY}: {recover_command(number, at)}"}
        except UsageError as error:
            shown["wrong"] = str(error)
    return shown


async def _look(parts: Parts, number: int) -> Look:
    async with parts.database.connection() as connection:
        endpoint = await webhooks.endpoint(connection, number, _COUNT_TO)
        if endpoint is None:
            raise UsageError(f"there is no endpoint {number}; the page Webhooks has those that there are")
        return Look(endpoint, await webhooks.deliveries(connection, number, _SHOWN))


async def _count(parts: Parts, number: int, since: datetime) -> Recoverable:
    async with parts.database.connection() as connection:
        return await webhooks.recoverable(connection, number, since, MOST_RECOVERED + 1)


PAGE: Final = Page("webhook", "/webhooks/{id}", "Endpoint", _show, in_menu=False)
