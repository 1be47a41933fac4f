"""The page of one event: what it carries, its life from the commit to the last reply, and its neighbours."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final
from urllib.parse import urlencode
from uuid import UUID

from markupsafe import Markup
from starlette.requests import Request

from bridge.console.parts import Page, Parts
from bridge.console.payload import indented
from bridge.errors import UsageError
from bridge.event import TRACEPARENT
from bridge.postgres.events import Content, Neighbour, content, neighbours
from bridge.postgres.where import AtSink, AtWorker, DeadRow, Whereabouts, in_log, whereabouts
from bridge.process.terminal import age
from bridge.process.visible import json_text

SEARCHED: Final = 1_000_000
"""So many of the newest events are looked at for the one with an id. With its number it is found at once."""

_RESULT: Final = 2000
"""Characters of a result that are shown."""

_ACTOR: Final = "actor"


@dataclass(frozen=True, slots=True)
class Step:
    """Something in the life of an event."""

    state: str
    """``well``, ``busy``, ``paused``, ``wrong``: how it looks."""
    title: str
    at: datetime | None
    """None where it is not known, or has not come."""
    lines: Sequence[tuple[str, str | datetime]]
    """More about it: a word, and what there is."""


@dataclass(frozen=True, slots=True)
class Life:
    """All that is shown of an event."""

    known: Whereabouts
    content: Content | None
    neighbours: Sequence[Neighbour]

    @property
    def steps(self) -> list[Step]:
        """From the commit on."""
        return list(_steps(self.known))

    @property
    def payload(self) -> str:
        """For reading."""
        if self.content is None:
            return ""
        is_json = self.content.is_whole and self.known.logged is not None and "json" in self.known.logged.content_type
        return (indented(self.content.payload) if is_json else None) or self.content.payload

    @property
    def trace(self) -> str | None:
        """The id of its trace."""
        text = str((self.content.headers if self.content else {}).get(TRACEPARENT, ""))
        parts = text.split("-")
        return parts[1] if len(parts) >= 4 else None

    @property
    def actor(self) -> str | None:
        """Who has emitted it."""
        found = (self.content.headers if self.content else {}).get(_ACTOR)
        return None if found is None else _actor(found)

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Those of its author, and the others."""
        found = self.content.headers if self.content else {}
        return sorted((name, value if isinstance(value, str) else json_text(value)) for name, value in found.items())


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    asked = str(request.path_params["id"])
    number = int(asked) if asked.isdecimal() and len(asked) < 19 else None
    try:
        event_id = None if number is not None else str(UUID(asked))
    except ValueError:
        raise UsageError(f"{asked!r} is not the id of an event, which is a UUID, nor its number in the log") from None
    life = await parts.recent.get(("event", number or event_id), parts.seldom, partial(_look, parts, number, event_id))
    job, logged = parts.work.job, life.known.logged
    is_its = job is not None and logged is not None and job.page == f"/events/{logged.id}"
    return {"life": life, "searched": SEARCHED, "job": job if is_its else None, "runs": parts.work.runs}


async def _look(parts: Parts, number: int | None, event_id: str | None) -> Life:
    async with parts.database.connection() as connection:
        if number is not None:
            logged = await in_log(connection, number)
            if logged is None:
                raise UsageError(f"the log has no event {number}; it never had one, or it is pruned")
            event_id = logged.event_id
        known = await whereabouts(connection, str(event_id), number, _nobody, SEARCHED)
        if known.logged is None:
            return Life(known, None, ())
        carried = await content(connection, known.logged.id)
        near: list[Neighbour] = []
        if known.logged.key is not None:
            near = await neighbours(connection, known.logged.id, known.logged.key)
        return Life(known, carried, near)


def _nobody(down_to: int) -> None:
    """Hears how far a search is."""


def _actor(text: object) -> str:
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return str(text)
    if not isinstance(found, dict):
        return str(text)
    who = [str(found[name]) for name in ("sub", "role") if found.get(name)]
    return f"{who[0]}, as {who[1]}" if len(who) == 2 else "".join(who) or str(text)


def _steps(known: Whereabouts) -> Iterator[Step]:
    if known.scheduled is not None:
        waits = known.scheduled
        yield Step("well", "Scheduled", waits.scheduled_at, ())
        yield Step("busy", "Waits for its time, and is not in the log before", waits.at, ())
    if known.logged is not None:
        yield Step("well", "Recorded in the log", known.logged.recorded_at, (("number", f"{known.logged.id:,}"),))
    dead = {(row.bridge, row.sink or ""): row for row in known.dead_letters}
    for sink in known.sinks:
        row = dead.pop((sink.bridge, sink.sink), None)
        yield _at_sink(sink) if row is None else _dead(row)
    for row in dead.values():
        yield _dead(row)
    for worker in known.workers:
        for operation, effect in worker.effects.items():
            yield _effect(worker.worker, operation, effect)
        yield _at_worker(worker, known.event_id)
    for action in known.actions:
        lines = [("what", action.letter), ("by", action.person)]
        yield Step(
            "busy", f"A person: {action.action}", action.at, (*lines, *((("why", action.why),) * bool(action.why)))
        )


def _sink_name(bridge: str, sink: str) -> str:
    return f"sink {sink} of bridge {bridge}" if sink else f"bridge {bridge}, events without a route"


def _at_sink(sink: AtSink) -> Step:
    name = _sink_name(sink.bridge, sink.sink)
    match sink.state:
        case "settled" if not sink.sink:
            return Step("well", f"Passed over by {name}", None, ())
        case "settled":
            return Step("well", f"Settled: {name}", None, (("that is", sink.meaning or ""),))
        case "held":
            state, words = "wrong", f"Held: {sink.meaning}"
        case "in a gap":
            state, words = "busy", f"In a gap: {sink.meaning}"
        case "not yet":
            state, words = "busy", "Not read yet"
        case _:
            state, words = ("paused" if sink.paused_since is not None else "wrong"), "Waits"
    lines: list[tuple[str, str | datetime]] = [("the sink is at", f"{sink.mark:,}")]
    if sink.paused_since is not None:
        lines += [
            ("paused since", sink.paused_since),
            ("by", f"{sink.paused_by}{f': {sink.paused_why}' if sink.paused_why else ''}"),
        ]
    if sink.problem is not None:
        lines.append(("problem", sink.problem))
    if not sink.leads:
        lines.append(("problem", f"no bridge named {sink.bridge} is running"))
    return Step(state, f"{words}: {name}", None, lines)


def _dead(row: DeadRow) -> Step:
    name = _sink_name(row.bridge, row.sink or "")
    return Step(
        "wrong", f"Dead letter: {name}", row.failed_at,
        (("letter", _letter(row.id)), ("reason", f"{row.code}: {row.reason}"), ("attempts", str(row.attempts))),
    )  # fmt: skip


def _letter(id_: str) -> Markup:
    """A link to the page of a dead letter."""
    return Markup('<a href="/dead/letter?{}">{}</a>').format(urlencode({"id": id_}), id_)


def _at_worker(worker: AtWorker, event_id: str) -> Step:
    lines: list[tuple[str, str | datetime]] = [
        ("attempts", str(worker.attempts)), ("the first", worker.started_at),
    ]  # fmt: skip
    match worker.state:
        case "finished":
            state, words, at = "well", "Finished", worker.finished_at
            if worker.finished_at is not None:
                lines.append(("took", age(max(0.0, (worker.finished_at - worker.started_at).total_seconds()))))
        case "running":
            state, words, at = "busy", "Running", None
            lines.append(("claimed by", worker.claimed_by or "-"))
        case "waiting":
            state, words, at = "busy", "Waits for another attempt", worker.due_at
        case "given up":
            state, words, at = "wrong", "Given up; the broker has not taken its dead letter yet", None
        case _:
            state, words, at = "wrong", "Dead letter", worker.ended_at
            lines.append(("letter", _letter(f"{worker.worker}:{event_id}")))
    if worker.held_key is not None:
        lines.append(("holds the key", worker.held_key))
    if worker.failure is not None:
        lines.append(("reason", f"{worker.failure.get('code')}: {worker.failure.get('reason')}"))
    if worker.result is not None:
        text = json_text(worker.result)
        lines.append(("reply", text if len(text) <= _RESULT else f"{text[:_RESULT]}…"))
    return Step(state, f"{words}: worker {worker.worker}", at, lines)


def _effect(worker: str, operation: str, effect: Mapping[str, Any]) -> Step:
    begun = effect.get("started_at")
    has_result = "result" in effect
    return Step(
        "well" if has_result else "busy",
        f"Effect {operation} of worker {worker}",
        None if begun is None else datetime.fromisoformat(begun),
        (
            ("idempotency key", str(effect.get("idempotency_key"))),
            ("result", "is on record" if has_result else "none on record"),
        ),
    )


PAGE: Final = Page("event", "/events/{id}", "Event", _show, in_menu=False)
