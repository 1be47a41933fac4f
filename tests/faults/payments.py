"""`python -m tests.faults.payments`: payments while workers and PostgreSQL are killed, and Stripe is silent.

The fake's ledger must show each payment charged once, and each reply must have run once.
"""

import argparse
import asyncio
import json
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psycopg

from bridge.brokers.contract import CONFIRMED, Sink
from bridge.brokers.registry import broker_of
from bridge.event import Event
from bridge.postgres.schema import migrate
from bridge.settings import load
from tests.faults.world import POSTGRES
from tests.support.daemons import Daemon, run_command
from tests.support.events import make_event
from tests.support.servers import PostgresServer, RabbitMQServer
from tests.support.shop import SHOP
from workers.payments.fake.faults import Fault
from workers.payments.fake.server import FakeStripe

_SETTINGS = """
name = "shop"
[postgres]
dsn = {dsn}
connect_timeout = "5s"
[sinks.e]
type = "rabbitmq"
url = "{url}"
exchange = "payments"
[workers.payments]
handler = "workers.payments:pay"
concurrency = 8
max_attempts = {attempts}
timeout = "5s"
retry_initial = "20ms"
retry_max = "500ms"
reply = "shop.rendered"
[workers.payments.options]
api_key = "sk_test_fake"
api_base = "{stripe}"
timeout = "1s"
[observe]
log_format = "json"
"""
_PATIENCE = 120.0
"""Seconds without a reply after which a run is over."""
_BETWEEN = 8.0
"""Seconds within which something must have been paid before the next kill; else it comes all the same."""


@dataclass(slots=True)
class Report:
    """What came of it."""

    payments: int
    deliveries: int
    worker_kills: int = 0
    database_kills: int = 0
    charged_once: int = 0
    charged_again: int = 0
    replied_once: int = 0
    replied_again: int = 0
    dead_letters: int = 0
    settled: int = 0
    """By `reconcile`."""
    unknown: int = 0
    """Effects without an outcome at the end."""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return (self.charged_once, self.replied_once, self.charged_again, self.replied_again, self.unknown) == (
            self.payments,
            self.payments,
            0,
            0,
            0,
        )


class _World:
    def __init__(
        self, folder: Path, postgres: PostgresServer, rabbitmq: RabbitMQServer, stripe: FakeStripe, attempts: int
    ) -> None:
        self.postgres, self.stripe = postgres, stripe
        self.dsn = postgres.create_database("payments")
        migrate(self.dsn)
        with psycopg.connect(self.dsn, autocommit=True) as admin:
            admin.execute(SHOP.encode())
            admin.execute("CREATE ROLE worker LOGIN IN ROLE bridge_worker")
        text = _SETTINGS.format(
            dsn=json.dumps(postgres.dsn("payments", "worker")),
            url=rabbitmq.url,
            stripe=stripe.url,
            attempts=attempts,
        )
        self.workers = [
            Daemon(folder / f"worker-{number}", text, "run", "payments", module="workers.cli") for number in range(4)
        ]
        self.config = str(self.workers[0].config)
        done = run_command("topology", "--apply", "--config", self.config)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)

    def replied(self) -> int:
        """The number of replies; the last one known while PostgreSQL is down."""
        try:
            with psycopg.connect(self.dsn, connect_timeout=5) as connection:
                row = connection.execute("SELECT count(*) FROM shop.invoice").fetchone()
        except psycopg.OperationalError:
            return 0
        return row[0] if row else 0

    def kill_database(self) -> None:
        self.postgres.kill()
        self.postgres.start()


async def _play(world: _World, report: Report, kills: int, database_kills: int) -> None:
    settings = load(world.workers[0].config, environ={}).sinks["e"]
    sink = broker_of(settings).sink(settings)
    await sink.open()
    payload = {"amount": 1999, "currency": "eur", "payment_method": "pm_card_visa"}
    events = [make_event(topic="shop.payment.requested", payload=payload) for _ in range(report.payments)]
    strikes = ["worker"] * kills + ["database"] * database_kills
    random.shuffle(strikes)
    part = -(-len(events) // (len(strikes) + 1))
    try:
        for worker in world.workers:
            worker.start()
        for number, strike in enumerate(strikes):
            await _publish(sink, events[number * part : (number + 1) * part], report.deliveries)
            before = await asyncio.to_thread(world.replied)
            await _until(world, before + 1, _BETWEEN)
            await asyncio.sleep(random.uniform(0.0, 0.3))
            if strike == "database":
                await asyncio.to_thread(world.kill_database)
                report.database_kills += 1
            else:
                victim = random.choice(world.workers)
                await asyncio.to_thread(victim.kill)
                victim.start()
                report.worker_kills += 1
            if number % 20 == 0:
                print(f"{number:4} kills, {before} replies, {len(world.stripe.account.charges)} charges", flush=True)
        await _publish(sink, events[len(strikes) * part :], report.deliveries)
        await _until_still(world, report)
        await asyncio.to_thread(_reconcile, world, report)
        await _until_still(world, report)
    finally:
        for worker in world.workers:
            await asyncio.to_thread(worker.stop)
        await sink.close()
    _count(world, events, report)


async def _publish(sink: Sink, events: Sequence[Event], deliveries: int) -> None:
    for _ in range(deliveries if events else 0):
        outcomes = await sink.publish(events)
        if list(outcomes) != [CONFIRMED] * len(events):
            raise RuntimeError(f"not confirmed: {outcomes}")


async def _until(world: _World, replies: int, limit: float) -> bool:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if await asyncio.to_thread(world.replied) >= replies:
            return True
        await asyncio.sleep(0.1)
    return False


async def _until_still(world: _World, report: Report) -> None:
    """Until every payment has its reply, or every other one is a dead letter, or nothing moves."""
    seen, moved = -1, time.monotonic()
    while time.monotonic() - moved < _PATIENCE:
        now = await asyncio.to_thread(world.replied)
        with psycopg.connect(world.dsn) as connection:
            [(dead,)] = connection.execute("SELECT count(*) FROM bridge.inbox WHERE ended_at IS NOT NULL").fetchall()
        if now + dead >= report.payments:
            return
        if now != seen:
            seen, moved = now, time.monotonic()
        await asyncio.sleep(0.2)


def _reconcile(world: _World, report: Report) -> None:
    with psycopg.connect(world.dsn) as connection:
        [(report.dead_letters,)] = connection.execute(
            "SELECT count(*) FROM bridge.inbox WHERE ended_at IS NOT NULL"
        ).fetchall()
    world.stripe.faults.replace([])
    # `--again`: of some of them nothing happened, and their keys are still good.
    done = run_command("reconcile", "payments", "--again", "--json", "--config", world.config, module="workers.cli")
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    report.settled = sum(each["verdict"] == "happened" for each in json.loads(done.stdout))
    # What died with its process at its last attempt, before it had begun anything, or after its result was on record.
    done = run_command("dead", "replay", "--worker", "payments", "--config", world.config)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def _count(world: _World, events: Sequence[Event], report: Report) -> None:
    charged = Counter(charge["metadata"]["pgbridge_event"] for charge in world.stripe.account.charges)
    with psycopg.connect(world.dsn) as connection:
        replied = Counter(str(row[0]) for row in connection.execute("SELECT event_id FROM shop.invoice").fetchall())
        [(report.unknown,)] = connection.execute(
            "SELECT count(*) FROM bridge.open_effects('payments', now() - interval '1 day')"
        ).fetchall()
    report.charged_once = sum(charged[event.id] == 1 for event in events)
    report.charged_again = sum(count - 1 for count in charged.values())
    report.replied_once = sum(replied[event.id] == 1 for event in events)
    report.replied_again = sum(count - 1 for count in replied.values())


def main() -> int:
    """The exit code: 1 when anything was charged or replied twice, or never."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.payments", description=__doc__)
    parser.add_argument("--payments", type=int, default=2000, help="default: 2000")
    parser.add_argument("--kills", type=int, default=200, help="of workers (default: 200)")
    parser.add_argument("--database-kills", type=int, default=20, help="default: 20")
    parser.add_argument("--deliveries", type=int, default=1, help="how often each event is published (default: 1)")
    parser.add_argument("--timeouts", type=int, default=0, help="every so many-th call charges and does not answer")
    parser.add_argument("--attempts", type=int, default=50, help="max_attempts (default: 50)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of the random choices")
    wanted = parser.parse_args()
    random.seed(wanted.seed)
    print(f"seed {wanted.seed}", flush=True)
    report = Report(wanted.payments, wanted.deliveries)
    folder = Path(tempfile.mkdtemp(prefix="pgbridge-payments-"))
    folder.chmod(0o755)
    with (
        PostgresServer(folder, settings=POSTGRES) as postgres,
        RabbitMQServer(folder) as rabbitmq,
        FakeStripe() as stripe,
    ):
        if wanted.timeouts:
            stripe.faults.replace([Fault("hang_after", every=wanted.timeouts, path="/v1/payment_intents")])
        world = _World(folder, postgres, rabbitmq, stripe, wanted.attempts)
        started = time.monotonic()
        asyncio.run(_play(world, report, wanted.kills, wanted.database_kills))
        report.seconds = round(time.monotonic() - started, 1)
    print(json.dumps(asdict(report)))
    if report.passed:
        shutil.rmtree(folder)
    else:
        print(f"FAILED; the logs are in {folder}", file=sys.stderr)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
