"""Outside effects as an author uses them, with a ledger of tests, which test_memory_ledger.py holds against inboxes."""

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from workers import EffectChanged, EffectUnknown, Event, effect, handler
from workers.result import LARGEST_RECORD, recordable
from workers.testing import MemoryLedger, arun, make_event, run

EVENT = make_event("a", None)


class Charged(BaseModel):
    id: str
    amount: Decimal


async def test_the_result_of_an_effect_spares_the_next_attempt_the_call() -> None:
    calls = []

    @handler("a")
    async def charge(event: Event) -> None:
        async with effect("charge") as charge:
            if charge.result is None:
                calls.append(charge.idempotency_key)
                charge.result = {"status": "paid"}

    ledger = MemoryLedger("shop")
    for _ in range(2):
        await arun(charge, EVENT, ledger=ledger)
        assert ledger.results(EVENT) == {"charge": {"status": "paid"}}
    assert calls == [f"shop:{EVENT.id}:charge"]


async def test_an_effect_whose_code_raises_has_the_result_that_it_had_by_then() -> None:
    """What has happened must be on record, whatever the code stumbles over afterwards."""

    @handler("a")
    async def charge_and_fail(event: Event) -> None:
        async with effect("before"):
            raise ConnectionError

    @handler("a")
    async def fail_after(event: Event) -> None:
        async with effect("after") as charge:
            charge.result = {"status": "paid"}
            raise ConnectionError

    ledger = MemoryLedger()
    for function in (charge_and_fail, fail_after):
        with pytest.raises(ConnectionError):
            await arun(function, EVENT, ledger=ledger)
    assert ledger.results(EVENT) == {"before": None, "after": {"status": "paid"}}


async def test_a_result_is_recorded_although_the_time_is_up() -> None:
    @handler("a")
    async def charge(event: Event) -> None:
        async with effect("charge") as charge:
            charge.result = {"status": "paid"}
            await asyncio.sleep(60)

    ledger = MemoryLedger()
    with pytest.raises(TimeoutError):
        await arun(charge, EVENT, ledger=ledger, timeout=0.05)
    assert ledger.results(EVENT) == {"charge": {"status": "paid"}}


class _Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


async def test_an_effect_that_was_begun_too_long_ago_is_unknown_unless_it_has_a_result() -> None:
    ended = False

    @handler("a")
    async def charge(event: Event) -> None:
        async with effect("charge", max_age=timedelta(hours=23)) as charge:
            ages.append(charge.age)
            if ended:
                charge.result = {"status": "paid"}

    clock = _Clock()
    ledger = MemoryLedger(now=clock)
    ages: list[timedelta] = []
    for hours in (0, 23):
        clock.now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=hours)
        await arun(charge, EVENT, ledger=ledger)
    assert ages == [timedelta(0), timedelta(hours=23)]
    clock.now += timedelta(seconds=1)
    ended = True
    with pytest.raises(EffectUnknown, match=r"charge was begun 23:00:01 ago under the key test:.*:charge, no result"):
        await arun(charge, EVENT, ledger=ledger)
    assert ledger.results(EVENT) == {"charge": None}

    ledger.effects[ledger.key(EVENT, "charge")].result = {"id": "found by hand"}
    await arun(charge, EVENT, ledger=ledger)
    assert len(ages) == 3


async def test_what_is_given_must_be_what_was_given_when_it_was_begun() -> None:
    amounts = iter([10, 10, 20, 20, 20])
    answers: list[dict[str, str]] = []

    @handler("a")
    async def charge(event: Event) -> None:
        given = {"amount": next(amounts), "to": ("x", None)}
        async with effect("charge", given=given, again=lambda result: result == {"status": "declined"}) as charge:
            if answers and charge.result is None:
                charge.result = answers.pop()

    ledger = MemoryLedger()
    for _ in range(2):
        await arun(charge, EVENT, ledger=ledger)
    with pytest.raises(EffectChanged, match=r"charge was begun 0:00:00 ago .*something else: amount 10 then, 20 now$"):
        await arun(charge, EVENT, ledger=ledger)

    # Once there is a result it is the result; and what begins again is given something new.
    [begun] = ledger.effects.values()
    begun.result = {"status": "declined"}
    answers.append({"status": "paid"})
    for _ in range(2):
        await arun(charge, EVENT, ledger=ledger)
    assert [each.given for each in ledger.effects.values()] == [
        {"amount": amount, "to": ["x", None]} for amount in (10, 20)
    ]
    with pytest.raises(ValueError, match=r"effect\('charge'\): given: it has no form in JSON"):
        effect("charge", given={"amount": Decimal(1)})


async def test_what_was_refused_for_good_begins_again_under_a_fresh_key() -> None:
    answers = [{"declined": True}, {"declined": True}, {"declined": False}]
    keys = []

    @handler("a")
    async def charge(event: Event) -> None:
        async with effect("charge", again=lambda result: bool(result["declined"])) as charge:
            if charge.result is None:
                keys.append(charge.idempotency_key)
                charge.result = answers[len(keys) - 1]

    ledger = MemoryLedger("shop")
    for _ in range(5):
        await arun(charge, EVENT, ledger=ledger)
    first = f"shop:{EVENT.inbox_id}:charge"
    assert keys == [first, f"{first}:2", f"{first}:3"]
    assert ledger.results(EVENT) == {"charge": {"declined": False}}


async def test_a_model_of_the_result_is_what_every_attempt_gets() -> None:
    seen = []

    @handler("a")
    async def charge(event: Event) -> None:
        async with effect("charge", result=Charged, again=lambda charged: charged.amount < 0) as charge:
            if charge.result is None:
                charge.result = Charged(id="ch_1", amount=Decimal("10.10"))
            seen.append(charge.result)

    ledger = MemoryLedger()
    for _ in range(2):
        await arun(charge, EVENT, ledger=ledger)
    assert seen == [Charged(id="ch_1", amount=Decimal("10.10"))] * 2
    assert ledger.results(EVENT) == {"charge": {"id": "ch_1", "amount": "10.10"}}

    ledger.effects[ledger.key(EVENT, "charge")].result = {"id": "ch_1", "amount": "much"}
    with pytest.raises(
        ValueError, match=r"effect\('charge'\): what is on record does not fit its model: result.amount"
    ):
        await arun(charge, EVENT, ledger=ledger)


async def test_a_model_without_a_form_in_json_is_refused_before_the_effect() -> None:
    class Answer(BaseModel, arbitrary_types_allowed=True):
        connection: asyncio.Lock

    @handler("a")
    async def charge(event: Event) -> None:
        async with effect("charge", result=Answer):
            raise AssertionError("the effect must not be begun")

    ledger = MemoryLedger()
    with pytest.raises(TypeError, match="Answer has no form in JSON"):
        await arun(charge, EVENT, ledger=ledger)
    assert ledger.effects == {}


UNSTORABLE = [
    ({"amount": Decimal("1.10")}, {"amount": "1.10"}, "has no form in JSON"),
    ({"amount": float("nan")}, {"amount": "nan"}, "has no form in JSON"),
    ({"text": "a\0b"}, {"text": "a\ufffdb"}, "NUL"),
    ({"text": "\ud800"}, {"text": "?"}, "half a character"),
    ({"number": 10**5000}, {"number": "<int>"}, "has no form in JSON"),
    ({"keys": {"a", 1} - {1}}, {"keys": ["a"]}, "has no form in JSON"),
    ({("a", 1): [(1, None, True, 0.5)]}, {"('a', 1)": [[1, None, True, 0.5]]}, "has no form in JSON"),
]


@pytest.mark.parametrize(("result", "kept", "reason"), UNSTORABLE)
def test_a_result_that_cannot_be_kept_fails_in_a_test_and_is_kept_as_nearly_as_can_be_in_a_worker(
    result: dict[Any, Any], kept: dict[str, Any], reason: str
) -> None:
    text, changed = recordable(result)
    assert (json.loads(text), reason in changed) == (kept, True)

    @handler("a")
    async def charge(event: Event) -> None:
        async with effect("charge") as charge:
            charge.result = result

    with pytest.raises(ValueError, match=reason):
        run(charge, EVENT)


def test_a_result_that_is_too_large_or_refers_to_itself_leaves_a_word() -> None:
    large = {"text": "x" * LARGEST_RECORD}
    text, changed = recordable(large)
    assert json.loads(text)["beginning"].startswith('{"text": "xxx')
    assert "more than" in changed
    round_and_round: dict[str, Any] = {}
    round_and_round["self"] = round_and_round

    class Mute:
        def __str__(self) -> str:
            raise RuntimeError

    for result in (round_and_round, {"mute": Mute()}):
        text, changed = recordable(result)
        assert isinstance(json.loads(text), dict)
        assert changed
    assert json.loads(text) == {"mute": "<Mute>"}
    assert recordable({"face": "\U0001f600"}) == ('{"face": "\\ud83d\\ude00"}', "")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_whatever_a_result_holds_it_can_be_recorded(value: object) -> None:
    text, changed = recordable({"value": value})
    assert isinstance(json.loads(text), dict)
    assert changed or json.loads(text) == {"value": value}


def _nested(function: Callable[[], None]) -> Any:
    @handler("a")
    async def charge(event: Event) -> None:
        await asyncio.to_thread(function)

    return charge


def test_threads_that_a_coroutine_starts_have_effects_too() -> None:
    def pay() -> None:
        with effect("charge") as charge:
            charge.result = {"key": charge.idempotency_key}

    ledger = MemoryLedger()
    run(_nested(pay), EVENT, ledger=ledger)
    assert ledger.results(EVENT) == {"charge": {"key": ledger.key(EVENT, "charge")}}


def test_a_coroutine_that_would_block_its_own_loop_is_told_so() -> None:
    @handler("a")
    async def charge(event: Event) -> None:
        with effect("charge"):
            raise AssertionError("the effect must not be begun")

    with pytest.raises(RuntimeError, match="in a coroutine write `async with`"):
        run(charge, EVENT)


@pytest.mark.parametrize("operation", ["", "charge:2"])
def test_an_operation_whose_key_could_be_anothers_is_refused(operation: str) -> None:
    with pytest.raises(ValueError, match="name an operation that does not end in a colon and a number"):
        effect(operation)


def test_an_age_that_nothing_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match="max_age must be more than nothing"):
        effect("charge", max_age=timedelta(0))


def test_a_key_that_services_do_not_take_is_refused_before_the_effect() -> None:
    @handler("a")
    async def charge(event: Event) -> None:
        async with effect("c" * 230):
            raise AssertionError("the effect must not happen")

    with pytest.raises(ValueError, match="its key has 272 characters, and services take 255"):
        run(charge, EVENT)
