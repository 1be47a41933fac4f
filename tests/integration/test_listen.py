"""`pgbridge-worker listen` as an operator runs it: Stripe's webhooks become events, once each, whoever else calls."""

import asyncio
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import stripe
from pydantic import SecretStr

from bridge.settings import PostgresSettings
from tests.support.daemons import Daemon
from tests.support.servers import PostgresServer, free_port
from tests.support.until import until
from workers import Reject, Retry
from workers.payments import conclude
from workers.payments.fake.server import FakeStripe
from workers.payments.fake.webhooks import signature
from workers.payments.listen import read_notice
from workers.payments.options import ListenOptions
from workers.testing import arun, make_event

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SECRET = "whsec_test_5fd2bd1a"
SETTINGS = """
name = "shop"
[postgres]
dsn = {dsn}
connect_timeout = "2s"
[sinks.e]
type = "memory"
[workers.payments]
handler = "workers.payments:pay"
[workers.payments.options]
api_key = "sk_test_fake"
[workers.payments.options.listen]
address = "127.0.0.1:{port}"
secret = "{secret}"
health = "127.0.0.1:{health}"
[observe]
log_format = "json"
"""
SIGNED = {"id": "evt_1", "type": "payment_intent.succeeded", "data": {"object": {"id": "pi_1"}}}


class Listening:
    """A process that listens, and what it recorded."""

    def __init__(self, daemon: Daemon, dsn: str, port: int, health: int) -> None:
        self.daemon, self.dsn = daemon, dsn
        self.url = f"http://127.0.0.1:{port}/stripe"
        self.port = port
        self._health = f"http://127.0.0.1:{health}"

    def recorded(self) -> list[Any]:
        with psycopg.connect(self.dsn) as connection:
            query = "SELECT topic, key, payload::jsonb FROM bridge.outbox ORDER BY id"
            return connection.execute(query).fetchall()

    def has(self, number: int) -> bool:
        return len(self.recorded()) >= number

    def health(self) -> Any:
        return httpx.get(f"{self._health}/health").json()

    def metric(self, outcome: str) -> float:
        line = f'pgbridge_listener_notices_total{{bridge="shop",outcome="{outcome}",worker="payments"}} '
        found = [each for each in httpx.get(f"{self._health}/metrics").text.splitlines() if each.startswith(line)]
        return float(found[0].removeprefix(line)) if found else 0.0

    def post(self, body: bytes, header: str | None) -> httpx.Response:
        return httpx.post(self.url, content=body, headers={} if header is None else {"Stripe-Signature": header})


def signed(event: Any, *, secret: str = SECRET, ago: float = 0.0) -> tuple[bytes, str]:
    body = event if isinstance(event, bytes) else json.dumps(event).encode()
    return body, signature(secret, body, time.time() - ago)


@pytest.fixture
def listening(shop: PostgresSettings, bridge_database: str, tmp_path: Path) -> Iterator[Listening]:
    port, health = free_port(), free_port()
    dsn = json.dumps(shop.dsn.get_secret_value())
    text = SETTINGS.format(dsn=dsn, port=port, health=health, secret=SECRET)
    with Daemon(tmp_path / "listener", text, "listen", "payments", module="workers.cli") as daemon:
        daemon.wait_for("listener.started")
        yield Listening(daemon, bridge_database, port, health)
        assert daemon.stop() == 0


@pytest.fixture
def fake() -> Iterator[FakeStripe]:
    with FakeStripe() as fake:
        yield fake


def charge(fake: FakeStripe, method: str, *, off_session: bool = True) -> str:
    client = stripe.StripeClient(fake.secret_key, base_addresses={"api": fake.url}, max_network_retries=0)
    intent = client.v1.payment_intents.create(
        {"amount": 500, "currency": "eur", "payment_method": method, "confirm": True, "off_session": off_session}
    )
    return intent.id


async def test_each_webhook_becomes_one_event_however_often_it_comes(listening: Listening, fake: FakeStripe) -> None:
    fake.webhooks.send_to(listening.url, SECRET, copies=3)
    intent = await asyncio.to_thread(charge, fake, "pm_card_authenticationRequired", off_session=False)
    fake.account.settle(intent, succeeded=True)
    types = [
        "stripe.payment_intent.created",
        "stripe.payment_intent.requires_action",
        "stripe.payment_intent.succeeded",
    ]
    await until(lambda: listening.metric("repeated") == 6, "all have come")
    found = listening.recorded()
    assert [(topic, key) for topic, key, _ in found] == [(topic, intent) for topic in types]
    assert found[2][2]["data"]["object"]["amount_received"] == 500
    assert listening.metric("received") == 3
    assert fake.webhooks.refused == []


async def test_the_same_webhook_twenty_times_at_once_is_one_event(listening: Listening) -> None:
    body, header = signed(SIGNED)
    async with httpx.AsyncClient() as client:
        headers = {"Stripe-Signature": header}
        answers = await asyncio.gather(*(client.post(listening.url, content=body, headers=headers) for _ in range(20)))
    assert Counter((answer.status_code, answer.text) for answer in answers) == {
        (200, "recorded\n"): 1,
        (200, "known\n"): 19,
    }
    assert len(listening.recorded()) == 1


def test_what_stripe_did_not_sign_just_now_is_no_notice() -> None:
    body, header = signed(SIGNED)
    options = ListenOptions(address="127.0.0.1:1", secret=SecretStr(SECRET))
    assert read_notice(body, header, options).id == "evt_1"
    not_good = "the signature is not good"
    no_event = "the body is signed, but is not an event"
    for told, claimed, why in [
        (body, None, "there is no header Stripe-Signature"),
        (*signed(SIGNED, secret="whsec_of_somebody_else"), not_good),
        (body + b" ", header, not_good),
        (*signed(SIGNED, ago=400), f"{not_good}: Timestamp outside the tolerance zone"),
        (body, "t=now,v1=00", not_good),
        (body, "", not_good),
        (*signed(b"[1]"), no_event),
        (*signed(b'{"id": 1}'), no_event),
        (*signed(b"{"), no_event),
        (b"\xff", "t=1,v1=00", "the body is not UTF-8"),
    ]:
        with pytest.raises(ValueError, match=why):
            read_notice(told, claimed, options)


def test_what_stripe_did_not_send_is_refused_and_recorded_nowhere(listening: Listening) -> None:
    for body, header in ((b"{}", None), signed(SIGNED, secret="whsec_of_somebody_else"), signed(b"[1]")):
        assert listening.post(body, header).status_code == 400
    assert listening.recorded() == []
    assert listening.metric("refused") == 3
    assert SECRET not in listening.daemon.log.read_text()


async def test_other_methods_and_bodies_without_end_are_refused_and_a_slow_sender_holds_nobody_up(
    listening: Listening,
) -> None:
    assert httpx.get(listening.url).status_code == 405
    assert listening.post(b"x" * 1_000_001, "t=1,v1=00").status_code == 413
    slow = socket.create_connection(("127.0.0.1", listening.port))
    slow.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
    assert listening.post(*signed(SIGNED)).status_code == 200
    slow.settimeout(20.0)
    assert b" 408 " in await asyncio.to_thread(slow.recv, 1000)
    slow.close()


async def test_what_postgresql_does_not_take_comes_again(
    shop: PostgresSettings, postgres: PostgresServer, listening: Listening, fake: FakeStripe
) -> None:
    fake.webhooks.send_to(listening.url, SECRET)
    postgres.freeze()
    try:
        await asyncio.to_thread(charge, fake, "pm_card_visa")
        await until(lambda: listening.health()["status"] == "failing", "health tells", limit=60.0)
        assert "postgres" in listening.health()["problems"][0]
        await until(lambda: 503 in fake.webhooks.refused, "Stripe is told to come again", limit=60.0)
    finally:
        postgres.thaw()
    await until(lambda: listening.has(2), "it came again", limit=60.0)
    await until(lambda: listening.health()["status"] == "ok", "health tells", limit=60.0)
    topics = [topic for topic, _, _ in listening.recorded()]
    assert topics == ["stripe.payment_intent.created", "stripe.payment_intent.succeeded"]
    assert listening.metric("failed") >= 1


def test_an_address_that_is_taken_may_be_free_later(listening: Listening, tmp_path: Path) -> None:
    text = listening.daemon.config.read_text()
    with Daemon(tmp_path / "second", text, "listen", "payments", module="workers.cli") as second:
        assert second.wait() == 69
        assert "workers.payments.options.listen.health: cannot listen" in second.log.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("health")]
    with Daemon(tmp_path / "third", "\n".join(lines), "listen", "payments", module="workers.cli") as third:
        assert third.wait() == 69
        assert "workers.payments.options.listen.address: cannot listen" in third.log.read_text()


def test_without_an_address_it_says_which_setting_is_missing(listening: Listening, tmp_path: Path) -> None:
    text = listening.daemon.config.read_text().partition("[workers.payments.options.listen]")[0]
    with Daemon(tmp_path / "second", text, "listen", "payments", module="workers.cli") as second:
        assert second.wait() == 78
        assert "workers.payments.options.listen: is missing" in second.log.read_text()


async def ended(thing: Any, stripe_at: str) -> Any:
    event = make_event("stripe.payment_intent.succeeded", {"data": {"object": thing}})
    return await arun(conclude, event, options={"api_key": "sk_test_fake", "api_base": stripe_at, "timeout": "1s"})


async def test_the_outcome_is_what_stripe_has_now_whatever_order_its_webhooks_come_in(fake: FakeStripe) -> None:
    given = {"amount": "700", "currency": "eur", "payment_method": "pm_usBankAccount_success", "confirm": "true"}
    intent = fake.account.create({**given, "metadata": {"pgbridge_event": "33ab8a38"}})
    assert (await ended(intent, fake.url))["status"] == "processing"
    fake.account.settle(intent["id"], succeeded=True)
    outcome = await ended(intent, fake.url)  # what came late still says `processing`
    assert (outcome["status"], outcome["amount"], outcome["request"]) == ("succeeded", 700, "33ab8a38")
    refund = fake.account.refund({"payment_intent": intent["id"], "amount": "200"})
    outcome = await ended(refund, fake.url)
    assert (outcome["operation"], outcome["amount"], outcome["request"]) == ("refund", -200, None)


async def test_what_is_no_payment_is_rejected_and_a_stripe_that_does_not_answer_is_asked_again(
    fake: FakeStripe,
) -> None:
    elsewhere = {"object": "payment_intent", "id": "pi_of_another_account"}
    with pytest.raises(Reject, match="is a customer, and neither"):
        await ended({"object": "customer", "id": "cus_1"}, fake.url)
    with pytest.raises(Reject, match="No such payment_intent"):
        await ended(elsewhere, fake.url)
    with pytest.raises(Reject, match="is not an event of Stripe's"):
        await ended({}, fake.url)
    with pytest.raises(Retry, match="Stripe did not say"):
        await ended(elsewhere, f"http://127.0.0.1:{free_port()}")
