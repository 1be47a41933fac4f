"""`pgbridge console`: one process that serves the pages until it is asked to stop."""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from bridge.console.access import Access
from bridge.console.app import make_app
from bridge.console.database import Database
from bridge.console.dead.boxes import DeadBoxes
from bridge.console.parts import Parts
from bridge.console.reader import Reader
from bridge.process.asgi import AsgiServer, bound
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
        self.parts = Parts(settings, self._database, self.reader, DeadBoxes(settings, self._database))

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. Raises SettingsError, and UnavailableError where it cannot listen yet."""
        app = make_app(self.parts, self._access, stop)
        server = AsgiServer(app, at_once=_AT_ONCE, stop_limit=_STOP_LIMIT, keep_alive=15)
        try:
            with one_error(), bound("console.listen", self._settings.console.listen, backlog=_AT_ONCE) as listening:
                async with background(watchdog_for_ever()):
                    self._started()
                    await server.serve_until(stop, listening)
        finally:
            await self.parts.work.close()
            await self.parts.dead.close()
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
