"""Many callers, one request: while one is on its way, what is asked meanwhile gathers for the next."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Gathering(Generic[Q, A]):
    """Asks at once when nothing is on its way, so one call alone waits for nobody."""

    def __init__(self, ask: Callable[[Sequence[Q]], Awaitable[Sequence[A]]], most: int) -> None:
        """`ask` answers in the order of the questions, `most` at a time; what it raises, all of them get."""
        self._ask = ask
        self._most = most
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._asking: asyncio.Task[None] | None = None

    async def __call__(self, question: Q) -> A:
        """The answer. One whose caller was cancelled is asked all the same, unless it still waits."""
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask_all())
        return await answer

    async def drain(self, limit: float) -> None:
        """Waits until nothing is on its way, `limit` seconds at most."""
        if self._asking is not None:
            await asyncio.wait([self._asking], timeout=limit)

    async def _ask_all(self) -> None:
        try:
            while self._waiting:
                batch = [each for each in self._waiting[: self._most] if not each[1].done()]
                del self._waiting[: self._most]
                if batch:
                    await self._ask_together(batch)
        finally:
            self._asking = None
            for _, answer in self._waiting:
                answer.cancel()
            self._waiting.clear()

    async def _ask_together(self, batch: Sequence[tuple[Q, "asyncio.Future[A]"]]) -> None:
        try:
            answers = await self._ask([question for question, _ in batch])
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
