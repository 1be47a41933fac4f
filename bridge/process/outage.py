"""An outage of a server: waiting it out, and telling its begin and its length once each."""

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from bridge.errors import PgbridgeError

_log = structlog.get_logger("workers")

T = TypeVar("T")


class Patience:
    """Repeats calls to one server for ever, with exponential backoff and jitter, while it does not answer."""

    def __init__(self, server: str, worker: str, errors: type[PgbridgeError], longest: float = 10.0) -> None:
        """`server` is the first word of the actions, ``<server>.lost`` and ``<server>.restored``; `longest` the
        longest delay in seconds; `errors` what is waited out."""
        self._server = server
        self._worker = worker
        self._errors = errors
        self._longest = longest
        self._lost_at: float | None = None

    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T:
        """The call's result, once it has one. Other errors pass through."""
        try:
            result = await call()
        except self._errors as error:
            self.lost(error)
            result = await self._again(call)
        self._restored()
        return result

    async def _again(self, call: Callable[[], Awaitable[T]]) -> T:
        # One object a call: tenacity keeps the state of its iteration in it.
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(self._errors),
            wait=wait_random_exponential(multiplier=0.1, max=self._longest),
        )

        async def again() -> T:
            # tenacity awaits only what is an async function by declaration.
            return await call()

        return await retrying(again)

    @property
    def problem(self) -> str | None:
        """What `/health` says of the server while it is gone; None while it is not."""
        if (lost_at := self._lost_at) is None:
            return None
        return f"the {self._server} is lost for {time.monotonic() - lost_at:.0f} s"

    def lost(self, error: BaseException) -> None:
        """Says that the server is gone, unless that has been said."""
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            _log.warning(f"{self._server}.lost", worker=self._worker, error=str(error))

    def _restored(self) -> None:
        if self._lost_at is not None:
            seconds = round(time.monotonic() - self._lost_at, 3)
            self._lost_at = None
            _log.info(f"{self._server}.restored", worker=self._worker, outage_s=seconds)
