"""The page Webhooks: the endpoints and how each is; and sending again, for its page and those of one endpoint."""

from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from starlette.requests import Request

from bridge.console.access import Person
from bridge.console.moments import moment_of
from bridge.console.parts import Form, Page, Parts
from bridge.errors import PgbridgeError, UsageError
from bridge.postgres import webhooks
from bridge.postgres.webhooks import Endpoint

_SHOWN: Final = 20
"""Endpoints of one page."""

COUNT_TO: Final = 100
"""Deliveries of each state that are counted of each endpoint; so many stand for more, too."""

MOST_RECOVERED: Final = 10_000
"""Deliveries that are made due again at once: a statement of the console may take 5 s."""

TOO_MANY: Final = (
    f"more than {MOST_RECOVERED:,} deliveries would be sent again, which takes longer than the console may take"
)

_LARGEST: Final = 2**63 - 1


def shown_url(url: str) -> str:
    """Without its query, which often holds a secret."""
    path, mark, _ = url.partition("?")
    return f"{path}?…" if mark else path


def state_of(endpoint: Endpoint) -> str:
    """How it looks: ``well``, ``busy``, ``paused``, ``wrong``."""
    if endpoint.disabled_at is not None:
        return "wrong"
    return "well" if endpoint.failing_since is None and endpoint.breaker == "closed" else "busy"


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    after = number_of("after", request.query_params.get("after") or "0")
    seen = await parts.reader.look()
    found: list[Endpoint] = []
    problem = None
    if seen.outage is None:
        try:
            found = await parts.recent.get(("webhooks", after), 0.0, partial(_look, parts, after))
        except PgbridgeError as error:  # as for a login that may not see them
            problem = str(error)
    return {
        "seen": seen,
        "problem": problem,
        "endpoints": [(each, state_of(each), each.words(datetime.now(UTC))) for each in found[:_SHOWN]],
        "after": after,
        "next_after": found[_SHOWN - 1].id if len(found) > _SHOWN else None,
        "count_to": COUNT_TO,
        "shown_url": shown_url,
    }


async def _look(parts: Parts, after: int) -> list[Endpoint]:
    async with parts.database.connection() as connection:
        return await webhooks.endpoints(connection, after, _SHOWN + 1, COUNT_TO)


def number_of(field: str, text: str) -> int:
    """The id of an endpoint or a delivery. Raises UsageError, which names the field."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 19 or int(text) > _LARGEST:
        raise UsageError(f"{field}: {text!r} is not a number, as endpoints and deliveries have it")
    return int(text)


def recover_command(number: int, since: datetime) -> str:
    """What does the same in a terminal."""
    return f'pgbridge-worker webhooks recover {number} --since "{since:%Y-%m-%d %H:%M:%S}Z"'


async def _enable(parts: Parts, _person: Person, form: Form) -> str:
    number = number_of("endpoint", form.get("endpoint", ""))
    async with parts.database.connection() as connection:
        was_disabled = await webhooks.enable(connection, number)
    if was_disabled:
        return f"The endpoint {number} gets what comes from now on; what it has missed stays skipped."
    return f"The endpoint {number} was enabled; its circuit breaker is closed now."


async def _resend(parts: Parts, _person: Person, form: Form) -> str:
    number = number_of("delivery", form.get("delivery", ""))
    async with parts.database.connection() as connection:
        await webhooks.resend(connection, number)
    return f"The delivery {number} is due now, with its whole schedule of attempts."


async def _recover(parts: Parts, _person: Person, form: Form) -> str:
    number = number_of("endpoint", form.get("endpoint", ""))
    since = moment_of("since", form.get("since") or None)
    if since is None:
        raise UsageError("since: give a time, or how long ago: 2d")
    async with parts.database.connection() as connection:
        found = await webhooks.recoverable(connection, number, since, MOST_RECOVERED + 1)
        if found.total > MOST_RECOVERED:
            raise UsageError(f"{TOO_MANY}: {recover_command(number, since)}")
        count = await webhooks.recover(connection, number, since)
    return (
        f"The endpoint {number} is enabled, and {count:,} {'delivery is' if count == 1 else 'deliveries are'} due now."
    )


PAGE: Final = Page(
    "webhooks", "/webhooks", "Webhooks", _show, actions={"enable": _enable, "resend": _resend, "recover": _recover}
)
