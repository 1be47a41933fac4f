"""Payments against the fake of Stripe: whatever fails, money moves once, and the reply gets what Stripe decided."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import stripe

from workers import EffectChanged, EffectUnknown, Event, Reject, Retry
from workers.payments import PaymentOptions, pay
from workers.payments.fake.faults import Fault, Kind
from workers.payments.fake.server import FakeStripe
from workers.testing import MemoryLedger, arun, make_event

# Stripe's SDK gives httpx the body in a way that httpx would rather have otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CHARGE: dict[str, Any] = {"amount": 1999, "currency": "eur", "payment_method": "pm_card_visa"}


@pytest.fixture
def fake() -> Iterator[FakeStripe]:
    with FakeStripe() as fake:
        yield fake


class Shop:
    """Runs one event's attempts, as a worker would."""

    def __init__(self, fake: FakeStripe, timeout: float = 5.0, api_key: str = "sk_test_fake") -> None:
        self.fake = fake
        self.options = {"api_key": api_key, "api_base": fake.url, "timeout": f"{timeout:g}s"}
        self.ledger = MemoryLedger("payments", now=lambda: datetime.fromtimestamp(fake.now(), UTC))

    async def attempt(self, event: Event) -> Any:
        return await arun(pay, event, ledger=self.ledger, options=self.options)

    async def handle(self, event: Event, most: int = 5) -> Any:
        """Attempts until one does not ask for another."""
        for _ in range(most):
            try:
                return await self.attempt(event)
            except Retry:
                continue
        raise AssertionError(f"{most} attempts were not enough")


@pytest.fixture
def shop(fake: FakeStripe) -> Shop:
    return Shop(fake)


def requested(**payload: Any) -> Event:
    return make_event("shop.payment.requested", payload)


def amounts(fake: FakeStripe) -> list[int]:
    return [charge["amount"] for charge in fake.account.charges]


async def test_a_charge_carries_its_event_and_key_and_happens_once(fake: FakeStripe, shop: Shop) -> None:
    event = requested(**CHARGE, metadata={"order": "7"})
    outcomes = [await shop.attempt(event) for _ in range(3)]
    [charge] = fake.account.charges
    assert (
        outcomes
        == [
            {
                "operation": "charge",
                "status": "succeeded",
                "payment_intent": charge["payment_intent"],
                "refund": None,
                "amount": 1999,
                "currency": "eur",
                "code": None,
                "decline_code": None,
            }
        ]
        * 3
    )
    key = f"payments:{event.inbox_id}:charge"
    assert charge["metadata"] == {"order": "7", "pgbridge_event": event.id, "pgbridge_key": key}
    assert fake.faults.requests == 1


async def test_money_that_is_reserved_is_taken_in_part_or_let_go_and_given_back(fake: FakeStripe, shop: Shop) -> None:
    held = await shop.attempt(requested(**CHARGE, capture=False))
    assert (held["status"], held["amount"], amounts(fake)) == ("requires_capture", 1999, [])
    taken = await shop.attempt(requested(operation="capture", payment_intent=held["payment_intent"], amount=1500))
    assert (taken["status"], taken["amount"]) == ("succeeded", 1500)
    back = await shop.attempt(
        requested(operation="refund", payment_intent=held["payment_intent"], amount=400, reason="duplicate")
    )
    assert (back["status"], back["amount"], back["payment_intent"]) == ("succeeded", -400, held["payment_intent"])
    assert back["refund"].startswith("re_")
    other = await shop.attempt(requested(**CHARGE, capture=False))
    gone = await shop.attempt(requested(operation="cancel", payment_intent=other["payment_intent"], reason="abandoned"))
    assert (gone["status"], gone["amount"]) == ("canceled", 0)
    assert amounts(fake) == [1500, -400]


@pytest.mark.parametrize(
    ("method", "status", "code", "decline_code"),
    [
        ("pm_card_visa_chargeDeclined", "requires_payment_method", "card_declined", "generic_decline"),
        ("pm_card_chargeDeclinedInsufficientFunds", "requires_payment_method", "card_declined", "insufficient_funds"),
        ("pm_card_chargeDeclinedExpiredCard", "requires_payment_method", "expired_card", None),
        ("pm_card_authenticationRequired", "requires_payment_method", "authentication_required", None),
        ("pm_usBankAccount_success", "processing", None, None),
    ],
)
async def test_what_stripe_decides_is_a_result_and_no_error(
    fake: FakeStripe, shop: Shop, method: str, status: str, code: str | None, decline_code: str | None
) -> None:
    event = requested(**CHARGE | {"payment_method": method})
    for _ in range(2):
        outcome = await shop.attempt(event)
        told = (outcome["status"], outcome["code"], outcome["decline_code"], outcome["amount"])
        assert told == (status, code, decline_code, 0)
        assert outcome["payment_intent"].startswith("pi_")
    assert (amounts(fake), fake.faults.requests) == ([], 1)


async def test_what_the_state_of_a_payment_forbids_is_a_result(shop: Shop) -> None:
    paid = await shop.attempt(requested(**CHARGE))
    intent = paid["payment_intent"]
    for operation, code in (
        ("capture", "payment_intent_unexpected_state"),
        ("cancel", "payment_intent_unexpected_state"),
    ):
        outcome = await shop.attempt(requested(operation=operation, payment_intent=intent))
        assert (outcome["status"], outcome["code"], outcome["amount"]) == ("succeeded", code, 0)
    assert (await shop.attempt(requested(operation="refund", payment_intent=intent)))["amount"] == -1999
    again = await shop.attempt(requested(operation="refund", payment_intent=intent))
    assert (again["code"], again["amount"]) == ("charge_already_refunded", 0)


FAULTS: list[tuple[Kind, float | None]] = [
    ("hang_before", None),
    ("hang_after", None),
    ("drop_before", None),
    ("drop_after", None),
    ("rate", 1.0),
    ("lock", 1.0),
    ("conflict", 1.0),
    ("error_before", None),
    ("error_after", None),
]


@pytest.mark.parametrize(("kind", "after"), FAULTS)
@pytest.mark.parametrize("operation", ["charge", "capture", "refund"])
async def test_whatever_fails_once_money_moves_once(
    fake: FakeStripe, kind: Kind, after: float | None, operation: str
) -> None:
    shop = Shop(fake, timeout=1.5 if kind.startswith("hang") else 5.0)
    before = await shop.attempt(requested(**CHARGE, capture=operation != "capture"))
    moved = amounts(fake)
    intent = before["payment_intent"]
    event = requested(**CHARGE) if operation == "charge" else requested(operation=operation, payment_intent=intent)
    fake.faults.replace([Fault(kind, times=1)])
    with pytest.raises(Retry) as retry:
        await shop.attempt(event)
    assert retry.value.after == after
    outcome = await shop.handle(event)
    assert outcome["status"] == "succeeded"
    sign = -1 if operation == "refund" else 1
    assert (outcome["amount"], amounts(fake)) == (sign * 1999, [*moved, sign * 1999])


@pytest.mark.parametrize(("kind", "keys"), [("error_after", 1), ("error_before", 2)])
async def test_a_500_that_the_key_will_always_say_is_settled_by_asking(
    fake: FakeStripe, shop: Shop, kind: Kind, keys: int
) -> None:
    """Where it happened, it is found; where not, it begins again under a fresh key, and never before Stripe said so."""
    event = requested(**CHARGE)
    fake.faults.replace([Fault(kind, times=1)])
    with pytest.raises(Retry):
        await shop.attempt(event)
    for _ in range(120):  # so that it is on no first page
        fake.account.create({"amount": 1, "currency": "eur"})
    outcome = await shop.handle(event)
    assert (outcome["status"], amounts(fake)) == ("succeeded", [1999])
    first = f"payments:{event.inbox_id}:charge"
    assert list(shop.ledger.effects) == [first, f"{first}:2"][:keys]
    assert fake.account.charges[0]["metadata"]["pgbridge_key"] == list(shop.ledger.effects)[-1]


async def test_a_charge_that_is_older_than_its_key_is_nobodys_to_repeat(fake: FakeStripe, shop: Shop) -> None:
    event = requested(**CHARGE)
    fake.faults.replace([Fault("drop_after", times=1)])
    with pytest.raises(Retry):
        await shop.attempt(event)
    fake.advance(timedelta(hours=23, seconds=1).total_seconds())
    with pytest.raises(EffectUnknown):
        await shop.attempt(event)
    assert amounts(fake) == [1999]


async def test_other_parameters_under_one_key_are_dead_lettered_with_both(fake: FakeStripe, shop: Shop) -> None:
    event = requested(**CHARGE)
    fake.faults.replace([Fault("drop_before", times=1)])
    with pytest.raises(Retry):
        await shop.attempt(event)
    with pytest.raises(EffectChanged, match=r"amount 1999 then, 2999 now$"):
        await shop.attempt(make_event(event.topic, CHARGE | {"amount": 2999}, id=event.id))
    # What changes and is not on record, Stripe finds.
    fake.faults.replace([Fault("drop_after", times=1)])
    with pytest.raises(Retry):
        await shop.attempt(event)
    with pytest.raises(Reject, match=r"parameters that they were first used with \(400\) Now: amount 1999, "):
        await shop.attempt(make_event(event.topic, CHARGE | {"metadata": {"order": "7"}}, id=event.id))
    assert amounts(fake) == [1999]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (CHARGE | {"amount": 19.99}, "payload.charge.amount: Input should be a valid integer"),
        (CHARGE | {"amount": "1999"}, "payload.charge.amount: Input should be a valid integer"),
        (CHARGE | {"amount": 0}, "payload.charge.amount: Input should be greater than or equal to 1"),
        (CHARGE | {"currency": "EUR"}, "payload.charge.currency: String should match pattern"),
        (CHARGE | {"amuont": 1}, "payload.charge.amuont: unknown key"),
        ({"operation": "steal"}, "payload: its 'operation' is none of 'charge', 'capture', 'cancel', 'refund'"),
        ({"operation": "cancel", "payment_intent": "pi_1/../x"}, "payload.cancel.payment_intent: String should match"),
        ([1], "payload: must be an object of named fields"),
    ],
)
async def test_a_payload_that_does_not_fit_is_rejected_by_the_name_of_its_field(
    fake: FakeStripe, shop: Shop, payload: Any, reason: str
) -> None:
    with pytest.raises(Reject) as rejected:
        await shop.attempt(make_event("shop.payment.requested", payload))
    assert reason in str(rejected.value)
    assert fake.faults.requests == 0


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (
            CHARGE | {"payment_method": "pm_unknown"},
            r"No such PaymentMethod: 'pm_unknown' \(400, resource_missing, pay",
        ),
        (CHARGE | {"currency": "kwd"}, r"multiples of ten \(400, amount\)"),
        ({"operation": "refund", "payment_intent": "pi_unknown"}, r"No such payment_intent: 'pi_unknown' \(404, "),
    ],
)
async def test_what_stripe_finds_wrong_is_rejected_in_its_words(shop: Shop, payload: Any, reason: str) -> None:
    with pytest.raises(Reject, match=reason):
        await shop.attempt(make_event("shop.payment.requested", payload))


async def test_a_wrong_key_is_an_operators_to_mend_and_is_shown_nowhere(fake: FakeStripe) -> None:
    shop = Shop(fake, api_key="sk_test_s3cret")
    with pytest.raises(stripe.AuthenticationError) as refused:
        await shop.attempt(requested(**CHARGE))
    assert "s3cret" not in str(refused.value) + repr(PaymentOptions.model_validate(shop.options))


async def test_a_key_is_read_from_a_file(fake: FakeStripe, tmp_path: Any) -> None:
    (tmp_path / "key").write_text("sk_test_fake\n")
    shop = Shop(fake)
    del shop.options["api_key"]
    shop.options["api_key_file"] = str(tmp_path / "key")
    assert (await shop.attempt(requested(**CHARGE)))["status"] == "succeeded"
