"""The payments worker as an operator runs it: processes that are killed, and a Stripe that fails after the effect."""

import asyncio
import json
from collections import Counter
from pathlib import Path

from bridge.brokers.contract import CONFIRMED
from bridge.brokers.registry import broker_of
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
max_attempts = 50
timeout = "5s"
retry_initial = "20ms"
retry_max = "200ms"
reply = "shop.rendered"
[workers.{name}.options]
api_key = "sk_test_fake"
api_base = "{stripe}"
timeout = "1s"
[observe]
log_format = "json"
"""
PAYMENTS = 60
DELIVERIES = 3
"""So often is each event delivered, to whichever process."""


async def test_each_payment_is_charged_once_though_processes_die_and_stripe_does_not_answer(
    shop: PostgresSettings, bridge_database: str, rabbitmq: RabbitMQServer, unique: str, tmp_path: Path
) -> None:
    with FakeStripe() as fake:
        dsn = json.dumps(shop.dsn.get_secret_value())
        text = SETTINGS.format(dsn=dsn, url=rabbitmq.url, name=unique, stripe=fake.url)
        processes = [Daemon(tmp_path / f"process-{n}", text, "run", unique, module="workers.cli") for n in range(3)]
        done = run_command("topology", "--apply", "--config", str(processes[0].config))
        assert done.returncode == 0, done.stdout + done.stderr
        settings = load(processes[0].config, environ={}).sinks["e"]
        sink = broker_of(settings).sink(settings)
        fake.faults.replace([Fault("drop_after", every=7), Fault("error_after", every=11), Fault("rate", every=13)])
        payload = {"amount": 1999, "currency": "eur", "payment_method": "pm_card_visa"}
        events = [make_event(topic="shop.payment.requested", payload=payload) for _ in range(PAYMENTS)]

        async def has(number: int) -> bool:
            return len(await asyncio.to_thread(replies, bridge_database)) >= number

        try:
            await sink.open()
            for process in processes:
                process.start()
            for process in processes:
                await asyncio.to_thread(process.wait_for, "worker.started")
            for _ in range(DELIVERIES):
                assert list(await sink.publish(events)) == [CONFIRMED] * PAYMENTS
            for number in range(1, 4):
                await until(lambda number=number: has(10 * number), "some are paid", limit=90.0)  # type: ignore[misc]
                victim = processes[number % 3]
                victim.kill()
                victim.start()
            await until(lambda: has(PAYMENTS), "all are paid", limit=90.0)
        finally:
            for process in processes:
                process.stop()
            await sink.close()
    charged = Counter(charge["metadata"]["pgbridge_event"] for charge in fake.account.charges)
    assert charged == {event.id: 1 for event in events}
    paid = await asyncio.to_thread(replies, bridge_database)
    assert Counter(reply["status"] for reply in paid) == {"succeeded": PAYMENTS}
    intents = {charge["payment_intent"] for charge in fake.account.charges}
    assert {reply["payment_intent"] for reply in paid} == intents
