"""Requests that are shared by whoever asks while another is on its way."""

import asyncio
from collections.abc import Sequence

import pytest

from bridge.process.batching import Batcher


class Server:
    """Doubles numbers once it is let; a negative one is an error for all that came with it."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.open = asyncio.Event()

    async def double(self, numbers: Sequence[int]) -> Sequence[int]:
        self.asked.append(list(numbers))
        await self.open.wait()
        if min(numbers) < 0:
            raise ValueError("negative")
        return [2 * number for number in numbers]


async def begun(batcher: Batcher[int, int], *numbers: int) -> list[asyncio.Task[int]]:
    async def ask(number: int) -> int:
        return await batcher.ask(number)

    tasks = [asyncio.create_task(ask(number)) for number in numbers]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def test_one_alone_goes_at_once_and_what_comes_meanwhile_goes_together() -> None:
    server = Server()
    batcher = Batcher(server.double, 3)
    tasks = await begun(batcher, 1)
    assert server.asked == [[1]]
    tasks += await begun(batcher, 2, 3, 4, 5)
    server.open.set()
    assert await asyncio.gather(*tasks) == [2, 4, 6, 8, 10]
    assert server.asked == [[1], [2, 3, 4], [5]]


async def test_an_error_goes_to_those_who_asked_together_and_the_next_are_asked() -> None:
    server = Server()
    batcher = Batcher(server.double, 2)
    tasks = await begun(batcher, 1, -2, 3, 4)
    server.open.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers] == [ValueError, ValueError, int, int]


async def test_who_gives_up_while_waiting_is_not_asked_for() -> None:
    server = Server()
    batcher = Batcher(server.double, 1)
    tasks = await begun(batcher, 1)
    tasks += await begun(batcher, 2, 3)
    tasks[1].cancel()
    await asyncio.sleep(0)
    server.open.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert (answers[0], answers[2]) == (2, 6)
    assert isinstance(answers[1], asyncio.CancelledError)
    assert server.asked == [[1], [3]]


async def test_draining_waits_for_what_is_on_its_way() -> None:
    server = Server()
    batcher = Batcher(server.double, 10)
    await batcher.drain(1.0)
    (task,) = await begun(batcher, 1)
    asyncio.get_running_loop().call_later(0.01, server.open.set)
    await batcher.drain(10.0)
    assert task.done() or await asyncio.wait_for(task, 1) == 2


async def test_a_stop_while_asking_leaves_nobody_waiting() -> None:
    server = Server()
    batcher = Batcher(server.double, 1)
    tasks = await begun(batcher, 1, 2)
    asking = batcher._asking
    assert asking is not None
    asking.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers)
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_few_wait_for_company_until_there_are_enough() -> None:
    server = Server()
    server.open.set()
    enough = 1
    batcher = Batcher(server.double, 5, enough=lambda: enough)
    batcher._took = 60.0
    enough = 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bridge.process.batching._LONGEST_WAIT", 60.0)
        tasks = await begun(batcher, 1, 2)
        assert server.asked == []
        tasks += await begun(batcher, 3, 4)
        assert await asyncio.gather(*tasks) == [2, 4, 6, 8]
    assert server.asked == [[1, 2, 3, 4]]


async def test_few_go_without_company_after_a_moment() -> None:
    server = Server()
    server.open.set()
    batcher = Batcher(server.double, 5, enough=lambda: 3)
    for number in (1, 2):
        assert await asyncio.gather(*await begun(batcher, number)) == [2 * number]
    assert server.asked == [[1], [2]]
