"""What a process tells over HTTP, in threads of its own.

/livez    whether its event loop turns: for whoever restarts what hangs
/readyz   whether it does its work, or stands by for it: for whoever waits for that, as in a rolling upgrade
/health   whether all is well, and what is not: for people and alerts
/metrics  for Prometheus
"""

import asyncio
import errno
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from threading import Thread
from typing import Any, Final

from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from bridge.errors import PgbridgeError, SettingsError, UnavailableError
from bridge.process.bounded_server import Answer, BoundedServer

STANDS_STILL: Final = 10.0
"""Seconds without a turn of the event loop after which `/livez` says so."""
_BEAT: Final = 1.0
"""Seconds between two looks at the clock by the event loop."""
_LOOK: Final = 1.0
"""Seconds in which whoever has a port must answer."""
_LARGEST: Final = 1_000_000
"""Bytes of an answer that are read."""
_PASSES: Final = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
"""Another process still has the port, or a floating address is not on this machine yet."""


@dataclass(frozen=True, slots=True)
class Health:
    """How a process is; what `/health` and `/readyz` answer, as JSON."""

    name: str
    role: str
    """A word or two for a person: ``starting``, ``standby``, ``leading``, ``working``, ``waiting for PostgreSQL``,
    ``stopping``."""
    problems: tuple[str, ...] = ()
    """What does not work, one sentence each; none means healthy."""
    paused: tuple[str, ...] = ()
    """What a person has paused, one sentence each; that is no failure."""
    unready: str | None = None
    """Why it does not do its work now, nor stands by for it; None while it does, also where a person has paused it."""


@contextmanager
def serving(key: str, listen: str | None, health: Callable[[], Health], metrics: Collector) -> Iterator[None]:
    """Serves while the body runs; nothing when `listen` (``host:port``) is None. To be called in the event loop that
    `/livez` tells of; `health` and `metrics` are asked in other threads.

    `key` names the setting, for its errors.

    Raises SettingsError when the address cannot be listened at, and UnavailableError when it may be later.
    """
    if listen is None:
        yield
        return
    host, _, port = listen.rpartition(":")
    pulse = _Pulse()
    try:
        server = BoundedServer(host, int(port), _Pages(pulse, health, metrics).answer)
    except OSError as error:
        raise cannot_listen(key, listen, error) from error
    thread = Thread(target=server.serve_forever, name="health", daemon=True)
    thread.start()
    try:
        pulse.begin()
        yield
    finally:
        pulse.end()
        server.shutdown()
        server.server_close()
        thread.join()


def answers_as(listen: str) -> str | None:
    """The name of the process of ours that serves at an address; None where nothing of ours does. Blocks, where
    something else is there, for a second at most."""
    host, _, port = listen.rpartition(":")
    connection = HTTPConnection(host.strip("[]"), int(port), timeout=_LOOK)
    try:
        connection.request("GET", "/health")
        name = json.loads(connection.getresponse().read(_LARGEST))["name"]
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return None
    finally:
        connection.close()
    return str(name)


def cannot_listen(key: str, listen: str, error: OSError) -> PgbridgeError:
    """Our error where the address that `key` sets cannot be listened at; UnavailableError where it may be later."""
    kind = UnavailableError if error.errno in _PASSES else SettingsError
    return kind(f"{key}: cannot listen at {listen}: {error.strerror or error}")


class _Pulse:
    """When the event loop turned last."""

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Beats, in the event loop that runs, until `end`."""
        self._at = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(_BEAT, self.begin)

    def end(self) -> None:
        """Beats no more."""
        if self._timer is not None:
            self._timer.cancel()

    @property
    def seconds(self) -> float:
        """Since the last beat. Any thread may ask."""
        return time.monotonic() - self._at


class _Pages:
    """What is asked, and the answers."""

    def __init__(self, pulse: _Pulse, health: Callable[[], Health], metrics: Collector) -> None:
        self._pulse = pulse
        self._health = health
        self._metrics = metrics
        self._pages = {
            "/metrics": self._figures,
            "/livez": self._live,
            "/readyz": self._ready,
            "/health": self._well,
        }

    def answer(self, path: str, accept: str) -> Answer:
        """See `BoundedServer`."""
        page = self._pages.get(path)
        return _json(404, {"paths": sorted(self._pages)}) if page is None else page(accept)

    def _figures(self, accept: str) -> Answer:
        encode, content_type = choose_encoder(accept)
        return Answer(200, content_type, encode(self._metrics))

    def _live(self, _: str) -> Answer:
        seconds = self._pulse.seconds
        lives = seconds < STANDS_STILL
        return _json(200 if lives else 503, {"status": "alive" if lives else "stuck", "seconds": round(seconds, 1)})

    def _ready(self, _: str) -> Answer:
        now = self._health()
        told = {"name": now.name, "role": now.role, "reason": now.unready}
        return _json(503, {"status": "not ready", **told}) if now.unready else _json(200, {"status": "ready", **told})

    def _well(self, _: str) -> Answer:
        now = self._health()
        body = {
            "status": "failing" if now.problems else "ok",
            "name": now.name,
            "role": now.role,
            "problems": now.problems,
            "paused": now.paused,
        }
        return _json(503 if now.problems else 200, body)


def _json(status: int, body: dict[str, Any]) -> Answer:
    return Answer(status, "application/json", json.dumps(body).encode() + b"\n")
