"""ASGI applications on sockets of ours: uvicorn without signals, logs and headers of its own."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from bridge.process.health import cannot_listen


@contextmanager
def bound(key: str, address: str, *, backlog: int) -> Iterator[socket.socket]:
    """A socket that listens at `host:port`, as the setting `key` says.

    Raises SettingsError, or UnavailableError where it may be possible later.
    """
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, place = found[0]
        listening = socket.create_server(place[:2], family=family, backlog=backlog)
    except OSError as error:
        raise cannot_listen(key, address, error) from error
    with listening:
        yield listening


class AsgiServer(uvicorn.Server):
    """Serves one application."""

    def __init__(self, app: Any, *, at_once: int, stop_limit: int, keep_alive: int = 5) -> None:
        """`at_once`: connections; more are told to come back. `stop_limit`: seconds in which answers that are under way
        may end at a stop. `keep_alive`: seconds for which a connection may be idle."""
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                http="h11",
                ws="none",
                server_header=False,
                proxy_headers=False,
                limit_concurrency=at_once,
                timeout_keep_alive=keep_alive,
                timeout_graceful_shutdown=stop_limit,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's."""
        yield

    async def serve_until(
        self, stop: asyncio.Event, listening: socket.socket, *, stopping: Callable[[], None] | None = None
    ) -> None:
        """Until `stop` is set, of which `stopping` hears before answers that are under way have ended."""
        serves = asyncio.create_task(self.serve(sockets=[listening]))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([serves, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if stopping is not None:
            stopping()
        self.should_exit = True
        await serves
