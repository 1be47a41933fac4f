"""The page Dead letters: the groups that they form, and the letters that fit."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from markupsafe import Markup
from starlette.requests import Request

from bridge.commands.dead_groups import Group, grouped
from bridge.console.chart import spark
from bridge.console.dead_acts import discard, replay, stop
from bridge.console.dead_asked import Asked, place
from bridge.console.dead_boxes import LETTERS, SECONDS, Sorted
from bridge.console.parts import Page, Parts
from bridge.errors import UsageError

PAGE_SIZE: Final = 50
"""Letters of one page, and groups that are shown."""

_HOURS: Final = 24
"""That a trend shows."""


@dataclass(frozen=True, slots=True)
class Trend:
    """A group, and how many letters came to it in each of the last hours."""

    group: Group
    spark: Markup


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    asked = Asked.of(request.query_params.multi_items())
    seen, look = await parts.reader.look(), await parts.dead.look()
    shown = {
        "seen": seen, "look": look, "asked": asked, "job": parts.work.job, "runs": parts.work.runs, "wrong": None,
        "bound": LETTERS, "seconds": SECONDS, "is_everything": not asked.given,
        "workers": sorted(parts.settings.workers), "sinks": sorted(parts.settings.sinks),
    }  # fmt: skip
    try:
        found = asked.chosen(look.letters)
    except UsageError as error:
        return {**shown, "wrong": str(error), "found": (), "groups": (), "more_groups": 0, "letters": (), "next": None}
    groups = trends(found)
    page = _page(found, request.query_params.get("before"))
    return {
        **shown,
        "found": found,
        "groups": groups[:PAGE_SIZE],
        "more_groups": max(0, len(groups) - PAGE_SIZE),
        "letters": page[:PAGE_SIZE],
        "next": _mark(page[PAGE_SIZE - 1]) if len(page) > PAGE_SIZE else None,
    }


def trends(letters: Sequence[Sorted]) -> list[Trend]:
    """The groups of letters, the largest first."""
    now = datetime.now(UTC)
    came: dict[str, Counter[int]] = {}
    for each in letters:
        if each.letter.failed_at is not None:
            ago = int((now - each.letter.failed_at) / timedelta(hours=1))
            came.setdefault(each.group, Counter())[max(0, ago)] += 1
    return [Trend(group, _spark(came.get(group.id, Counter()))) for group in _grouped(letters)]


def _grouped(letters: Sequence[Sorted]) -> Iterable[Group]:
    return grouped(each.letter for each in letters)


def _spark(came: Counter[int]) -> Markup:
    hours = [came[ago] for ago in reversed(range(_HOURS))]
    lately = sum(hours)
    words = f"{lately:,} in the last {_HOURS} h, {hours[-1]:,} in the last hour" if lately else f"none in {_HOURS} h"
    return spark(hours, words)


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
