"""The fake of Stripe, through Stripe's own SDK: what Stripe documents of idempotency and of payments."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
import stripe

from workers.payments.fake.faults import KINDS, Fault, Kind
from workers.payments.fake.server import FakeStripe

# Stripe's SDK gives httpx the body in a way that httpx would rather have otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ORDER: dict[str, Any] = {
    "amount": 1999,
    "currency": "eur",
    "payment_method": "pm_card_visa",
    "confirm": True,
    "off_session": True,
    "metadata": {"order": "7"},
}


@pytest.fixture
def fake() -> Iterator[FakeStripe]:
    with FakeStripe() as fake:
        yield fake


def client_of(fake: FakeStripe, key: str = "sk_test_fake", timeout: float = 20.0) -> stripe.StripeClient:
    http = stripe.HTTPXClient(timeout=timeout)
    return stripe.StripeClient(key, base_addresses={"api": fake.url}, max_network_retries=0, http_client=http)


@pytest_asyncio.fixture
async def client(fake: FakeStripe) -> AsyncIterator[stripe.StripeClient]:
    client = client_of(fake)
    yield client
    await client._requestor._get_http_client().close_async()  # type: ignore[no-untyped-call]


def code_of(error: stripe.StripeError) -> str | None:
    return None if error.error is None else error.error.code


async def create(client: stripe.StripeClient, key: str | None = "k", **changes: Any) -> Any:
    options: Any = {} if key is None else {"idempotency_key": key}
    params: Any = {name: value for name, value in (ORDER | changes).items() if value is not None}
    return await client.v1.payment_intents.create_async(params, options)


async def test_a_payment_is_charged_and_has_what_it_was_given(fake: FakeStripe, client: stripe.StripeClient) -> None:
    intent = await create(client)
    assert (intent.status, intent.amount_received, intent.currency) == ("succeeded", 1999, "eur")
    assert intent.metadata["order"] == "7"
    assert fake.account.charges == [{"payment_intent": intent.id, "amount": 1999, "metadata": {"order": "7"}}]
    assert (await client.v1.payment_intents.retrieve_async(intent.id)).status == "succeeded"


async def test_one_key_is_one_charge_and_another_key_another(fake: FakeStripe, client: stripe.StripeClient) -> None:
    first, again, other = [await create(client, key) for key in ("a", "a", "b")]
    assert first.id == again.id != other.id
    assert again.last_response.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.last_response.headers
    assert len(fake.account.charges) == 2
    await create(client, None)
    await create(client, None)
    assert len(fake.account.charges) == 4


async def test_other_parameters_under_one_key_are_an_error(fake: FakeStripe, client: stripe.StripeClient) -> None:
    intent = await create(client)
    with pytest.raises(stripe.IdempotencyError, match="the parameters that they were first used with"):
        await create(client, amount=2000)
    with pytest.raises(stripe.IdempotencyError):
        await client.v1.refunds.create_async({"payment_intent": intent.id}, {"idempotency_key": "k"})
    assert len(fake.account.charges) == 1


async def test_a_refusal_is_kept_and_a_wrong_parameter_is_not(fake: FakeStripe, client: stripe.StripeClient) -> None:
    with pytest.raises(stripe.InvalidRequestError) as wrong:
        await create(client, amount=0)
    assert (wrong.value.code, wrong.value.param) == ("parameter_invalid_integer", "amount")
    for _ in range(2):
        with pytest.raises(stripe.CardError) as declined:
            await create(client, payment_method="pm_card_visa_chargeDeclined")
        assert declined.value.code == "card_declined"
    assert declined.value.headers is not None
    assert declined.value.headers["Idempotent-Replayed"] == "true"
    assert declined.value.error is not None
    assert declined.value.error.payment_intent is not None
    assert declined.value.error.payment_intent["status"] == "requires_payment_method"
    with pytest.raises(stripe.IdempotencyError):
        await create(client)  # another card under the key of the declined one
    assert fake.account.charges == []


async def test_a_key_whose_request_is_being_executed_is_a_conflict(
    fake: FakeStripe, client: stripe.StripeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    begun, go_on = asyncio.Event(), asyncio.Event()
    create_slowly = fake.account.create

    def slow(given: Any) -> Any:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(20)
        return create_slowly(given)

    monkeypatch.setattr(fake.account, "create", slow)
    first = asyncio.create_task(create(client))
    await begun.wait()
    with pytest.raises(stripe.APIError) as conflict:
        await create(client)
    assert (conflict.value.http_status, code_of(conflict.value)) == (409, "idempotency_key_in_use")
    go_on.set()
    assert (await first).status == "succeeded"
    assert (await create(client)).id == (await first).id


async def test_keys_are_forgotten_after_their_time(fake: FakeStripe, client: stripe.StripeClient) -> None:
    first = await create(client)
    fake.advance(24 * 3600 - 1)
    assert (await create(client)).id == first.id
    fake.advance(1)
    assert (await create(client)).id != first.id


AFTER_THE_EFFECT = ("hang_after", "drop_after", "error_after")
KEPT = ("error_before", "error_after")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_fault_does_what_it_says_and_the_next_attempt_gets_what_is_kept(fake: FakeStripe, kind: Kind) -> None:
    # Only who hangs is waited for; the limit covers connecting too, and must not end what is only slow.
    client = client_of(fake, timeout=2.0 if kind.startswith("hang") else 20.0)
    fake.faults.replace([Fault(kind, times=1)])
    with pytest.raises(stripe.StripeError) as failed:
        await create(client)
    status = {"rate": 429, "lock": 429, "conflict": 409, "error_before": 500, "error_after": 500}.get(kind)
    assert failed.value.http_status == status
    assert code_of(failed.value) == {
        "rate": "rate_limit",
        "lock": "lock_timeout",
        "conflict": "idempotency_key_in_use",
    }.get(kind)
    assert len(fake.account.charges) == (kind in AFTER_THE_EFFECT)
    if kind in KEPT:
        with pytest.raises(stripe.APIError) as kept:
            await create(client)
        assert kept.value.headers is not None
        assert kept.value.headers["Idempotent-Replayed"] == "true"
        return
    intent = await create(client)
    assert [charge["payment_intent"] for charge in fake.account.charges] == [intent.id]


async def test_every_tenth_fails_and_no_other(fake: FakeStripe, client: stripe.StripeClient) -> None:
    fake.faults.replace([Fault("error_before", every=10, times=2)])
    failed = []
    for n in range(40):
        try:
            await create(client, str(n))
        except stripe.APIError:
            failed.append(n)
    assert failed == [9, 19]


async def test_who_must_be_present_is_asked_and_who_is_not_is_declined(
    fake: FakeStripe, client: stripe.StripeClient
) -> None:
    with pytest.raises(stripe.CardError) as absent:
        await create(client, payment_method="pm_card_authenticationRequired")
    assert absent.value.code == "authentication_required"
    intent = await create(client, "present", payment_method="pm_card_authenticationRequired", off_session=None)
    assert intent.status == "requires_action"
    assert fake.account.settle(intent.id, succeeded=True)["status"] == "succeeded"
    bank = await create(client, "bank", payment_method="pm_usBankAccount_success")
    assert bank.status == "processing"
    assert fake.account.settle(bank.id, succeeded=False)["status"] == "requires_payment_method"
    assert [charge["payment_intent"] for charge in fake.account.charges] == [intent.id]


async def test_what_was_authorised_is_captured_once_or_let_go(fake: FakeStripe, client: stripe.StripeClient) -> None:
    held, other = [await create(client, key, capture_method="manual") for key in "ab"]
    assert (held.status, held.amount_capturable, fake.account.charges) == ("requires_capture", 1999, [])
    with pytest.raises(stripe.InvalidRequestError):
        await client.v1.payment_intents.capture_async(held.id, {"amount_to_capture": 2000})
    taken = await client.v1.payment_intents.capture_async(held.id, {"amount_to_capture": 1500})
    assert (taken.status, taken.amount_received) == ("succeeded", 1500)
    for change in (client.v1.payment_intents.capture_async, client.v1.payment_intents.cancel_async):
        with pytest.raises(stripe.InvalidRequestError) as late:
            await change(held.id)
        assert late.value.code == "payment_intent_unexpected_state"
    assert (await client.v1.payment_intents.cancel_async(other.id)).status == "canceled"
    assert [charge["amount"] for charge in fake.account.charges] == [1500]


async def test_no_more_is_given_back_than_came(fake: FakeStripe, client: stripe.StripeClient) -> None:
    intent = await create(client)
    part = await client.v1.refunds.create_async({"payment_intent": intent.id, "amount": 500, "reason": "duplicate"})
    assert (part.amount, part.status, part.reason) == (500, "succeeded", "duplicate")
    with pytest.raises(stripe.InvalidRequestError, match="greater than what is left"):
        await client.v1.refunds.create_async({"payment_intent": intent.id, "amount": 1500})
    rest = await client.v1.refunds.create_async({"payment_intent": intent.id})
    assert rest.amount == 1499
    with pytest.raises(stripe.InvalidRequestError) as empty:
        await client.v1.refunds.create_async({"payment_intent": intent.id})
    assert empty.value.code == "charge_already_refunded"
    found = await client.v1.refunds.list_async({"payment_intent": intent.id})
    assert [each.id for each in found.data] == [rest.id, part.id]
    assert [charge["amount"] for charge in fake.account.charges] == [1999, -500, -1499]


async def test_lists_give_everything_once_newest_first_in_pages(fake: FakeStripe, client: stripe.StripeClient) -> None:
    made = []
    for n in range(25):
        fake.advance(10)
        made.append(await create(client, str(n), customer=f"cus_{n % 2}"))
    pages = await client.v1.payment_intents.list_async({"limit": 10})
    assert [each.id async for each in pages.auto_paging_iter()] == [each.id for each in reversed(made)]
    since = await client.v1.payment_intents.list_async({"created": {"gte": made[20].created}, "customer": "cus_0"})
    assert [each.id for each in since.data] == [made[n].id for n in (24, 22, 20)]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"currency": "EURO"}, "currency"),
        ({"currency": "kwd", "amount": 1005}, "amount"),
        ({"amount": 100_000_000}, "amount"),
        ({"amount": None}, "amount"),
        ({"amount": "1.5"}, "amount"),
        ({"payment_method": "pm_unknown"}, "payment_method"),
        ({"payment_method": None}, "payment_method"),
        ({"confirm": None}, "off_session"),
    ],
)
async def test_wrong_parameters_are_named(client: stripe.StripeClient, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(stripe.InvalidRequestError) as wrong:
        await create(client, **changes)
    assert wrong.value.param == param


async def test_a_wrong_key_and_an_unknown_object_are_refused(fake: FakeStripe, client: stripe.StripeClient) -> None:
    with pytest.raises(stripe.AuthenticationError):
        await create(client_of(fake, "sk_test_other"))
    with pytest.raises(stripe.InvalidRequestError) as unknown:
        await client.v1.payment_intents.retrieve_async("pi_unknown")
    assert (unknown.value.http_status, unknown.value.code) == (404, "resource_missing")
    with contextlib.suppress(stripe.StripeError):
        await create(client, "x" * 256)
    assert fake.account.charges == []


async def test_twenty_at_once_under_one_key_are_one_charge(fake: FakeStripe) -> None:
    clients = [client_of(fake) for _ in range(20)]
    answers = await asyncio.gather(*(create(client) for client in clients), return_exceptions=True)
    assert len(fake.account.charges) == 1
    paid = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert paid
    assert {intent.id for intent in paid} == {fake.account.charges[0]["payment_intent"]}
    conflicts = [answer for answer in answers if isinstance(answer, BaseException)]
    assert {getattr(conflict, "http_status", conflict) for conflict in conflicts} <= {409}


def test_a_request_whose_client_died_in_the_middle_of_it_is_not_executed(
    fake: FakeStripe, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = b"amount=1999&currency=eur&payment_method=pm_card_visa&confirm=true"
    head = (
        "POST /v1/payment_intents HTTP/1.1\r\nHost: x\r\nIdempotency-Key: cut\r\n"
        f"Authorization: Bearer {fake.secret_key}\r\nContent-Length: {len(whole)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", int(fake.url.rpartition(":")[2]))) as dying:
        dying.sendall(head + whole[:-1])  # without its end it says `confirm=tru`
        dying.shutdown(socket.SHUT_WR)
        assert dying.recv(1000) == b""
    assert fake.account.list("payment_intents", {})["data"] == []
    assert capfd.readouterr().err == ""
