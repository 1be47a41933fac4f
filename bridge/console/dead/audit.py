"""The page of what people did to dead letters, newest first."""

from typing import Any, Final

from starlette.requests import Request

from bridge.console.parts import Page, Parts
from bridge.errors import UsageError
from bridge.postgres.audit import PAGE as PAGE_SIZE
from bridge.postgres.audit import Act, acts

_OLDER: Final = 60.0
"""Seconds for which a page that is not the newest is kept: the audit is only added to."""


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    text = request.query_params.get("before")
    if text is not None and not (text.isdecimal() and len(text) < 19):
        raise UsageError("before: is not the number of an entry of the audit")
    before = None if text is None else int(text)

    async def ask() -> list[Act]:
        async with parts.database.connection() as connection:
            return await acts(connection, before)

    found = await parts.recent.get(("dead audit", before), 0.0 if before is None else _OLDER, ask)
    return {
        "acts": found[:PAGE_SIZE],
        "before": before,
        "next": found[PAGE_SIZE - 1].id if len(found) > PAGE_SIZE else None,
    }


PAGE: Final = Page("dead_audit", "/dead/audit", "What people did to dead letters", _show, in_menu=False)
