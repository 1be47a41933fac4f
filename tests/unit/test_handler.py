"""Handlers: how they are marked, found and given their options; effects; the ladder of retries."""

import asyncio
import threading
from datetime import date
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from bridge.errors import SettingsError
from bridge.settings import WorkerSettings
from tests.support.events import make_event
from workers import Event, Options, Reject, handler
from workers.attempt import backoff, retry_delays
from workers.build import subscription
from workers.loading import require_reply
from workers.testing import arun

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


def test_the_mark_without_brackets_says_how_it_is_written() -> None:
    """Else the function would be taken for a topic, and the module would have no handler."""

    async def one(event: Event) -> None: ...

    with pytest.raises(TypeError, match=r'@handler: write its topics behind it, @handler\("shop.order.placed"\)'):
        handler(one)  # type: ignore[call-overload]


def test_a_handler_that_does_not_take_its_options_is_refused_when_it_is_marked() -> None:
    async def one(event: Event) -> None: ...

    with pytest.raises(TypeError, match="must take the event and the worker's options, and nothing else"):
        handler("a", options=Greeting)(one)  # type: ignore[arg-type]


class Line(BaseModel):
    article: str
    quantity: int = Field(ge=1)


class Order(BaseModel):
    order: int
    lines: list[Line]
    total: Decimal = Decimal(0)
    placed: date | None = None
    note: Any = None


FITS = {"order": 7, "lines": [{"article": "tea", "quantity": 2}]}


@handler("shop.order.placed", payload=Order)
async def reserve(event: Event, order: Order) -> dict[str, Any]:
    return {"topic": event.topic, "order": order.order, "articles": [line.article for line in order.lines]}


@handler("shop.order.placed", payload=Order, options=Greeting)
def greet_for(event: Event, order: Order, options: Greeting) -> dict[str, Any]:
    return {"said": options.word, "order": order.order, "thread": threading.current_thread().name}


def order(**changes: Any) -> Event:
    return make_event(topic="shop.order.placed", payload={**FITS, **changes})


async def test_a_payload_reaches_the_handler_as_its_model_between_event_and_options() -> None:
    assert await reserve(order()) == {"topic": "shop.order.placed", "order": 7, "articles": ["tea"]}
    result = await greet_for(order(), Greeting(word="hi"))
    assert result is not None
    assert result["said"] == "hi"
    assert result["order"] == 7
    assert result["thread"].endswith("greet_for")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"order": "s3cret"}, "payload.order: Input should be a valid integer"),
        ({"order": None}, "payload.order: Input should be a valid integer"),
        ({"lines": [{"article": "s3cret"}]}, "payload.lines.0.quantity: is missing"),
        ({"lines": [{"article": "s3cret", "quantity": 0}]}, "payload.lines.0.quantity: Input should be greater than"),
        ({"lines": ["s3cret"]}, "payload.lines.0: must be an object of named fields"),
        ({"order": "x", "placed": "s3cret"}, "; payload.placed: Input should be a valid date"),
    ],
)
async def test_a_payload_that_does_not_fit_is_rejected_by_its_fields_and_not_its_values(
    changes: dict[str, Any], said: str
) -> None:
    for attempt in (reserve(order(**changes)), greet_for(order(**changes), Greeting())):
        with pytest.raises(Reject) as rejected:
            await attempt
        assert said in str(rejected.value)
        assert "s3cret" not in str(rejected.value)
        assert "\n" not in str(rejected.value)


@pytest.mark.parametrize("payload", [b"", b"{", b"\xff", b"[" * 100_000, b'{"order": NaN, "lines": []}', b"[s3cret]"])
async def test_a_payload_that_is_not_json_is_rejected(payload: bytes) -> None:
    with pytest.raises(Reject, match=r"^payload: is not JSON: ") as rejected:
        await reserve(make_event(payload=payload))
    assert "s3cret" not in str(rejected.value)


async def test_a_payload_of_another_kind_is_rejected() -> None:
    with pytest.raises(Reject, match=r"^payload: must be an object of named fields$"):
        await reserve(make_event(payload=[1]))


async def test_texts_that_quote_what_they_refuse_are_not_told() -> None:
    class Card(BaseModel):
        kind: Literal["card"]

    class Cash(BaseModel):
        kind: Literal["cash"]

    class Payment(BaseModel):
        id: UUID
        by: Card | Cash = Field(discriminator="kind")

    @handler("a", payload=Payment)
    async def pay(event: Event, payment: Payment) -> None: ...

    with pytest.raises(Reject) as rejected:
        await pay(make_event(payload={"id": "s3cret", "by": {"kind": "s3cret"}}))
    assert str(rejected.value) == "payload.id: is not a UUID; payload.by: its 'kind' is none of 'card', 'cash'"


async def test_decimals_of_a_payload_have_every_digit_and_other_numbers_stay_numbers() -> None:
    @handler("a", payload=Order)
    async def look(event: Event, order: Order) -> dict[str, Any]:
        return {"total": str(order.total), "note": order.note}

    payload = b'{"order": 1, "lines": [], "total": 12345678901234567.890, "note": {"x": 1.10}}'
    assert await arun(look, make_event(payload=payload)) == {"total": "12345678901234567.890", "note": {"x": 1.1}}


def test_a_function_that_does_not_take_its_payload_is_refused_when_it_is_marked() -> None:
    async def one(event: Event) -> None: ...

    async def wrong(event: Event, order: Line) -> None: ...

    with pytest.raises(TypeError, match="must take the event and its payload, and nothing else"):
        handler("a", payload=Order)(one)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must take the event, its payload and the worker's options"):
        handler("a", payload=Order, options=Greeting)(wrong)  # type: ignore[arg-type]
    handler("a", payload=Order)(wrong)  # type: ignore[arg-type]  # only a checker of types sees this


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


@handler(needs_reply=True)
async def store(event: Event) -> dict[str, Any]:
    return {"of": event.id}


def test_a_handler_that_only_returns_something_does_not_start_where_nothing_takes_it() -> None:
    with pytest.raises(SettingsError, match=r"workers\.w\.reply: is missing"):
        require_reply("w", _settings(), store)
    require_reply("w", _settings(reply="shop.done"), store)
    require_reply("w", _settings(), plain)
