"""`pgbridge console`: one process that serves the pages until it is asked to stop."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog
import uvicorn

from bridge.console.access import Access
from bridge.console.app import make_app
from bridge.console.database import Database
from bridge.console.parts import Parts
from bridge.console.reader import Reader
from bridge.process.health import cannot_listen
from bridge.process.systemd import notify, watchdog_for_ever
from bridge.process.tasks import background, one_error, stop_on_signals
from bridge.settings import Settings

log = structlog.get_logger()

_AT_ONCE: Final = 300
"""Connections; more are told to come back."""
_STOP_LIMIT: Final = 2
"""Seconds in which answers that are under way may end at a stop; streams end at once."""


async def run_until_signalled(settings: Settings, load_again: Callable[[], object]) -> None:
    """Serves until SIGTERM or SIGINT, or SIGHUP where `load_again` finds nothing wrong. Raises as `Console`."""
    console = Console(settings)
    await console.run(stop_on_signals("console", load_again))


class Console:
    """One process. A database that cannot be reached is shown on the pages, which is what they are for."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError where it would be open to a network, UsageError where there is nothing to show."""
        self._settings = settings
        self._access = Access(settings)
        self._database = Database(settings)
        self.reader = Reader(settings, self._database)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. Raises SettingsError, and UnavailableError where it cannot listen yet."""
        app = make_app(Parts(self._settings, self._database, self.reader), self._access, stop)
        server = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                http="h11",
                ws="none",
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_AT_ONCE,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=_STOP_LIMIT,
            )
        )
        try:
            with one_error(), _bound(self._settings.console.listen) as bound:
                async with background(watchdog_for_ever()):
                    serves = asyncio.create_task(server.serve(sockets=[bound]))
                    self._started()
                    stopped = asyncio.create_task(stop.wait())
                    await asyncio.wait([serves, stopped], return_when=asyncio.FIRST_COMPLETED)
                    server.should_exit = True
                    await serves
        finally:
            await self.reader.close()
            await self._database.close()
        log.info("console.stopped")

    def _started(self) -> None:
        log.info("console.started", url=self._settings.console.url or f"http://{self._settings.console.listen}")
        if self._access.is_plain:
            log.warning(
                "console.plain_text",
                hint="tokens and pages cross the network without TLS: put a proxy in front, and name it in console.url",
            )
        notify("READY=1")


class _Server(uvicorn.Server):
    """Without signal handlers of its own: the process has its."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def _bound(address: str) -> Iterator[socket.socket]:
    """A socket that listens there. Raises SettingsError, or UnavailableError where it may be possible later."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, place = found[0]
        bound = socket.create_server(place[:2], family=family, backlog=_AT_ONCE)
    except OSError as error:
        raise cannot_listen("console.listen", address, error) from error
    with bound:
        yield bound
