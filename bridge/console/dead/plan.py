"""The page before a replay or a discard of dead letters: how many, which groups, and what will happen."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from starlette.requests import Request

from bridge.brokers.contract import HELD
from bridge.commands.dead_outbox import OUTBOX
from bridge.console.dead.asked import Asked
from bridge.console.dead.boxes import LETTERS, Look, Sorted
from bridge.console.dead.fitting import fitting
from bridge.console.dead.listing import PAGE_SIZE
from bridge.console.parts import LONGEST_REASON, Page, Parts
from bridge.errors import UsageError
from bridge.routes import Routes
from bridge.settings import Settings


@dataclass(frozen=True, slots=True)
class Step:
    """What happens to some of the letters."""

    letters: int
    words: str
    is_in_the_way: bool = False
    """Whether nothing can be done while it is so."""


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    action = request.query_params.get("action")
    if action not in ("replay", "discard"):
        raise UsageError("action: is replay or discard; the buttons of the page Dead letters lead here")
    asked = Asked.of(request.query_params.multi_items())
    if "selected" in request.query_params and not asked.all("id"):
        raise UsageError("no letter is selected; go back, and choose some, or all that a filter leaves")
    seen, look = await parts.reader.look(), await parts.dead.look()
    fits = await fitting(parts, asked, look)
    letters = fits.letters
    steps = list(_replay(parts.settings, letters) if action == "replay" else _discard(parts.settings, letters))
    boxes = {each.letter.box for each in letters}
    choice = asked.choice()
    return {
        "seen": seen,
        "look": look,
        "asked": asked,
        "action": action,
        "count": len(letters),
        "cut": [box.name for box in look.boxes if box.is_cut and box.name in boxes],
        "unseen": [box for box in look.boxes if box.problem is not None],
        "bound": LETTERS,
        "groups": fits.trends[:PAGE_SIZE],
        "more_groups": max(0, len(fits.trends) - PAGE_SIZE),
        "steps": steps,
        "can_go": bool(letters) and not any(step.is_in_the_way for step in steps),
        "job": parts.work.job,
        "runs": parts.work.runs,
        "longest": LONGEST_REASON,
        # What comes after this look is not meant, and a box that has none of these letters is left alone.
        "choice": _with(
            asked,
            boxes,
            since="" if choice.since is None else choice.since.isoformat(),
            until="" if not letters else _end(letters, look).isoformat(),
        ),
    }


def _end(letters: Sequence[Sorted], look: Look) -> datetime:
    """When the last of these letters came, by the clock that wrote them down; of a box that was not seen to its end,
    all that was there is meant."""
    boxes = {each.letter.box for each in letters}
    ends = [each.letter.failed_at for each in letters if each.letter.failed_at is not None]
    ends += [box.at for box in look.boxes if box.name in boxes and (box.is_cut or not ends)]
    return max(ends)


def _with(asked: Asked, boxes: set[str], **times: str) -> str:
    given = [(name, value) for name, value in asked.given if name not in ("worker", "since", "until")]
    return Asked([*given, *(("worker", box) for box in sorted(boxes))]).query(**times)


def _replay(settings: Settings, letters: Sequence[Sorted]) -> Iterator[Step]:
    routes = Routes([(route.topic, route.sink) for route in settings.routes])
    to_sinks = Counter(each.letter.sink for each in letters if each.letter.box == OUTBOX and each.letter.sink)
    for sink, count in sorted(to_sinks.items()):
        if sink in settings.sinks:
            yield Step(count, f"to the sink {sink}, which had refused them, and to no other")
        else:
            yield Step(
                count,
                f"were refused by the sink {sink}, which is not in the settings: name it there again, leave them out "
                "by a filter, or discard them",
                True,
            )
    routed = Counter(
        routes.sinks_of(each.letter.topic or "")
        for each in letters
        if each.letter.box == OUTBOX and not each.letter.sink
    )
    for sinks, count in sorted(routed.items()):
        if sinks:
            yield Step(count, f"by today's routes to {', '.join(sinks)}")
        else:
            yield Step(count, "to nowhere: no route takes their topic today either, so they will be refused again")
    of_workers = Counter(each.letter.box for each in letters if each.letter.box != OUTBOX)
    for worker, count in sorted(of_workers.items()):
        words = f"back to the queue of the worker {worker}, which tries them afresh"
        if settings.workers[worker].holds:
            words += (
                ", in the order of each key. All its letters are taken in hand for that at first: leave the rate out, "
                "since RabbitMQ takes them back after half an hour"
            )
        yield Step(count, words)


def _discard(settings: Settings, letters: Sequence[Sorted]) -> Iterator[Step]:
    yield Step(len(letters), "deleted for good. Who did it and why stays in the audit, their payloads do not")
    holding = Counter(
        each.letter.box
        for each in letters
        if each.letter.box in settings.workers and settings.workers[each.letter.box].holds and each.letter.code != HELD
    )
    for worker, count in sorted(holding.items()):
        yield Step(count, f"may hold their keys without being there: pgbridge-worker release {worker} KEY --event ID")


PAGE: Final = Page("dead_plan", "/dead/plan", "What would be done", _show, in_menu=False)
