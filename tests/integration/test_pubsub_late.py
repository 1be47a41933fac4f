"""A slow, frozen or silent Pub/Sub, and a bridge that stood still itself: late is not lost.

And what fails stays in order: no later message of a key is taken before an earlier one, whatever becomes of that one.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from bridge.brokers.contract import CONFIRMED, NotSent, Outcome, Refused, Unknown
from bridge.brokers.pubsub.sink import PubSubSink
from bridge.event import Event
from tests.support.events import make_event
from tests.support.pubsub import PubSubReader, pubsub_settings
from tests.support.scripted_pubsub import ScriptedPubSub
from tests.support.servers import PubSubEmulator
from tests.support.until import LIMIT, until


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedPubSub]:
    async with ScriptedPubSub() as server:
        yield server


@pytest.fixture
def emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PubSubEmulator]:
    # One of our own, since it is frozen.
    monkeypatch.delenv("PUBSUB_EMULATOR_HOST", raising=False)
    with PubSubEmulator(tmp_path) as server:
        yield server


async def opened(address: str, topic: str = "events", **changes: Any) -> PubSubSink:
    sink = PubSubSink(pubsub_settings(address, topic, **{"publish_timeout": 1.0} | changes))
    await sink.open()
    return sink


def numbered(count: int, key: str | None = "k") -> list[Event]:
    return [make_event(key=key, payload=b"%d" % number) for number in range(count)]


def kinds(outcomes: Sequence[Outcome]) -> list[str]:
    return [type(outcome).__name__ for outcome in outcomes]


def numbers(messages: Sequence[Any]) -> list[int]:
    return [int(message.data) for message in messages]


async def test_an_emulator_that_is_frozen_most_of_the_time_gets_every_event_once(
    emulator: PubSubEmulator, unique: str
) -> None:
    sink = PubSubSink(pubsub_settings(emulator.address, unique, publish_timeout=2.5, batch_messages=10))
    await sink.topology(apply=True)
    reader = PubSubReader(emulator.address, unique)
    await reader.subscribe()
    await sink.open()
    events = [make_event(number) for number in range(2000)]
    calls = [asyncio.create_task(sink.publish(events[n : n + 200])) for n in range(0, 2000, 200)]
    began = time.monotonic()
    while not all(call.done() for call in calls) or time.monotonic() - began < 6.0:
        await asyncio.to_thread(emulator.freeze)
        await asyncio.sleep(0.95)
        await asyncio.to_thread(emulator.thaw_for, 0.05)
    assert [kinds(await call) for call in calls] == [["Confirmed"] * 200] * 10
    assert sink.is_open
    assert len(await reader.drain(2000)) == 2000
    await sink.close()


async def test_a_request_that_is_answered_after_the_time_out_settles_while_others_are_answered(
    scripted: ScriptedPubSub,
) -> None:
    async def answer(messages: Sequence[Any]) -> None:
        await asyncio.sleep(2.0 if messages[0].ordering_key == "slow" else 0.1)

    scripted.answer = answer
    sink = await opened(scripted.address)
    slow = asyncio.create_task(sink.publish([make_event(key="slow")]))
    while not slow.done():
        assert list(await sink.publish([make_event(key="quick")])) == [CONFIRMED]
    assert list(await slow) == [CONFIRMED]
    assert sink.is_open
    await sink.close()


async def test_a_request_that_is_never_answered_is_given_up_though_others_are(scripted: ScriptedPubSub) -> None:
    async def answer(messages: Sequence[Any]) -> None:
        await asyncio.sleep(3600 if messages[0].ordering_key == "lost" else 0.05)

    scripted.answer = answer
    sink = await opened(scripted.address, publish_timeout=0.5)
    lost = asyncio.create_task(sink.publish([make_event(key="lost")]))
    began = time.monotonic()
    while not lost.done() and time.monotonic() - began < LIMIT:
        await sink.publish([make_event(key="quick")])
    assert 1.5 < time.monotonic() - began < 6.0
    (outcome,) = await lost
    assert isinstance(outcome, Unknown)
    assert not sink.is_open
    await sink.close()


async def test_a_service_that_answers_nothing_is_left_and_says_why(scripted: ScriptedPubSub) -> None:
    async def answer(messages: Sequence[Any]) -> None:
        await asyncio.sleep(3600)

    scripted.answer = answer
    sink = await opened(scripted.address)
    first = asyncio.create_task(sink.publish([make_event(key="k")]))
    await scripted.requests_reach(1)
    await asyncio.sleep(0.5)
    behind = asyncio.create_task(sink.publish([make_event(key="k"), make_event(key="other")]))
    await scripted.requests_reach(2)
    assert kinds(await asyncio.wait_for(first, 3.0)) == ["Unknown"]
    assert kinds(await asyncio.wait_for(behind, 1.0)) == ["NotSent", "Unknown"]
    (outcome,) = await first
    assert isinstance(outcome, Unknown)
    assert "has answered nothing for 1 s" in outcome.reason
    assert not sink.is_open
    await sink.close()


async def test_a_bridge_that_stood_still_reads_what_came_before_it_judges(
    emulator: PubSubEmulator, unique: str
) -> None:
    sink = PubSubSink(pubsub_settings(emulator.address, unique, publish_timeout=1.0))
    await sink.topology(apply=True)
    await sink.open()
    for _ in range(3):
        call = asyncio.create_task(sink.publish([make_event(number) for number in range(100)]))
        await asyncio.sleep(0)
        time.sleep(5.0)
        assert list(await call) == [CONFIRMED] * 100
    assert sink.is_open
    await sink.close()


async def test_stalled_says_that_nothing_is_answered(scripted: ScriptedPubSub) -> None:
    release = asyncio.Event()

    async def answer(messages: Sequence[Any]) -> None:
        await release.wait()

    scripted.answer = answer
    sink = await opened(scripted.address, publish_timeout=30.0)
    await asyncio.sleep(1.3)
    assert sink.stalled is None
    call = asyncio.create_task(sink.publish(numbered(3)))
    await scripted.requests_reach(1)
    assert sink.stalled is None
    await until(lambda: sink.stalled is not None, limit=3.0)
    assert "has answered nothing for" in str(sink.stalled)
    release.set()
    assert list(await call) == [CONFIRMED] * 3
    assert sink.stalled is None
    assert sink.pipelines
    await sink.close()


@pytest.mark.parametrize("code", ["INTERNAL", "UNKNOWN", "OUT_OF_RANGE", "DATA_LOSS"])
async def test_a_message_that_the_service_fails_over_waits_alone_and_its_companions_go_on(
    scripted: ScriptedPubSub, code: str
) -> None:
    async def answer(messages: Sequence[Any]) -> grpc.StatusCode | None:
        return grpc.StatusCode[code] if any(message.data == b"7" for message in messages) else None

    scripted.answer = answer
    sink = await opened(scripted.address)
    waiting = {event.id: event for event in numbered(20, key=None)}
    tries = 0
    while len(waiting) > 1:
        tries += 1
        assert tries < 4
        batch = list(waiting.values())
        for event, outcome in zip(batch, await sink.publish(batch), strict=True):
            if outcome is CONFIRMED:
                del waiting[event.id]
            else:
                assert isinstance(outcome, NotSent | Refused)
    assert [event.payload for event in waiting.values()] == [b"7"]
    assert sink.is_open
    # Nor do newcomers share a request with it.
    poisoned, *others = await sink.publish([*waiting.values(), *numbered(5, key=None)])
    assert isinstance(poisoned, Refused)
    assert code in poisoned.reason
    assert others == [CONFIRMED] * 5
    await sink.close()


Script = dict[int, list[grpc.StatusCode | float | None]]
"""By the number of a message: how the requests that begin with it are answered, one after the other; a float waits."""


async def published_until_confirmed(
    server: ScriptedPubSub, script: Script, calls: list[list[Event]], **changes: Any
) -> None:
    """As the bridge does: each call at once, then what failed, in order, once all calls have reported."""

    async def answer(messages: Sequence[Any]) -> grpc.StatusCode | None:
        for number in numbers(messages):
            if script.get(number):
                step = script[number].pop(0)
                if not isinstance(step, float):
                    return step
                await asyncio.sleep(step)
        return None

    server.answer = answer
    sink = await opened(server.address, **changes)
    while calls:
        outcomes = await asyncio.gather(*(sink.publish(call) for call in calls))
        left = [
            event
            for call, answers in zip(calls, outcomes, strict=True)
            for event, outcome in zip(call, answers, strict=True)
            if outcome is not CONFIRMED
        ]
        # What was refused goes alone, and before what follows it in its key.
        calls = [[left[0]]] if left else []
        if left[1:]:
            await sink.open()
            if list(await sink.publish([left[0]])) == [CONFIRMED]:
                left = left[1:]
            calls = [left]
        await sink.open()
    await sink.close()


code = grpc.StatusCode


@pytest.mark.parametrize(
    "script",
    [
        {0: [code.RESOURCE_EXHAUSTED]},
        {3: [code.RESOURCE_EXHAUSTED, code.ABORTED, code.INTERNAL]},
        {5: [0.2, code.UNAVAILABLE]},
        {0: [code.INTERNAL], 9: [code.UNKNOWN], 15: [code.FAILED_PRECONDITION]},
        {2: [code.INVALID_ARGUMENT, code.INVALID_ARGUMENT, code.RESOURCE_EXHAUSTED]},
        {7: [code.INVALID_ARGUMENT, code.INVALID_ARGUMENT, code.UNAVAILABLE]},
        {7: [code.INVALID_ARGUMENT, code.INTERNAL]},
        {4: [code.INVALID_ARGUMENT, 2.5, None]},
        {1: [2.5]},
    ],
    ids=lambda script: "; ".join(f"{n} {' '.join(str(s).rpartition('.')[2] for s in a)}" for n, a in script.items()),
)
@pytest.mark.parametrize("delay", [0.0, 0.02], ids=["at once", "with a delay"])
async def test_no_event_of_a_key_overtakes_one_that_failed(
    scripted: ScriptedPubSub, script: Script, delay: float
) -> None:
    events = numbered(24)
    script = {number: list(answers) for number, answers in script.items()}
    calls = [events[n : n + 4] for n in range(0, 24, 4)]
    await published_until_confirmed(scripted, script, calls, batch_delay=delay, batch_messages=3)
    seen: list[int] = []
    for number in numbers(scripted.confirmed):
        if number not in seen:
            seen.append(number)
    assert seen == list(range(24))


async def test_a_call_that_is_cancelled_lets_nothing_overtake(scripted: ScriptedPubSub) -> None:
    release = asyncio.Event()

    async def answer(messages: Sequence[Any]) -> None:
        await release.wait()

    scripted.answer = answer
    sink = await opened(scripted.address, publish_timeout=30.0)
    events = numbered(6)
    calls = [asyncio.create_task(sink.publish(events[n : n + 2])) for n in (0, 2, 4)]
    await scripted.requests_reach(1)
    calls[1].cancel()
    await asyncio.sleep(0.05)
    release.set()
    assert list(await calls[2]) == [CONFIRMED] * 2
    assert numbers(scripted.confirmed) == list(range(6))
    await sink.close()


async def test_other_requests_that_are_in_flight_when_one_is_lost_report_for_themselves(
    scripted: ScriptedPubSub,
) -> None:
    release = asyncio.Event()

    async def answer(messages: Sequence[Any]) -> grpc.StatusCode | None:
        if messages[0].ordering_key == "a":
            return grpc.StatusCode.UNAVAILABLE
        await release.wait()
        return None

    scripted.answer = answer
    sink = await opened(scripted.address, publish_timeout=30.0, batch_messages=1)
    b = asyncio.create_task(sink.publish([make_event(key="b"), make_event(key="b")]))
    await scripted.requests_reach(1)
    assert kinds(await sink.publish([make_event(key="a"), make_event(key="a")])) == ["Unknown", "NotSent"]
    assert not sink.is_open
    release.set()
    assert kinds(await asyncio.wait_for(b, LIMIT)) == ["Confirmed", "NotSent"]
    await sink.close()
