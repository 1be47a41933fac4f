"""Handlers: how they are marked, found and given their options; effects; the ladder of retries."""

import asyncio
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import SettingsError
from bridge.settings import WorkerSettings
from tests.support.events import make_event
from workers import Effect, Event, Options, effect, handler
from workers.attempt import backoff, retry_delays
from workers.build import subscription
from workers.effects import current_effects
from workers.handler import load_handler

EVENT = make_event(topic="shop.order.placed")


class Greeting(Options):
    word: str = "hello"
    times: int = 1


@handler("shop.#", options=Greeting)
async def greet(event: Event, options: Greeting) -> dict[str, Any]:
    return {"said": [options.word] * options.times, "to": event.topic}


@handler("a.b", "a.c")
async def plain(event: Event) -> None:
    return None


async def test_a_handler_is_called_like_its_function() -> None:
    assert await greet(EVENT, Greeting(times=2)) == {"said": ["hello", "hello"], "to": "shop.order.placed"}
    assert await plain(EVENT) is None


async def test_options_of_the_settings_reach_the_handler_with_their_types() -> None:
    run = greet.configured({"word": "hi", "times": "3"}, "greeter")
    assert await run(EVENT) == {"said": ["hi", "hi", "hi"], "to": "shop.order.placed"}


def test_an_unknown_option_is_named_with_its_full_key_and_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"^workers\.greeter\.options\.wrod: unknown key; known: times, word$"):
        greet.configured({"wrod": "hi"}, "greeter")


def test_a_wrong_option_is_named_without_repeating_its_value() -> None:
    with pytest.raises(SettingsError, match=r"^workers\.greeter\.options\.times: ") as caught:
        greet.configured({"times": "s3cret"}, "greeter")
    assert "s3cret" not in str(caught.value)


def test_a_handler_without_options_refuses_any() -> None:
    with pytest.raises(SettingsError, match=r"workers\.w\.options\.x: unknown key; this handler takes no options"):
        plain.configured({"x": 1}, "w")


async def test_a_function_that_may_block_runs_in_a_thread_of_its_own() -> None:
    @handler("a")
    def blocking(event: Event) -> dict[str, Any]:
        return {"thread": threading.current_thread().name, "daemon": threading.current_thread().daemon}

    result = await blocking(EVENT)
    assert result is not None
    assert result["thread"].endswith("blocking")
    # The process must not wait for it at its end.
    assert result["daemon"]


async def test_a_thread_that_was_cancelled_is_waited_for() -> None:
    started, go_on = threading.Event(), threading.Event()

    @handler("a")
    def blocking(event: Event) -> None:
        started.set()
        go_on.wait(10)

    running = asyncio.ensure_future(blocking(EVENT))
    await asyncio.to_thread(started.wait, 10)
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=0.1)
    assert not done
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running


@pytest.mark.parametrize("error", [StopIteration("s"), SystemExit(3), KeyboardInterrupt()])
async def test_what_would_end_a_process_fails_only_the_attempt_of_a_thread(error: BaseException) -> None:
    @handler("a")
    def strange(event: Event) -> None:
        raise error

    with pytest.raises(RuntimeError, match="the handler raised"):
        await strange(EVENT)


def test_a_handler_that_yields_is_refused_when_it_is_marked() -> None:
    def yields(event: Event) -> Any:
        yield {}

    async def yields_later(event: Event) -> Any:
        yield {}

    for function in (yields, yields_later):
        with pytest.raises(TypeError, match="yields; return the result instead"):
            handler("a")(function)


def test_a_handler_that_does_not_take_its_options_is_refused_when_it_is_marked() -> None:
    async def one(event: Event) -> None: ...

    with pytest.raises(TypeError, match="must take the event and its options"):
        handler("a", options=Greeting)(one)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("workers.invoices", "not of the form package.module:function"),
        ("no_such_package.x:y", "cannot import no_such_package.x"),
        ("workers.invoices:nothing", "workers.invoices has no @handler named nothing"),
        ("workers.invoices:parse", "workers.invoices has no @handler named parse"),
    ],
)
def test_a_wrong_handler_name_says_what_is_wrong(name: str, said: str) -> None:
    with pytest.raises(SettingsError, match=f"workers.w.handler: .*{said}"):
        load_handler(name, "w")


class Recording:
    """A ledger in memory, as a test of a handler uses it."""

    def __init__(self) -> None:
        self.effects: dict[str, Effect] = {}

    async def begin_effect(self, operation: str) -> Effect:
        known = self.effects.get(operation)
        return Effect(operation, f"{EVENT.id}:{operation}", EVENT.time, known.result if known else None)

    async def end_effect(self, effect: Effect) -> None:
        self.effects[effect.operation] = effect


async def test_the_result_of_an_effect_spares_the_next_attempt_the_call() -> None:
    ledger = Recording()
    token = current_effects.set(ledger)
    calls = []
    try:
        for _ in range(2):
            async with effect("charge") as charge:
                if charge.result is None:
                    calls.append(charge.idempotency_key)
                    charge.result = {"status": "paid"}
            assert charge.result == {"status": "paid"}
    finally:
        current_effects.reset(token)
    assert calls == [f"{EVENT.id}:charge"]


async def test_an_effect_whose_code_raises_has_no_result() -> None:
    async def charge_and_fail() -> None:
        async with effect("charge") as charge:
            charge.result = {"status": "unknown"}
            raise ConnectionError

    ledger = Recording()
    token = current_effects.set(ledger)
    try:
        with pytest.raises(ConnectionError):
            await charge_and_fail()
    finally:
        current_effects.reset(token)
    assert ledger.effects == {}


def _settings(**values: Any) -> WorkerSettings:
    return WorkerSettings(handler="a:b", **values)


def test_delays_double_up_to_the_longest_and_are_one_fewer_than_the_attempts() -> None:
    assert retry_delays(_settings(max_attempts=5, retry_initial="1s", retry_max="1h")) == [1, 2, 4, 8]
    assert retry_delays(_settings(max_attempts=8, retry_initial="1s", retry_max="5s")) == [1, 2, 4, 5]
    assert retry_delays(_settings(max_attempts=1)) == []


@given(st.integers(2, 100), st.floats(0.001, 100), st.floats(1, 10_000), st.data())
def test_a_backoff_rounds_up_to_the_rung_of_its_attempt(
    attempts: int, initial: float, growth: float, data: st.DataObject
) -> None:
    settings = _settings(max_attempts=attempts, retry_initial=initial, retry_max=initial * growth)
    ladder = retry_delays(settings)
    attempt = data.draw(st.integers(1, attempts - 1))
    delay = backoff(settings, attempt)
    rung = min(attempt, len(ladder)) - 1
    assert next(index for index, step in enumerate(ladder) if delay <= step) == rung


def test_a_worker_subscribes_to_its_handlers_topics_unless_the_settings_name_others() -> None:
    assert subscription("w", _settings(), plain.topics).topics == ["a.b", "a.c"]
    assert subscription("w", _settings(subscribe=["x.#"]), plain.topics).topics == ["x.#"]
