"""The page Dead letters: the groups that they form, and the letters that fit."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from starlette.requests import Request

from bridge.console.dead.acts import discard, replay, stop
from bridge.console.dead.asked import Asked, place
from bridge.console.dead.boxes import LETTERS, SECONDS, Sorted
from bridge.console.dead.fitting import fitting
from bridge.console.parts import Page, Parts
from bridge.errors import UsageError

PAGE_SIZE: Final = 50
"""Letters of one page, and groups that are shown."""


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    asked = Asked.of(request.query_params.multi_items())
    seen, look = await parts.reader.look(), await parts.dead.look()
    shown = {
        "seen": seen, "look": look, "asked": asked, "job": parts.work.job, "runs": parts.work.runs, "wrong": None,
        "bound": LETTERS, "seconds": SECONDS, "is_everything": not asked.given,
        "workers": sorted(parts.settings.workers), "sinks": sorted(parts.settings.sinks),
    }  # fmt: skip
    try:
        fits = await fitting(parts, asked, look)
    except UsageError as error:
        return {**shown, "wrong": str(error), "count": 0, "groups": (), "more_groups": 0, "letters": (), "next": None}
    page = _page(fits.letters, request.query_params.get("before"))
    return {
        **shown,
        "count": len(fits.letters),
        "groups": fits.trends[:PAGE_SIZE],
        "more_groups": max(0, len(fits.trends) - PAGE_SIZE),
        "letters": page[:PAGE_SIZE],
        "next": _mark(page[PAGE_SIZE - 1]) if len(page) > PAGE_SIZE else None,
    }


def _page(found: Sequence[Sorted], before: str | None) -> Sequence[Sorted]:
    """The letters of one page, and one more where there are more."""
    if before is None:
        return found[: PAGE_SIZE + 1]
    at, _, id_ = before.partition(" ")
    try:
        mark = (datetime.fromisoformat(at), id_)
        behind = [each for each in found if place(each) < mark]
    except (ValueError, TypeError):
        raise UsageError("before: is not a place in the list of dead letters") from None
    return behind[: PAGE_SIZE + 1]


def _mark(each: Sorted) -> str:
    at, id_ = place(each)
    return f"{at.isoformat()} {id_}"


PAGE: Final = Page("dead", "/dead", "Dead letters", _show, actions={"replay": replay, "discard": discard, "stop": stop})
