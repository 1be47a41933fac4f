"""`/metrics` for Prometheus and `/health` for whoever restarts or balances, over HTTP, in a thread of its own."""

import errno
import json
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from threading import Semaphore, Thread
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from bridge.errors import PgbridgeError, SettingsError, UnavailableError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_CONNECTIONS: Final = 16
"""Served at once; one more is closed."""
_PATIENCE: Final = 5.0
"""Seconds in which a connection must say something, or take what it is told."""
_LOOK: Final = 1.0
"""Seconds in which whoever has a port must answer."""
_LARGEST: Final = 1_000_000
"""Bytes of an answer that are read."""
_PASSES: Final = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
"""Another process still has the port, or a floating address is not on this machine yet."""


@dataclass(frozen=True, slots=True)
class Health:
    """How a process is; what `/health` answers, as JSON."""

    name: str
    role: str
    """A word or two for a person: ``starting``, ``standby``, ``leading``, ``running`` (where nobody need lead),
    ``waiting for PostgreSQL``, ``stopping``."""
    problems: tuple[str, ...] = ()
    """What does not work, one sentence each; none means healthy."""
    paused: tuple[str, ...] = ()
    """What a person has paused, one sentence each; that is no failure."""


@contextmanager
def serving(
    key: str, listen: str | None, health: Callable[[], Health], registry: CollectorRegistry = REGISTRY
) -> Iterator[None]:
    """Serves while the body runs; nothing when `listen` (``host:port``) is None. `health` is called in other threads.
    The metrics are those of `registry`.

    `key` names the setting, for its errors.

    ``/health`` answers 200 when there are no problems, 503 otherwise. Raises SettingsError when the address cannot be
    listened at, and UnavailableError when it may be later.
    """
    if listen is None:
        yield
        return
    host, _, port = listen.rpartition(":")
    try:
        server = make_server(
            host.strip("[]"),
            int(port),
            _application(health, registry),
            server_class=_V6Server if host.startswith("[") else _Server,
            handler_class=_Silent,
        )
    except OSError as error:
        raise cannot_listen(key, listen, error) from error
    thread = Thread(target=server.serve_forever, name="health", daemon=True)
    thread.start()
    try:
        yield
    finally:
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


def _application(
    health: Callable[[], Health], registry: CollectorRegistry
) -> Callable[["WSGIEnvironment", "StartResponse"], Iterable[bytes]]:
    metrics = make_wsgi_app(registry)

    def application(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            answer: Iterable[bytes] = metrics(environ, start_response)
            return answer
        if path != "/health":
            return _json(start_response, "404 Not Found", {"paths": ["/health", "/metrics"]})
        now = health()
        body = {
            "status": "failing" if now.problems else "ok",
            "name": now.name,
            "role": now.role,
            "problems": now.problems,
            "paused": now.paused,
        }
        return _json(start_response, "503 Service Unavailable" if now.problems else "200 OK", body)

    return application


def _json(start_response: "StartResponse", status: str, body: dict[str, Any]) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "application/json"), ("Cache-Control", "no-store")])
    return [json.dumps(body).encode() + b"\n"]


class _Server(ThreadingWSGIServer):
    """One with a thread for each connection, and few of them: file descriptors are for the broker and PostgreSQL."""

    request_queue_size = 64

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._places = Semaphore(_CONNECTIONS)
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()


class _V6Server(_Server):
    address_family = socket.AF_INET6


class _Silent(WSGIRequestHandler):
    """Without a log line for every look."""

    timeout = _PATIENCE

    def log_message(self, format: str, *args: Any) -> None:
        pass
