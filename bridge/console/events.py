"""The page Events: the log, newest first, as far as a search looks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import urlencode
from uuid import UUID

from starlette.requests import Request

from bridge.console.moments import moment_of
from bridge.console.parts import Page, Parts
from bridge.errors import UsageError
from bridge.postgres import events
from bridge.postgres.events import Search, search

_OLDER: Final = 60.0
"""Seconds for which a page that is not the newest is kept: the log is only added to, at its other end."""

FIELDS: Final = ("topic", "key", "since", "until", "header", "text")
"""Of the form, as they stand in the address."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What an address asks for."""

    given: Mapping[str, str]
    """The form's fields that hold something."""
    before: int | None

    def address(self, **other: str | int | None) -> str:
        """Of the same search, but for these fields; from its beginning, unless `before` is among them."""
        fields = {**self.given, **other}
        query = urlencode({name: value for name, value in fields.items() if value not in (None, "")})
        return f"/events?{query}" if query else "/events"

    def search(self) -> Search:
        """Raises UsageError, which says which field is wrong."""
        given = self.given
        header, equals, value = given.get("header", "").partition("=")
        return Search(
            topics=tuple(given.get("topic", "").replace(",", " ").split()),
            key=given.get("key"),
            since=moment_of("since", given.get("since")),
            until=moment_of("until", given.get("until")),
            header=header or None,
            value=value if equals else None,
            text=given.get("text"),
        )


def _asked(request: Request) -> Asked:
    given = {name: value for name in FIELDS if (value := request.query_params.get(name, ""))}
    return Asked(given, _number(request.query_params.get("before")))


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    asked = _asked(request)
    shown = {"asked": asked, "found": None, "wrong": None, "jump": None, "bound": events.BOUND}
    jump = request.query_params.get("id", "").strip()
    if jump:
        try:
            return {**shown, "jump": _event_of(jump)}
        except UsageError as error:
            return {**shown, "wrong": str(error)}
    try:
        wanted = asked.search()
    except UsageError as error:
        return {**shown, "wrong": str(error)}
    # By what was written: how long ago something is, changes with every look.
    key = ("events", tuple(asked.given.items()), asked.before)
    found = await parts.recent.get(key, 0.0 if asked.before is None else _OLDER, partial(_look, parts, wanted, asked))
    return {**shown, "found": found}


async def _look(parts: Parts, wanted: Search, asked: Asked) -> events.Page:
    async with parts.database.connection() as connection:
        return await search(connection, wanted, asked.before)


def _number(text: str | None) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or len(text) > 19 or int(text) >= 2**63:
        raise UsageError("before: is not the number of an event")
    return int(text)


def _event_of(text: str) -> str:
    """As the address of an event has it."""
    if text.isdecimal() and len(text) < 19:
        return str(int(text))
    try:
        return str(UUID(text))
    except ValueError:
        raise UsageError(f"{text!r} is not the id of an event, which is a UUID, nor its number in the log") from None


PAGE: Final = Page("events", "/events", "Events", _show)
