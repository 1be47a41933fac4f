"""What pages of the console keep of what they asked for."""

import asyncio

from bridge.console.recent import Recent


async def test_an_answer_that_was_being_asked_for_when_somebody_acted_is_not_kept() -> None:
    recent = Recent()
    gate = asyncio.Event()

    async def before() -> str:
        await gate.wait()
        return "before"

    async def after() -> str:
        return "after"

    looking = asyncio.create_task(recent.get("state", 60.0, before))
    await asyncio.sleep(0)  # it asks
    recent.forget()
    assert await recent.get("state", 60.0, after) == "after"
    gate.set()
    assert await looking == "before"  # for who asked before the act
    assert await recent.get("state", 60.0, before) == "after"


async def test_what_was_answered_before_somebody_acted_is_asked_again() -> None:
    recent = Recent()
    answers = iter("ab")

    async def ask() -> str:
        return next(answers)

    assert [await recent.get("state", 60.0, ask) for _ in range(2)] == ["a", "a"]
    recent.forget()
    assert await recent.get("state", 60.0, ask) == "b"
