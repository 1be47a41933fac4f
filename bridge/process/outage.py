"""An outage of one server, from its loss to its return: what is logged, what `/health` says, how long to wait.

    <server>.lost       it does not answer
    <server>.refusing   it answers, and says no: a refused login, a missing privilege, a full queue
    <server>.restored   it works again, after `seconds`

The first line comes when the outage begins, and another one whenever the *type* of the error changes, since a server
that was down and now refuses the login is a matter for a person. What only repeats is not logged again.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

import structlog
from tenacity import AsyncRetrying, RetryCallState
from tenacity.wait import wait_base

from bridge.errors import PgbridgeError, ReadOnlyServerError, UnavailableError
from bridge.process.tasks import raise_if_cancelled

log = structlog.get_logger()

P = ParamSpec("P")
T = TypeVar("T")


class Outage:
    """The outages of one server, one after the other; between them there is none. All times are in seconds."""

    def __init__(self, server: str, backoff: wait_base, **fields: str) -> None:
        """`server` is the first word of the log's actions, `fields` say which server of that kind it is.

        `backoff` is one of tenacity's wait strategies.
        """
        self._server = server
        self._backoff = backoff
        self._fields = fields
        self._since: float | None = None
        self._error: BaseException | None = None
        self.failures = 0
        """Failed attempts since the last success; the delays of `wait` grow with it."""

    def lost(self, error: BaseException) -> None:
        """An attempt failed. Logs the begin of an outage, and each change of the error's type."""
        if self._since is None:
            self._since = time.monotonic()
        if type(error) is not type(self._error):
            log.warning(f"{self._server}.{_kind(error)}", **self._fields, reason=str(error))
        self._error = error

    def restored(self) -> None:
        """The server works. Logs the end of an outage, if there was one."""
        self.failures = 0
        if self._since is not None:
            log.info(f"{self._server}.restored", **self._fields, seconds=round(time.monotonic() - self._since, 3))
        self._since = self._error = None

    def dismiss(self) -> None:
        """Nobody tries any more, so whether the server works is not known; logs nothing."""
        self.failures = 0
        self._since = self._error = None

    @property
    def lasts(self) -> bool:
        """Whether there is an outage now."""
        return self._since is not None

    @property
    def seconds(self) -> float:
        """For how long the outage lasts; 0 where there is none."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def reason(self) -> str | None:
        """What is wrong, in words; None when nothing is. Any thread may ask."""
        error = self._error
        return None if error is None else f"{_kind(error)}: {error}"

    @property
    def problem(self) -> str | None:
        """For `/health`: what is lost, for how long, and the last reason; None when nothing is. Any thread may ask."""
        since, error = self._since, self._error
        if since is None or error is None:
            return None
        which = " ".join((self._server, *self._fields.values()))
        return f"{which}: {_kind(error)} for {time.monotonic() - since:.0f} s: {error}"

    def delay(self, failures: int) -> float:
        """How long to wait after so many failures in a row."""
        state = RetryCallState(AsyncRetrying(), None, (), {})
        state.attempt_number = failures
        return float(self._backoff(state))

    async def wait(self, stop: asyncio.Event | None = None) -> None:
        """Counts a failure, and waits before the next attempt; `stop` cuts the wait short."""
        raise_if_cancelled()
        self.failures += 1
        seconds = self.delay(self.failures)
        if stop is None:
            await asyncio.sleep(seconds)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await stop.wait()

    async def outlast(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Makes the call until the server answers it, whatever PgbridgeError it raises before.

        Several calls may share an outage: each counts its failures for itself.
        """
        failures = 0
        while True:
            try:
                result = await call(*args, **kwargs)
            except PgbridgeError as error:
                self.lost(error)
                failures += 1
                await asyncio.sleep(self.delay(failures))
            else:
                self.restored()
                return result


def _kind(error: BaseException) -> str:
    """Whether the server says nothing, or no. A standby answers, and takes no writes."""
    silent = isinstance(error, UnavailableError) and not isinstance(error, ReadOnlyServerError)
    return "lost" if silent else "refusing"
