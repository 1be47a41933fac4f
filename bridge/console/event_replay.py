"""The page before an event of the log is published again: where it would go. Its form does it."""

from typing import Any, Final

from starlette.requests import Request

from bridge.commands.dead_outbox import OUTBOX
from bridge.commands.replay import Part, Replayed, replay_log
from bridge.console.access import Person
from bridge.console.parts import Form, Page, Parts
from bridge.console.work import Job
from bridge.errors import UsageError
from bridge.postgres.where import Logged, in_log
from bridge.routes import Routes


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    number = _number(request.query_params.get("number", ""))
    seen, logged = await parts.reader.look(), await _logged(parts, number)
    return {
        "seen": seen,
        "logged": logged,
        "sinks": _sinks(parts, logged),
        "job": parts.work.job,
        "runs": parts.work.runs,
    }


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise UsageError("number: is not the number of an event")
    return int(text)


async def _logged(parts: Parts, number: int) -> Logged:
    async with parts.database.connection() as connection:
        logged = await in_log(connection, number)
    if logged is None:
        raise UsageError(f"the log has no event {number}; it never had one, or it is pruned")
    return logged


def _sinks(parts: Parts, logged: Logged) -> list[tuple[str, str]]:
    """The sinks that its topic goes to today, and the kinds of their brokers."""
    routes = Routes([(route.topic, route.sink) for route in parts.settings.routes])
    return [(sink, parts.settings.sinks[sink].type) for sink in routes.sinks_of(logged.topic)]


async def _start(parts: Parts, person: Person, form: Form) -> str:
    number = _number(form.get("number", ""))
    await parts.require_acting()
    sinks = _sinks(parts, await _logged(parts, number))

    async def do(job: Job) -> str:
        def count(so_far: Replayed) -> None:
            job.done, job.refused = so_far.confirmed, so_far.refused

        replayed = await replay_log(parts.settings, Part.of(number), stop=job.stop, progress=count)
        parts.dead.forget([OUTBOX])
        if replayed.confirmed:
            return f"Event {number} is published again, to {_named([sink for sink, _ in sinks])}."
        if replayed.refused:
            return f"Event {number} was refused, and is among the dead letters now."
        if job.stop.is_set():
            return f"Stopped by {job.stopped_by}, before event {number} was published."
        return f"Nothing was done: the log has no event {number} any more."

    title, page = f"Replay of event {number}", f"/events/{number}"
    return await parts.work.told(parts.work.begin(title, person.signature, 1, do, page))


def _named(sinks: list[str]) -> str:
    return f"the sink{'s' * (len(sinks) != 1)} {', '.join(sinks)}"


PAGE: Final = Page("event_replay", "/replay", "Replay of an event", _show, in_menu=False, actions={"start": _start})
