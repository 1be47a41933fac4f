"""`pgbridge-worker reconcile` as an operator runs it, after a worker that gave up while Stripe did not answer."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

from bridge.brokers.contract import CONFIRMED
from bridge.brokers.registry import broker_of
from bridge.event import Event
from bridge.settings import PostgresSettings, load
from tests.support.daemons import Daemon, run_command
from tests.support.events import make_event
from tests.support.servers import RabbitMQServer
from tests.support.until import until
from tests.support.working import replies
from workers.payments.fake.faults import Fault
from workers.payments.fake.server import FakeStripe

SETTINGS = """
name = "shop"
[postgres]
dsn = {dsn}
[sinks.e]
type = "rabbitmq"
url = "{url}"
exchange = "{name}"
[workers.{name}]
handler = "workers.payments:pay"
concurrency = 8
max_attempts = 1
timeout = "5s"
reply = "shop.rendered"
[workers.{name}.options]
api_key = "{key}"
api_base = "{stripe}"
timeout = "{limit}"
[workers.other]
handler = "tests.support.worker_handlers:echo"
subscribe = ["t"]
[observe]
log_format = "json"
"""
CHARGE: dict[str, Any] = {"amount": 1999, "currency": "eur", "payment_method": "pm_card_visa"}


class Payments:
    """A worker that pays, its events, and the command."""

    def __init__(self, fake: FakeStripe, database: str, worker: Daemon, name: str) -> None:
        self.fake, self.database, self.worker, self.name = fake, database, worker, name
        settings = load(worker.config, environ={}).sinks["e"]
        self._sink = broker_of(settings).sink(settings)

    async def request(self, events: Sequence[Event]) -> None:
        await self._sink.open()
        try:
            assert list(await self._sink.publish(events)) == [CONFIRMED] * len(events)
        finally:
            await self._sink.close()

    async def until_dead(self, number: int) -> None:
        await until(lambda: self._count("ended_at IS NOT NULL", number), f"{number} are dead", limit=60.0)

    async def until_replied(self, number: int) -> None:
        async def are() -> bool:
            return len(await asyncio.to_thread(replies, self.database)) >= number

        await until(are, f"{number} have replied", limit=180.0)

    async def _count(self, condition: str, number: int) -> bool:
        return await asyncio.to_thread(self.sql, f"SELECT count(*) FROM bridge.inbox WHERE {condition}") == [(number,)]

    def sql(self, query: str) -> list[Any]:
        with psycopg.connect(self.database, autocommit=True) as connection:
            cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []

    def move_back(self, hours: int) -> None:
        """As if all that was begun had been begun so long before, here and at Stripe, whose clock goes on."""
        self.sql(
            "UPDATE bridge.inbox SET effects = jsonb_set(effects, '{charge,started_at}', "
            f"to_jsonb((effects #>> '{{charge,started_at}}')::timestamptz - interval '{hours} hours'))"
        )

    async def reconcile(self, *words: str, code: int = 0) -> list[dict[str, Any]]:
        done = await asyncio.to_thread(self.run, *words, "--json")
        assert done.returncode == code, done.stdout + done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def run(self, *words: str) -> Any:
        return run_command("reconcile", self.name, "--config", str(self.worker.config), *words, module="workers.cli")


Make = Callable[..., Payments]


@pytest.fixture
async def payments(
    shop: PostgresSettings, bridge_database: str, rabbitmq: RabbitMQServer, unique: str, tmp_path: Path
) -> AsyncIterator[Payments]:
    with FakeStripe() as fake:
        text = SETTINGS.format(
            dsn=json.dumps(shop.dsn.get_secret_value()),
            url=rabbitmq.url,
            name=unique,
            stripe=fake.url,
            key=fake.secret_key,
            limit="3s",
        )
        worker = Daemon(tmp_path / "worker", text, "run", unique, module="workers.cli")
        done = run_command("topology", "--apply", "--config", str(worker.config))
        assert done.returncode == 0, done.stdout + done.stderr
        with worker:
            await asyncio.to_thread(worker.wait_for, "worker.started")
            yield Payments(fake, bridge_database, worker, unique)
            worker.stop()


def requested(number: int, **payload: Any) -> list[Event]:
    return [make_event(topic="shop.payment.requested", payload={**CHARGE, **payload}) for _ in range(number)]


async def test_what_timed_out_after_the_effect_is_settled_and_its_reply_runs_once(payments: Payments) -> None:
    payments.fake.faults.replace([Fault("drop_after", every=10)])
    events = requested(200)
    await payments.request(events)
    await payments.until_dead(20)
    await payments.until_replied(180)
    shown = await payments.reconcile("--dry-run")
    assert Counter(each["done"] for each in shown) == {"to be settled, then replayed": 20}
    assert len(await asyncio.to_thread(replies, payments.database)) == 180

    payments.fake.faults.replace([])
    found = await payments.reconcile()
    assert Counter((each["verdict"], each["outcome"]["status"], each["done"]) for each in found) == {
        ("happened", "succeeded", "settled, replayed"): 20
    }
    await payments.until_replied(200)
    assert await payments.reconcile() == []
    charged = Counter(charge["metadata"]["pgbridge_event"] for charge in payments.fake.account.charges)
    assert charged == {event.id: 1 for event in events}
    told = await asyncio.to_thread(replies, payments.database)
    assert Counter(reply["payment_intent"] for reply in told) == Counter(
        charge["payment_intent"] for charge in payments.fake.account.charges
    )
    audit = payments.sql("SELECT action, count(*), min(why) FROM bridge.dead_letter_audit GROUP BY 1 ORDER BY 1")
    assert [(action, count) for action, count, _ in audit] == [("replayed", 20), ("settled", 20)]
    assert "succeeded" in audit[1][2]


async def test_what_never_happened_may_begin_again_only_once_nothing_can_be_on_its_way(payments: Payments) -> None:
    payments.fake.faults.replace([Fault("drop_before", times=2)])
    events = requested(2)
    await payments.request(events)
    await payments.until_dead(2)

    found = await payments.reconcile()
    assert [(each["verdict"], each["done"]) for each in found] == [("not_yet", "its key is still good")] * 2
    payments.move_back(hours=25)
    found = await payments.reconcile()
    assert [(each["verdict"], each["done"]) for each in found] == [("never", "settled, not replayed")] * 2
    assert await payments.reconcile() == []

    # However much later it begins again, the fresh key is as old as its first use.
    assert payments.sql("SELECT effects #> '{charge,started_at}' FROM bridge.inbox") == [(None,), (None,)]
    worker, config = payments.name, str(payments.worker.config)
    done = run_command("dead", "replay", "--worker", worker, "--config", config)
    assert done.returncode == 0, done.stdout + done.stderr
    await payments.until_replied(2)
    assert {charge["metadata"]["pgbridge_key"][-2:] for charge in payments.fake.account.charges} == {":2"}
    assert len(payments.fake.account.charges) == 2


async def test_what_never_happened_happens_now_where_that_is_asked_for(payments: Payments) -> None:
    payments.fake.faults.replace([Fault("drop_before", times=2)])
    await payments.request(requested(2))
    await payments.until_dead(2)
    assert {each["done"] for each in await payments.reconcile("--again", "--dry-run")} == {
        "its key is still good, then replayed"
    }
    payments.move_back(hours=25)
    assert {each["done"] for each in await payments.reconcile("--again")} == {"settled, replayed"}
    await payments.until_replied(2)
    assert len(payments.fake.account.charges) == 2


async def test_captures_refunds_and_cancels_are_found_out_too(payments: Payments) -> None:
    await payments.request(requested(3, capture=False))
    await payments.until_replied(3)
    first, second, third = [reply["payment_intent"] for reply in replies(payments.database)]
    payments.fake.faults.replace([Fault("drop_after")])
    wanted: list[dict[str, Any]] = [
        {"operation": "capture", "payment_intent": first, "amount": 1500},
        {"operation": "cancel", "payment_intent": second},
    ]
    await payments.request([make_event(topic="shop.payment.requested", payload=payload) for payload in wanted])
    await payments.until_dead(2)
    payments.fake.account.capture(third, {})
    refund = {"operation": "refund", "payment_intent": third, "amount": 500}
    await payments.request([make_event(topic="shop.payment.requested", payload=refund)])
    await payments.until_dead(3)
    payments.fake.faults.replace([])
    found = await payments.reconcile()
    assert {(each["operation"], each["outcome"]["status"], each["outcome"]["amount"]) for each in found} == {
        ("capture", "succeeded", 1500),
        ("cancel", "canceled", 0),
        ("refund", "succeeded", -500),
    }
    await payments.until_replied(6)
    assert [charge["amount"] for charge in payments.fake.account.charges] == [1500, 1999, -500]


async def test_what_no_command_can_find_out_is_left_and_told(payments: Payments) -> None:
    payments.fake.faults.replace([Fault("drop_before", times=1)])
    await payments.request(requested(1))
    await payments.until_dead(1)
    payments.sql("UPDATE bridge.inbox SET effects = effects #- '{charge,given}'")
    found = await payments.reconcile(code=1)
    assert [(each["verdict"], each["done"]) for each in found] == [("unknown", "not of pay(): look yourself")]
    done = await asyncio.to_thread(payments.run)
    assert "1 left that only a person can find out" in done.stderr


async def test_many_are_looked_for_in_one_pass_of_stripes_list(payments: Payments) -> None:
    payments.fake.faults.replace([Fault("drop_after", every=2)])
    await payments.request(requested(240))
    await payments.until_dead(120)
    before = payments.fake.faults.requests
    assert len(await payments.reconcile("--dry-run")) == 120
    assert payments.fake.faults.requests - before <= 3  # pages of a hundred


async def test_stripe_that_refuses_the_key_or_is_away_and_a_worker_that_pays_nothing_are_told(
    payments: Payments,
) -> None:
    payments.fake.faults.replace([Fault("drop_after", times=1)])
    await payments.request(requested(1))
    await payments.until_dead(1)
    config = payments.worker.config
    text = config.read_text()
    config.write_text(text.replace(payments.fake.secret_key, "sk_test_revoked"))
    done = payments.run()
    assert (done.returncode, "Stripe refuses the API key" in done.stderr) == (69, True)
    assert "sk_test_revoked" not in done.stderr
    config.write_text(text.replace(payments.fake.url, "http://127.0.0.1:9"))
    done = payments.run()
    assert (done.returncode, "Stripe does not answer" in done.stderr) == (69, True)
    done = run_command("reconcile", "other", "--config", str(config), module="workers.cli")
    assert done.returncode == 2
    assert "this is for workers whose handler takes PaymentOptions" in done.stderr
