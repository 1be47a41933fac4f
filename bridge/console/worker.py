"""The page of one worker: what it has in hand now, what became of the rest, and the keys that wait."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from starlette.requests import Request

from bridge.console.charts import span_of
from bridge.console.parts import Page, Parts
from bridge.console.reader import Subject
from bridge.console.workers import charts, look_at, rows
from bridge.errors import PgbridgeError, UsageError
from bridge.postgres.workers import LOOK_AT, SHOWN, Handled, HeldKeys, Part, held_keys, worker_events


@dataclass(frozen=True, slots=True)
class Events:
    """What of its events is shown."""

    parts: dict[Part, list[Handled]]
    held: HeldKeys


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    name = str(request.path_params["name"])
    after = _line(request.query_params.get("held"))
    seen = await parts.reader.look(Subject.WORKERS)
    shown = {
        "seen": seen, "heading": f"Worker {name}", "name_of_worker": name, "row": None, "problem": None, "events": None,
        "after": after, "looked_at": LOOK_AT, "shown": SHOWN, "charts": None,
    }  # fmt: skip
    if seen.workers is None:
        return shown
    statuses = [worker for worker in seen.workers if worker.worker == name]
    if not statuses:
        raise UsageError(f"there is no worker {name!r}: the settings name none, and none has an inbox")
    look = await look_at(parts, seen, [name])
    shown |= {"row": rows(parts, statuses, look)[0], "problem": look.problem}
    if seen.outage is not None or look.problem is not None:
        return shown
    try:
        ask = partial(_events, parts, name, after)
        shown["events"] = await parts.recent.get(("worker", name, after), parts.seldom, ask)
    except PgbridgeError as error:  # the rest of the page is known
        shown["problem"] = str(error)
    shown["charts"] = await charts(parts, seen, [name], span_of(request.query_params.get("charts")))
    return shown


async def _events(parts: Parts, name: str, after: int | None) -> Events:
    async with parts.database.connection() as connection:
        return Events(await worker_events(connection, name), await held_keys(connection, name, after))


def _line(text: str | None) -> int | None:
    """Where a page of held keys begins."""
    if not text:
        return None
    if not re.fullmatch(r"-?[0-9]{1,19}", text) or not -(2**63) <= int(text) < 2**63:
        raise UsageError("held: is not where a page of held keys begins")
    return int(text)


PAGE: Final = Page("worker", "/workers/{name:path}", "Worker", _show, in_menu=False)
