"""`workers.testing`: handlers run in tests as a worker runs them, with no plugin and no server."""

import asyncio
import threading
from datetime import UTC, datetime
from typing import Any

import pytest

from bridge.errors import SettingsError
from bridge.event import Malformed
from workers import Event, Options, Reject, Retry, effect, handler
from workers.effects import current_effects
from workers.result import ReplyError
from workers.testing import MemoryLedger, arun, make_event, run

EVENT = make_event("shop.order.placed", {"order": 7})


class Place(Options):
    warehouse: str = "north"


@handler("shop.order.placed", options=Place)
async def reserve(event: Event, options: Place) -> dict[str, Any]:
    async with effect("goods") as goods:
        if goods.result is None:
            goods.result = {"from": options.warehouse, "lines": (1, 2)}
    return {"order": event.json()["order"], "goods": goods.result}


@handler("shop.order.placed")
def reserve_in_a_thread(event: Event) -> dict[str, Any]:
    with effect("goods") as goods:
        if goods.result is None:
            goods.result = {"thread": threading.current_thread().name}
    return {"goods": goods.result}


def test_an_event_has_what_is_given_and_sensible_values_for_the_rest() -> None:
    before = datetime.now(UTC)
    event = make_event("a.b", {"n": 1.5, "s": "é"})
    assert (event.topic, event.json(), event.key, event.headers) == ("a.b", {"n": 1.5, "s": "é"}, None, {})
    assert event.inbox_id == event.id != make_event("a.b", None).id
    assert event.content_type == "application/json"
    assert before <= event.time <= datetime.now(UTC)
    time = datetime(2026, 11, 21, tzinfo=UTC)
    given = make_event(
        "a.b", b"{", key="k", headers={"h": "1"}, id="17", source="/x", time=time, content_type="text/plain", sequence=9
    )
    assert given == Event("17", "a.b", b"{", "k", "/x", time, "text/plain", {"h": "1"}, 9)
    with pytest.raises(Malformed):
        given.json()


@pytest.mark.parametrize("payload", [{1, 2}, float("nan"), object()])
def test_an_event_refuses_a_payload_that_json_does_not_have(payload: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        make_event("a.b", payload)


def test_a_plain_test_runs_a_handler_and_gets_what_the_reply_function_would() -> None:
    assert run(reserve, EVENT) == {"order": 7, "goods": {"from": "north", "lines": [1, 2]}}
    result = run(reserve_in_a_thread, EVENT)
    assert result is not None
    assert result["goods"]["thread"].endswith("reserve_in_a_thread")


async def test_a_coroutine_awaits_the_same_and_is_told_so() -> None:
    assert await arun(reserve, EVENT) == {"order": 7, "goods": {"from": "north", "lines": [1, 2]}}
    with pytest.raises(RuntimeError, match=r"in a coroutine write `await arun\(\.\.\.\)`"):
        run(reserve, EVENT)


@pytest.mark.parametrize("function", [reserve, reserve_in_a_thread])
def test_a_second_run_finds_what_the_first_one_did(function: Any) -> None:
    ledger = MemoryLedger("stock")
    first = run(function, EVENT, ledger=ledger)
    key = f"stock:{EVENT.id}:goods"
    assert list(ledger.effects) == [key]
    assert ledger.effects[key].idempotency_key == key
    ledger.effects[key].result = {"known": True}
    second = run(function, EVENT, ledger=ledger)
    assert first is not None
    assert second is not None
    assert first["goods"] != second["goods"] == {"known": True}


def test_a_ledger_tells_the_effects_of_events_apart() -> None:
    ledger = MemoryLedger()
    other = make_event("shop.order.placed", {"order": 8})
    run(reserve, EVENT, ledger=ledger, options={"warehouse": "south"})
    assert ledger.results(EVENT) == {"goods": {"from": "south", "lines": [1, 2]}}
    assert ledger.results(other) == {}
    run(reserve, other, ledger=ledger)
    assert ledger.results(other) == {"goods": {"from": "north", "lines": [1, 2]}}


def test_an_effect_that_was_begun_and_not_ended_keeps_its_start() -> None:
    @handler("a")
    async def breaks(event: Event) -> None:
        async with effect("charge"):
            raise ConnectionError("reset")

    ledger = MemoryLedger()
    starts = set()
    for _ in range(2):
        with pytest.raises(ConnectionError):
            run(breaks, EVENT, ledger=ledger)
        assert ledger.results(EVENT) == {"charge": None}
        starts |= {effect.started_at for effect in ledger.effects.values()}
    assert len(starts) == 1


def test_an_event_of_another_program_has_the_key_that_the_inbox_would_make() -> None:
    event = make_event("a", None, id="order-17", source="/shop/test")
    assert MemoryLedger("w").key(event, "charge") == "w:9a6be2ce-227a-59a2-851b-ab2774186dfb:charge"


def test_options_are_a_table_or_the_model_and_are_validated() -> None:
    for options in ({"warehouse": "south"}, Place(warehouse="south")):
        result = run(reserve, EVENT, options=options)
        assert result is not None
        assert result["goods"]["from"] == "south"
    with pytest.raises(SettingsError, match=r"workers\.test\.options\.wharehouse: unknown key; known: warehouse"):
        run(reserve, EVENT, options={"wharehouse": "south"})
    with pytest.raises(SettingsError, match=r"workers\.test\.options\.warehouse: unknown key; this handler takes no"):
        run(reserve_in_a_thread, EVENT, options=Place())


@pytest.mark.parametrize("error", [Reject("never"), Retry("later", after=5), KeyError("x"), SettingsError("mine")])
def test_what_a_handler_raises_comes_out_as_it_is(error: Exception) -> None:
    @handler("a")
    async def raises(event: Event) -> None:
        raise error

    @handler("a")
    def raises_in_a_thread(event: Event) -> None:
        raise error

    for function in (raises, raises_in_a_thread):
        with pytest.raises(type(error)) as raised:
            run(function, EVENT)
        assert raised.value is error


@pytest.mark.parametrize("result", [{"a": {1}}, {"a": float("nan")}, [1], "text"])
def test_a_result_that_the_inbox_would_refuse_is_refused(result: Any) -> None:
    @handler("a")
    async def returns(event: Event) -> Any:
        return result

    with pytest.raises(ReplyError):
        run(returns, EVENT)


def test_a_handler_that_runs_too_long_is_cancelled_and_said_to() -> None:
    ended = []

    @handler("a")
    async def waits(event: Event) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(event.id)

    with pytest.raises(TimeoutError, match=r"the handler ran longer than 0\.01 s"):
        run(waits, EVENT, timeout=0.01)
    assert ended == [EVENT.id]


def test_a_function_that_is_no_handler_is_refused() -> None:
    with pytest.raises(TypeError, match="is no handler; mark it with @handler"):
        run(lambda event: None, EVENT)  # type: ignore[arg-type]  # what a test without types may do


async def test_a_run_leaves_no_effects_in_hand_behind() -> None:
    await arun(reserve, EVENT)
    assert current_effects.get(None) is None
