"""Many callers, one request: while one is on its way, what is asked meanwhile gathers for the next."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Final, Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")

_LONGEST_WAIT: Final = 0.004
"""Seconds that few questions wait for more."""


class Batcher(Generic[Q, A]):
    """Sends a request at once when none is on its way, so one caller alone waits for nobody."""

    def __init__(
        self,
        ask_together: Callable[[Sequence[Q]], Awaitable[Sequence[A]]],
        most: int,
        *,
        enough: Callable[[], int] = lambda: 1,
    ) -> None:
        """`ask_together` answers `most` questions at most, in their order; what it raises goes to each caller. Fewer
        than `enough` wait for company, for as long as the last request took, and 4 ms at most."""
        self._ask_together = ask_together
        self._most = most
        self._enough = enough
        self._company = asyncio.Event()
        self._took = 0.0
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._asking: asyncio.Task[None] | None = None

    async def ask(self, question: Q) -> A:
        """The answer. The question of a caller that is cancelled is dropped, unless its request is on its way already.

        Raises what `ask_together` raises.
        """
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if len(self._waiting) >= self._enough():
            self._company.set()
        if self._asking is None:
            # It asks for many, so it is nobody's: neither in the trace of whoever came first nor in its log lines.
            self._asking = asyncio.create_task(self._ask_all(), context=Context())
        return await answer

    async def drain(self, limit: float) -> None:
        """Waits until nothing is on its way, `limit` seconds at most."""
        if self._asking is not None:
            await asyncio.wait([self._asking], timeout=limit)

    async def _ask_all(self) -> None:
        try:
            while self._waiting:
                if len(self._waiting) < self._enough():
                    await self._wait_for_company()
                batch = [each for each in self._waiting[: self._most] if not each[1].done()]
                del self._waiting[: self._most]
                if batch:
                    await self._request(batch)
        finally:
            self._asking = None
            for _, answer in self._waiting:
                answer.cancel()
            self._waiting.clear()

    async def _wait_for_company(self) -> None:
        self._company.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(self._took, _LONGEST_WAIT)):
                await self._company.wait()

    async def _request(self, batch: Sequence[tuple[Q, "asyncio.Future[A]"]]) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            answers = await self._ask_together([question for question, _ in batch])
        except asyncio.CancelledError:
            for _, answer in batch:
                answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - it goes to whoever asked
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
        else:
            for (_, answer), given in zip(batch, answers, strict=True):
                if not answer.done():
                    answer.set_result(given)
        self._took = loop.time() - begun
