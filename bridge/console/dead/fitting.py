"""The dead letters that fit what was asked for, and the groups that they form: worked out once for all who look."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from markupsafe import Markup

from bridge.commands.dead_groups import Group, groups_of
from bridge.console.chart import spark
from bridge.console.dead.asked import Asked
from bridge.console.dead.boxes import Look, Sorted
from bridge.console.parts import Parts

_HOURS: Final = 24
"""That a trend shows."""
_KEPT: Final = 20.0
"""Seconds for which the same of the same look is not worked out again; `since` and trends move with the time."""


@dataclass(frozen=True, slots=True)
class Trend:
    """A group, and how many letters came to it in each of the last hours."""

    group: Group
    spark: Markup


@dataclass(frozen=True, slots=True)
class Fits:
    """What fits."""

    letters: Sequence[Sorted]
    """Those that were given up last first."""
    trends: Sequence[Trend]
    """The largest group first."""


async def fitting(parts: Parts, asked: Asked, look: Look) -> Fits:
    """What fits. Raises UsageError, which says which field is wrong."""
    asked.choice()
    key = ("dead letters", tuple(asked.given), tuple((box.name, box.at) for box in look.boxes))
    # Ten thousand letters take a tenth of a second, for which the pages of others should not wait.
    return await parts.recent.get(key, _KEPT, lambda: asyncio.to_thread(_fitting, asked, look))


def _fitting(asked: Asked, look: Look) -> Fits:
    letters = asked.chosen(look.letters)
    now = datetime.now(UTC)
    came: dict[str, Counter[int]] = {}
    for each in letters:
        if each.letter.failed_at is not None:
            ago = int((now - each.letter.failed_at) / timedelta(hours=1))
            came.setdefault(each.group, Counter())[max(0, ago)] += 1
    groups = groups_of((each.group, each.letter) for each in letters)
    return Fits(letters, [Trend(group, _spark(came.get(group.id, Counter()))) for group in groups])


def _spark(came: Counter[int]) -> Markup:
    hours = [came[ago] for ago in reversed(range(_HOURS))]
    lately = sum(hours)
    words = f"{lately:,} in the last {_HOURS} h, {hours[-1]:,} in the last hour" if lately else f"none in {_HOURS} h"
    return spark(hours, words)
