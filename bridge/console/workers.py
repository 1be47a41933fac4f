"""The page Workers: how each stands, what its processes have in hand, and pausing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from starlette.requests import Request

from bridge.console.access import Person
from bridge.console.charts import Charts, span_of, worker_charts
from bridge.console.flow import Box, worker_box
from bridge.console.parts import Form, Page, Parts
from bridge.console.pausing import pause, resume
from bridge.console.reader import Seen, Subject
from bridge.console.samples import SAMPLED, samples
from bridge.errors import PgbridgeError, UsageError
from bridge.postgres.history import Span
from bridge.postgres.pause import Pausable
from bridge.postgres.status import WorkerStatus
from bridge.postgres.workers import LOOK_AT, AtWork, Lately, at_work

_SHOWN: Final = 50
"""Workers of one page."""


@dataclass(frozen=True, slots=True)
class Row:
    """One worker."""

    status: WorkerStatus
    """As `pgbridge status` shows it."""
    box: Box
    work: AtWork
    lately: Lately | None
    """None where there are no samples of it."""
    may_pause: bool
    """Whether the settings name it; what is paused can always go on."""


@dataclass(frozen=True, slots=True)
class Look:
    """What these pages ask for themselves."""

    work: Mapping[str, AtWork] = field(default_factory=dict)
    lately: Mapping[str, Lately] = field(default_factory=dict)
    problem: str | None = None
    """Why there is nothing."""


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    seen = await parts.reader.look(Subject.WORKERS)
    known = seen.workers or ()
    after = request.query_params.get("after", "")
    rest = [worker for worker in known if worker.worker > after]
    statuses = rest[:_SHOWN]
    names = tuple(worker.worker for worker in statuses)
    look = await look_at(parts, seen, names)
    return {
        "seen": seen,
        "rows": rows(parts, statuses, look),
        "problem": look.problem,
        "after": after,
        "next_after": names[-1] if len(rest) > _SHOWN else None,
        "looked_at": LOOK_AT,
        "charts": await charts(parts, seen, names, span_of(request.query_params.get("charts"))),
    }


async def look_at(parts: Parts, seen: Seen, names: Sequence[str]) -> Look:
    """What these workers have in hand, and did lately; nothing while the database is gone."""
    if seen.outage is not None or not names:
        return Look()
    names = tuple(names)
    try:
        work = await parts.recent.get(("at work", names), parts.seldom, partial(_at_work, parts, names))
        return Look(work, await samples(parts, names))
    except PgbridgeError as error:  # the rest of the page is known
        return Look(problem=str(error))


async def _at_work(parts: Parts, names: Sequence[str]) -> dict[str, AtWork]:
    async with parts.database.connection() as connection:
        return await at_work(connection, names)


def rows(parts: Parts, statuses: Sequence[WorkerStatus], look: Look) -> list[Row]:
    """With what is known of them."""
    return [
        Row(
            status,
            worker_box(status),
            look.work.get(status.worker, AtWork()),
            look.lately.get(status.worker),
            status.worker in parts.settings.workers,
        )
        for status in statuses
    ]


async def charts(parts: Parts, seen: Seen, names: Sequence[str], span: Span) -> Charts | None:
    """Of these workers; None where there is none, or the database is gone."""
    if seen.outage is not None or not names:
        return None
    try:
        return await parts.recent.get(
            ("worker charts", tuple(names), span), SAMPLED, partial(_charts, parts, names, span)
        )
    except PgbridgeError as error:
        return Charts(span, problem=str(error))


async def _charts(parts: Parts, names: Sequence[str], span: Span) -> Charts:
    async with parts.database.connection() as connection:
        return await worker_charts(connection, names, span)


def _worker(parts: Parts, form: Form, *, known: bool) -> Pausable:
    name = form.get("worker", "")
    if known and name not in parts.settings.workers:
        raise UsageError(
            f"there is no worker {name!r}; the settings have: {', '.join(parts.settings.workers) or 'none'}"
        )
    return Pausable("worker", "", name)


async def _pause(parts: Parts, person: Person, form: Form) -> str:
    return await pause(parts, person, _worker(parts, form, known=True), form)


async def _resume(parts: Parts, person: Person, form: Form) -> str:
    # What the settings do not name any more may still be paused.
    return await resume(parts, person, _worker(parts, form, known=False))


PAGE: Final = Page("workers", "/workers", "Workers", _show, actions={"pause": _pause, "resume": _resume})
