"""For how long nobody listened to plain notifications: the one thing that a bridge cannot make up for."""

import time

import structlog

from bridge.process.metrics import DEAF_SECONDS

log = structlog.get_logger()


class GapWatch:
    """Measures for how long nobody listened, and says so: what was sent meanwhile is gone."""

    def __init__(self) -> None:
        self._hears = False
        self._deaf_since: float | None = None

    def lost(self, reason: str | None) -> None:
        """The listening connection went away; None: with the session of the lead, which tells the reason."""
        if self._hears:
            self._hears = False
            self._deaf_since = time.monotonic()
            if reason is not None:
                log.warning("channels.deaf", reason=reason)

    def restored(self) -> None:
        """It hears."""
        self._hears = True
        log.info("channels.listening")
        if self._deaf_since is not None:
            gap = time.monotonic() - self._deaf_since
            self._deaf_since = None
            DEAF_SECONDS.inc(gap)
            log.error(
                "channels.gap",
                seconds=round(gap, 3),
                hint="notifications sent in this time are lost; bridge.notify() would have kept them",
            )
