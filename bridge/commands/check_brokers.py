"""What `pgbridge check` finds on the brokers: sinks, topology, and what workers need of both sides.

Bridge and workers may have accounts of their own. Where these settings give both the same, it is perhaps the account of
one of them, and lacks nothing: so what only the other one needs is a warning then, as long as one of them has all that
it needs.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from bridge.brokers.contract import Declaration, InspectableQueue, InspectableSink, Queue, Sink, Subscription
from bridge.brokers.registry import broker_of
from bridge.commands.finding import Finding, failure, warning
from bridge.commands.topology import require_complete
from bridge.errors import PgbridgeError, PrivilegeError
from bridge.settings import Process, Settings, SinkSettings
from bridge.settings.installed import points

_NAMED: Final = 3
"""Most things of one kind that are listed by their names, where nothing is wrong with them."""

Subscriptions = Mapping[str, tuple[str, Subscription]]
"""By worker, its sink's name and what it wants there."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A finding, and what decides what it is worth."""

    finding: Finding
    process: Process
    sink: SinkSettings
    denied: bool = False
    """Whether the broker refuses a permission."""


def subscriptions(settings: Settings) -> Subscriptions:
    """What the workers of these settings want. Raises SettingsError."""
    found: dict[str, tuple[str, Subscription]] = {}
    # The bridge never imports the workers, so what they want comes through an entry point.
    for point in points("pgbridge.subscriptions"):
        found |= point.load()(settings)
    return found


async def of_sinks(settings: Settings) -> list[Judged]:
    """Whether each sink can be published to."""
    found = []
    for name, sink in settings.sinks.items():
        topics = [route.topic for route in settings.routes if route.sink == name]
        found.append(await _judged(f"sink {name}", "bridge", sink, _looked_at(sink, topics)))
    return found


async def _judged(subject: str, process: Process, sink: SinkSettings, look: Awaitable[str]) -> Judged:
    try:
        return Judged(Finding(subject, ok=True, text=await look), process, sink)
    except PgbridgeError as error:
        return Judged(failure(subject, error), process, sink, denied=isinstance(error, PrivilegeError))


async def _looked_at(settings: SinkSettings, topics: Sequence[str]) -> str:
    sink = broker_of(settings).sink(settings)
    said = await sink.inspect(topics) if isinstance(sink, InspectableSink) else await _opened(sink)
    return "; ".join([f"{settings.type}, answers", *said])


async def _opened(port: Sink | Queue) -> Sequence[str]:
    try:
        await port.open()
    finally:
        await port.close()
    return ()


async def of_topology(
    settings: Settings, workers: Settings, wanted: Subscriptions, processes: Sequence[Process]
) -> Finding:
    """Whether the brokers have what is needed, as far as these accounts may look."""
    owners: list[tuple[str, Sink | Queue]] = []
    declared: list[tuple[str, Sequence[Declaration]]] = []
    unseen = []
    try:
        for name, sink in settings.sinks.items() if "bridge" in processes else ():
            owners.append((f"sink {name}", broker_of(sink).sink(sink)))
        for worker, (sink_name, subscription) in wanted.items():
            sink = workers.sinks[sink_name]
            owners.append((f"worker {worker}", broker_of(sink).queue(sink, subscription)))
        for owner, port in owners:
            try:
                declared.append((owner, await port.topology(apply=False)))
            except PrivilegeError:
                unseen.append(owner)  # its own line says why
        require_complete(declared)
    except PgbridgeError as error:
        return failure("topology", error)
    text = "complete"
    if assumed := [one for _, found in declared for one in found if one.assumed]:
        text += (
            f"; assumed, since the broker does not say, or not to this account: {_listed(assumed)}. Where messages do "
            "not arrive: `pgbridge topology --apply`, which changes nothing that is as it should be"
        )
    if unseen:
        return warning("topology", f"{text}. Not seen, since this account may not look: {', '.join(unseen)}")
    return Finding("topology", ok=True, text=text)


def _listed(found: Sequence[Declaration]) -> str:
    """The first few of each kind by their names."""
    parts = []
    for kind in dict.fromkeys(one.kind for one in found):
        names = list(dict.fromkeys(one.name for one in found if one.kind == kind))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        parts.append(f"{kind} {', '.join(names[:_NAMED])}{more}")
    return "; ".join(parts)


async def of_workers(settings: Settings, wanted: Subscriptions) -> list[Judged]:
    """Whether each worker could start: its handler and its database, at which the workers look, then its queue."""
    looks: dict[str, Callable[[], Awaitable[str]]] = {}
    for point in points("pgbridge.checks"):
        looks |= point.load()(settings)
    found = []
    for worker, (sink_name, subscription) in wanted.items():
        sink, subject = settings.sinks[sink_name], f"worker {worker}"
        own = await _judged(subject, "workers", sink, looks[subject]())
        if not own.finding.ok:
            found.append(replace(own, denied=False))  # by the database, or by the settings
            continue
        queue = await _judged(subject, "workers", sink, _queue_looked_at(sink, subscription))
        if queue.finding.ok:
            text = "; ".join(filter(None, (own.finding.text, queue.finding.text)))
            queue = replace(queue, finding=replace(queue.finding, text=text))
        found.append(queue)
    return found


async def _queue_looked_at(settings: SinkSettings, subscription: Subscription) -> str:
    queue = broker_of(settings).queue(settings, subscription)
    return "; ".join(await queue.inspect() if isinstance(queue, InspectableQueue) else await _opened(queue))


def weighed(found: Sequence[Judged]) -> list[Finding]:
    """The findings, where a permission that only the other kind of process needs is a warning."""
    return [_weighed(each, found) for each in found]


def _weighed(judged: Judged, all_of_them: Sequence[Judged]) -> Finding:
    others = [each for each in all_of_them if each.process != judged.process and each.sink == judged.sink]
    if not judged.denied or not others or not all(each.finding.ok for each in others):
        return judged.finding
    has, lacks = ("workers need", "bridge") if judged.process == "bridge" else ("bridge needs", "workers")
    return warning(
        judged.finding.subject,
        f"{judged.finding.text}. All that the {has} this account may do: where the {lacks} "
        f"{'has' if lacks == 'bridge' else 'have'} another one, look with that (`pgbridge check --for {lacks}`)",
    )
