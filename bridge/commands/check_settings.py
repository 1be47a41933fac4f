"""What `pgbridge check` finds in the settings and on this machine, before it asks any server."""

import errno
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Final, NamedTuple

from bridge.brokers.contract import Subscription
from bridge.commands.finding import Finding, failure, warning
from bridge.errors import SettingsError
from bridge.event import matches, overlap
from bridge.process.addresses import is_here
from bridge.process.health import answers_as
from bridge.process.traces import refusal
from bridge.settings import Process, Settings
from bridge.settings.secrecy import open_to_all

_OPEN_CHANNEL: Final = (
    "any role that may connect to this database may NOTIFY it, and so make events of this topic; "
    "bridge.notify() in its place takes only members of bridge_emitter"
)

_WILDCARDS: Final = ("0.0.0.0", "[::]")  # noqa: S104 - nothing is bound here
"""Hosts that stand for all of this machine's addresses."""

_ADDRESS: Final = re.compile(r"\S+:\d{1,5}")


def of_files(config: Path, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Secrets that every user of this machine may read."""
    for key, file in open_to_all(config, environ):
        yield warning(
            "files",
            f"{key}: {file} holds a secret, and its mode lets everybody read it. Run: chmod o-r {file}",
        )


def of_routes(settings: Settings) -> Finding:
    """Whether these settings can carry anything."""
    if not settings.sinks:
        return failure("routes", SettingsError("sinks: there is none, so no event goes anywhere. Add [sinks.<name>]"))
    if not settings.routes:
        return failure("routes", SettingsError(f"routes: there is none, so every event {_unrouted(settings)}. {_ADD}"))
    led_to = {route.sink for route in settings.routes}
    return Finding("routes", ok=True, text=f"{len(settings.routes)}, to {', '.join(sorted(led_to))}")


_ADD: Final = "Add [[routes]] with topic and sink"


def _unrouted(settings: Settings) -> str:
    return "is dropped" if settings.unrouted == "drop" else "becomes a dead letter (no_route)"


def of_unled_sinks(settings: Settings) -> Iterator[Finding]:
    """Sinks to which no route leads."""
    led_to = {route.sink for route in settings.routes}
    for name in settings.sinks if settings.routes else ():
        if name not in led_to:
            yield warning(
                "routes",
                f"sinks.{name}: no route leads to it, so this bridge publishes nothing there. {_ADD} = {name!r}, or "
                "remove the sink, if no worker reads what other bridges publish to it",
            )


def of_servers(settings: Settings) -> Iterator[Finding]:
    """Brokers on other machines that are spoken to in plain text."""
    for sink in settings.sinks.values():
        for host, field, mend in sink.plain_text:
            if not is_here(host):
                yield warning(
                    "tls",
                    f"{sink.key(field)}: nothing is encrypted on the way to {host}: whoever is in between can read the "
                    f"password, and read and change events. {mend}",
                )


def of_traces(settings: Settings) -> Iterator[Finding]:
    """Where spans are recorded: whether anybody takes them."""
    if not settings.observe.traces:
        return
    try:
        problem = refusal()
    except SettingsError as error:
        yield failure("traces", error)
        return
    if problem is None:
        yield Finding("traces", ok=True, text="the collector takes spans")
    else:
        yield warning(
            "traces",
            f"observe.traces: {problem}. Start it, or correct OTEL_EXPORTER_OTLP_ENDPOINT, which is this shell's here",
        )


def of_channels(settings: Settings) -> Iterator[Finding]:
    """What may be said about each channel that is listened to."""
    for channel in settings.channels.listen if settings.channels else ():
        yield warning(f"channel {channel}", _OPEN_CHANNEL)
        if settings.routes and not any(matches(route.topic, channel) for route in settings.routes):
            yield warning(
                f"channel {channel}",
                f"channels.listen: no route takes the topic {channel!r}, so what is heard {_unrouted(settings)}. "
                f"{_ADD}, or do not listen to it",
            )


def of_subscriptions(settings: Settings, wanted: Mapping[str, tuple[str, Subscription]]) -> Iterator[Finding]:
    """Workers to whose sink no route brings what they want."""
    for worker, (sink, subscription) in wanted.items():
        brought = [route.topic for route in settings.routes if route.sink == sink]
        lacking = [topic for topic in subscription.topics if not any(overlap(topic, each) for each in brought)]
        if settings.routes and lacking:
            yield warning(
                "routes",
                f"workers.{worker}.subscribe: no route brings {', '.join(lacking)} to the sink {sink!r}, so it gets "
                "none of this bridge. Add a route, or correct the topics",
            )


def of_ports(settings: Settings, processes: Sequence[Process]) -> Iterator[Finding]:
    """Addresses at which two processes of these settings would listen, or something listens already."""
    listens = list(_listens(settings, processes))
    for one, other in combinations(listens, 2):
        if _collide(one.address, other.address):
            both = one.address if one.address == other.address else f"{one.address} and {other.address}"
            yield failure(
                "ports",
                SettingsError(
                    f"{one.key} and {other.key} are both {both}: on one machine the second process cannot start. Give "
                    "each a port of its own"
                ),
            )
    for each in listens:
        if (problem := _problem(each)) is not None:
            yield warning("ports", f"{each.key}: {each.address} {problem}")


class _Listens(NamedTuple):
    """Where a process would listen."""

    key: str
    address: str
    name: str | None
    """What `/health` gives there for a name, once it runs; None for an address without."""


def _listens(settings: Settings, processes: Sequence[Process]) -> Iterator[_Listens]:
    if "bridge" in processes and settings.observe.listen is not None:
        yield _Listens("observe.listen", settings.observe.listen, settings.name)
    for name, worker in settings.workers.items() if "workers" in processes else ():
        if worker.listen is not None:
            yield _Listens(f"workers.{name}.listen", worker.listen, name)
        yield from _of_options(f"workers.{name}.options.listen", worker.options.get("listen"), name)


def _of_options(key: str, value: Any, name: str) -> Iterator[_Listens]:
    """The address of a worker's other process, as `deliver` has one; or those that `listen` has in a table."""
    if isinstance(value, dict):
        for field, inner in value.items():
            yield from _of_options(f"{key}.{field}", inner, name)
    elif isinstance(value, str) and _ADDRESS.fullmatch(value):
        yield _Listens(key, value, None if key.endswith(".address") else name)


def _collide(one: str, other: str) -> bool:
    (host, _, port), (second, _, second_port) = one.rpartition(":"), other.rpartition(":")
    return port == second_port and (host == second or host in _WILDCARDS or second in _WILDCARDS)


def _problem(listens: _Listens) -> str | None:
    """Why its process could not listen there now; None where it could, or does."""
    host, _, port = listens.address.rpartition(":")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            # As the servers do it: a port of a connection that has just ended is free.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(place)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return f"cannot be listened at here: {error.strerror or error}. Choose another address"
        if listens.name is None:
            return "is in use, as it should be while its process runs here. If it does not, choose another port"
        if answers_as(listens.address) != listens.name:
            return (
                f"is in use, and no process there answers /health as {listens.name!r}. Stop what has it, or choose "
                "another port"
            )
    return None
