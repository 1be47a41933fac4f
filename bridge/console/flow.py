"""The page Flow: the way of the events as a picture, and what is wrong on it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from starlette.requests import Request

from bridge.console.charts import Charts, charts, span_of
from bridge.console.parts import Page, Parts
from bridge.console.reader import Seen, Subject
from bridge.console.samples import SAMPLED, samples
from bridge.errors import PgbridgeError, SettingsError
from bridge.postgres.pause import Pause
from bridge.postgres.problems import leader_words, problem_words, problems
from bridge.postgres.status import Bridge, Rates, SinkPosition, Status, WorkerStatus, rates
from bridge.postgres.workers import Lately
from bridge.settings import Settings

_LATE: Final = 10.0
"""Seconds that an event may wait for its sink before the picture calls the sink behind."""


@dataclass(frozen=True, slots=True)
class Box:
    """How a part of the way stands."""

    state: str
    """``well``, ``busy``, ``paused``, ``wrong``: how it looks."""
    words: str
    """What that means here."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A sink, and the workers that consume from its broker."""

    position: SinkPosition
    rate: Rates | None
    box: Box
    kind: str
    """Of broker; empty for what is not in the settings."""
    workers: Sequence[tuple[WorkerStatus, Box]]


@dataclass(frozen=True, slots=True)
class Way:
    """One bridge."""

    bridge: Bridge
    leader: str
    emitted: float | None
    """Events a second."""
    branches: Sequence[Branch]


async def _show(parts: Parts, request: Request) -> dict[str, Any]:
    seen = await parts.reader.look(Subject.BRIDGES, Subject.WORKERS)
    return {
        "seen": seen,
        **picture(parts.settings, seen),
        "lately": await _lately(parts, seen),
        "charts": await _charts(parts, request, seen),
    }


async def _lately(parts: Parts, seen: Seen) -> Mapping[str, Lately]:
    """What the workers' samples say, by worker."""
    if seen.workers is None or seen.outage is not None:
        return {}
    try:
        return await samples(parts, [worker.worker for worker in seen.workers])
    except PgbridgeError:  # which the charts, from the same samples, say
        return {}


async def _charts(parts: Parts, request: Request, seen: Seen) -> Charts | None:
    """Of the span that the address names; None while the database is gone."""
    if seen.workers is None or seen.outage is not None:
        return None
    settings, span = parts.settings, span_of(request.query_params.get("charts"))
    workers = [worker.worker for worker in seen.workers]

    async def ask() -> Charts:
        async with parts.database.connection() as connection:
            return await charts(connection, settings.name, workers, span)

    try:
        return await parts.recent.get(("charts", span), SAMPLED, ask)
    except PgbridgeError as error:  # the rest of the page is known
        return Charts(span, problem=str(error))


def picture(settings: Settings, seen: Seen) -> dict[str, Any]:
    """What the template draws."""
    if seen.status is None:
        return {"problems": [], "ways": [], "others": []}
    status = replace(seen.status, workers=seen.workers or ())
    by_sink = _by_sink(settings, status.workers)
    ways = [_way(settings, seen.before, status, bridge, by_sink) for bridge in status.bridges]
    drawn = {worker.worker for way in ways for branch in way.branches for worker, _ in branch.workers}
    others = [(worker, worker_box(worker)) for worker in status.workers if worker.worker not in drawn]
    return {"problems": list(problems(status, settings.name)), "ways": ways, "others": others}


def _by_sink(settings: Settings, workers: Iterable[WorkerStatus]) -> dict[str, list[WorkerStatus]]:
    found: dict[str, list[WorkerStatus]] = {}
    for worker in workers:
        if worker.worker in settings.workers:
            try:
                sink = settings.sink_of(worker.worker)
            except SettingsError:  # it names none of several, which `check` complains of
                continue
            found.setdefault(sink, []).append(worker)
    return found


def _way(
    settings: Settings, before: Status | None, now: Status, bridge: Bridge, by_sink: dict[str, list[WorkerStatus]]
) -> Way:
    is_ours = bridge.name == settings.name
    branches = []
    for position in bridge.sinks:
        rate = rates(before, now, bridge.name, position.sink) if before is not None else None
        ours = is_ours and position.sink in settings.sinks
        workers = [(worker, worker_box(worker)) for worker in by_sink.get(position.sink, ())] if ours else []
        kind = settings.sinks[position.sink].type if ours else ""
        branches.append(Branch(position, rate, _sink_box(position), kind, workers))
    emitted = next((branch.rate.emitted for branch in branches if branch.rate is not None), None)
    return Way(bridge, leader_words(bridge, now), emitted, branches)


def _sink_box(position: SinkPosition) -> Box:
    # Whoever pauses a sink often does so because its broker is about to go.
    problem = None if position.problem is None else problem_words(position)
    if position.paused is not None:
        return Box("paused", "; ".join(filter(None, (pause_words(position.paused), problem))))
    if problem is not None:
        return Box("wrong", problem)
    if (position.oldest_unsent_seconds or 0.0) > _LATE:
        return Box("busy", "behind")
    return Box("well", "up to date")


def worker_box(worker: WorkerStatus) -> Box:
    """How a worker stands."""
    if worker.paused is not None:
        return Box("paused", pause_words(worker.paused))
    if worker.held_keys or worker.dead_letters:
        return Box("wrong", "has dead letters")
    return Box("busy", "works") if worker.running else Box("well", "waits for events")


def pause_words(pause: Pause) -> str:
    """Who paused it, and why."""
    return f"paused by {pause.who}{f': {pause.why}' if pause.why else ''}"


PAGE: Final = Page("flow", "/", "Flow", _show)
