"""The demo, run as a person runs it: real servers, processes of their own, and an honest count."""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import Connection
from psycopg.conninfo import make_conninfo
from psycopg.rows import TupleRow
from pypdf import PdfReader
from selenium.common.exceptions import WebDriverException

from bridge.demo.brokers import Arrivals
from bridge.demo.figures import Figures
from bridge.demo.partner import Partner
from bridge.demo.servers.guard import tree
from bridge.demo.verdict import Verdict, wrongly_charged
from bridge.postgres.schema import sql_folder
from tests.support import chromium
from tests.support.servers import MissingProgramError, RabbitMQServer
from tests.support.until import until
from workers.webhooks.signature import new_secret, sign

LIMIT = 170.0
ORDERS = 60


def demo(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), capture_output=True, text=True, timeout=LIMIT, check=False, env=environment or dict(os.environ)
    )


def command(*words: str) -> Sequence[str]:
    return [sys.executable, "-m", "bridge.cli", "demo", *words]


@pytest.fixture(scope="module")
def kept(server_folder: Path) -> Path:
    return server_folder / "kept-demo"


@pytest.fixture(scope="module")
def run(kept: Path) -> subprocess.CompletedProcess[str]:
    """One run on the embedded broker, whose folder is kept."""
    return demo("--orders", str(ORDERS), "--rate", "30", "--json", "--keep", str(kept))


def test_every_order_becomes_messages_and_an_invoice_and_nothing_is_lost(
    run: subprocess.CompletedProcess[str],
) -> None:
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["orders"] == told["invoices"] == told["payments"] == told["charges"] == told["deliveries"] == ORDERS
    assert (told["lost"], told["dead_letters"], told["kills"]) == (0, 0, 0)
    # Each order: placed, invoice and payment requested, rendered and done, and at least one change of stock.
    assert told["events"] >= 6 * ORDERS
    assert told["messages"] == told["events"]
    assert told["notifications"]["sent"] == told["notifications"]["heard"]
    assert 0 < told["latency_ms"]["p50"] <= told["latency_ms"]["p99"]


def test_json_is_one_object_on_standard_output_and_progress_on_standard_error(
    run: subprocess.CompletedProcess[str],
) -> None:
    assert len(run.stdout.splitlines()) == 1
    assert f"orders {ORDERS}/{ORDERS}" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_pdfs_carry_number_customer_and_a_total_that_adds_up(
    run: subprocess.CompletedProcess[str], kept: Path
) -> None:
    assert run.returncode == 0, run.stderr
    files = sorted((kept / "invoices").glob("*.pdf"))
    assert len(files) == ORDERS
    customers = set()
    for file in files:
        text = " ".join(PdfReader(file).pages[0].extract_text().split())
        assert file.stem in text
        customers |= {name for name in CUSTOMERS if name in text}
        words = text.split()
        net = Decimal(words[words.index("Net") + 1])
        taxes = [Decimal(words[i + 6]) for i, word in enumerate(words[:-6]) if word == "Tax" and words[i + 3] == "on"]
        assert taxes
        assert Decimal(words[words.index("Total") + 1]) == net + sum(taxes)
    assert len(customers) > 1


CUSTOMERS = ("Straßenbäckerei Müller & Söhne GmbH", "Ελαιώνας Α.Ε.", "Книгарня «Схід»", "Łódzka Herbaciarnia")


def test_logs_of_all_processes_are_json_lines_in_the_folder(run: subprocess.CompletedProcess[str], kept: Path) -> None:
    assert run.returncode == 0, run.stderr
    for name, last in (
        ("bridge", "bridge.stopped"),
        *((worker, "worker.stopped") for worker in ("invoices", "payments", "webhooks")),
        ("sender", "webhook.stopped"),
    ):
        lines = [json.loads(line) for line in (kept / f"{name}.log").read_text().splitlines()]
        assert lines[-1]["action"] == last


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    ended = demo("--keep", str(tmp_path))
    assert ended.returncode == 2
    assert "the folder is not empty" in ended.stderr
    assert (tmp_path / "mine").exists()


@pytest.mark.rabbitmq
def test_kills_of_all_processes_and_the_database_lose_nothing_and_each_page_of_the_console_outlasts_them(
    server_folder: Path,
) -> None:
    try:
        RabbitMQServer(server_folder)
    except MissingProgramError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
    words = command("--broker", "rabbitmq", "--orders", "150", "--rate", "30", "--kill", "--json")
    said: list[str] = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if "The console" in line:
                break
        reading = threading.Thread(target=lambda lines: said.extend(lines), args=(process.stderr,))
        reading.start()
        look_around(said[-1].split()[-1], lambda: process.poll() is not None)
        told = json.loads(process.stdout.read())
        reading.join()
    assert process.returncode == 0, "".join(said)
    assert (told["kills"], told["lost"], told["invoices"], told["dead_letters"]) == (6, 0, 150, 0)
    assert told["charges"] == told["deliveries"] == 150
    assert told["messages"] == told["events"]


def look_around(base: str, ended: Callable[[], bool]) -> None:
    """Goes from page to page of the console in a browser, by its menu, until the demo has ended."""
    if not (chromium.BROWSER.exists() and chromium.DRIVER.exists()):
        assert os.environ.get("CI") != "true", "CI must have it: deploy/install-test-servers installs Chromium"
        return
    seen: dict[str, str] = {}
    with closing(chromium.Chromium()) as browser:
        browser.go(base).sees("Bridge shop")
        paths = browser.ask("return [...document.querySelectorAll('nav a')].map(link => link.getAttribute('href'))")
        # The console ends before the demo has counted.
        with suppress(WebDriverException):
            while not ended():
                for path in paths:
                    words = browser.go(base + path).words
                    assert "Internal" not in words
                    if "As of" in words or path not in seen:
                        seen[path] = words
    assert set(seen) == set(paths)
    assert all("As of" in words for path, words in seen.items() if path in ("/", "/bridges")), seen


def test_a_missing_broker_is_told_with_what_to_install() -> None:
    ended = demo("--broker", "rabbitmq", environment={**os.environ, "PATH": "/nonexistent"})
    assert ended.returncode == 69
    assert "apt-get install rabbitmq-server" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
async def test_everything_that_was_started_ends_with_the_demo(
    signum: signal.Signals, code: int, server_folder: Path, unique: str
) -> None:
    kept = server_folder / unique
    with subprocess.Popen(command("--keep", str(kept)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        console = ""
        for line in process.stdout:
            if b"The console" in line:
                console = line.decode().split()[-1]
            if b"/200  events" in line:
                break
        page = await asyncio.to_thread(httpx.get, console, timeout=30)
        assert "Bridge shop" in page.text
        started = [pid for pid in tree(process.pid) if pid != process.pid]
        # PostgreSQL, the broker, the bridge, three workers, the sender, Stripe, the console, and their guards.
        assert len(started) >= 18
        process.send_signal(signum)
        said = process.stdout.read()
        assert process.wait(60) == code, said
    await until(lambda: not any(_runs(pid) for pid in started), f"all of {started} have ended")


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}/environ").exists() and pid in tree(pid)


# What the count is made of: a verdict that cannot be bad would prove nothing. ---------------------------------------


def verdict(**changes: Any) -> Verdict:
    good: dict[str, Any] = {
        "broker": "NATS JetStream",
        "wanted": 2,
        "figures": Figures(orders=2, events=9, invoices=2, payments=2, unpublished=0, p50=12.0, p99=30.0),
        "messages": 9,
        "duplicates": 0,
        "dead_letters": 0,
        "missing_events": 0,
        "missing_pdfs": (),
        "wrongly_charged": (),
        "charges": 2,
        "deliveries": 2,
        "missing_deliveries": 0,
        "warnings": (1, 1),
        "seconds": 1.0,
        "kills": (),
        "faults": (),
    }
    return Verdict(**{**good, **changes})


def test_a_run_without_loss_is_good() -> None:
    assert verdict().good
    assert verdict(duplicates=3, warnings=(2, 1)).good
    assert verdict().problems() == []


@pytest.mark.parametrize(
    ("changes", "said", "lost"),
    [
        ({"missing_events": 2}, "2 events were committed and never arrived", 2),
        ({"missing_pdfs": ("2026-100001",)}, "1 invoices have no PDF that matches size and SHA-256: 2026-100001", 1),
        (
            {"figures": Figures(orders=1, events=5, invoices=1, payments=1)},
            "1 orders are in the table, 2 were placed",
            0,
        ),
        ({"figures": Figures(orders=2, invoices=2, payments=1)}, "1 of 2 orders are paid", 0),
        ({"wrongly_charged": ("2026-100001",)}, "1 orders were not charged once with their total: 2026-100001", 0),
        ({"missing_deliveries": 1}, "1 webhooks never reached the partner", 1),
        ({"dead_letters": 1}, "1 dead letters", 0),
        ({"faults": ("nothing moved for 90 s",)}, "nothing moved for 90 s", 0),
    ],
)
def test_whatever_is_missing_fails_the_run_and_is_told(changes: dict[str, Any], said: str, lost: int) -> None:
    bad = verdict(**changes)
    assert not bad.good
    assert bad.lost == lost
    assert any(said in line for line in bad.lines())


def test_an_order_that_is_charged_twice_never_or_with_another_amount_is_found() -> None:
    owed = {"1": 100, "2": 200, "3": 300, "4": 400}
    charges = [("1", 100), ("2", 200), ("2", 200), ("3", 299), ("5", 1)]
    told = [{"amount": amount, "metadata": {"order": order}} for order, amount in charges]
    assert list(wrongly_charged(owed, told)) == ["2", "3", "4", "5"]


def test_a_webhook_that_nobody_signed_is_not_counted() -> None:
    with Partner() as partner:
        partner.secret = secret = new_secret()
        for signed_with, status in ((secret, 204), (new_secret(), 401)):
            signature = sign([signed_with], "evt", 1_795_967_713, b"{}")
            headers = {"webhook-id": "evt", "webhook-timestamp": "1795967713", "webhook-signature": signature}
            assert httpx.post(partner.url, content=b"{}", headers=headers).status_code == status
        assert (partner.received, partner.refused) == ({"evt": 1}, 1)


def test_an_event_that_arrives_twice_is_one_message_and_one_duplicate() -> None:
    arrivals = Arrivals()
    arrivals.counts.update(["a", "b", "a"])
    assert (arrivals.messages, arrivals.duplicates) == (2, 1)


# The example's SQL. --------------------------------------------------------------------------------------------------


@pytest.fixture
def seller(bridge_database: str, unique: str) -> Iterator[Connection[TupleRow]]:
    """A login that may place orders and nothing more, in a database with the shop."""
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute((sql_folder() / "examples" / "shop.sql").read_bytes())
        admin.execute(f"create role {unique} login in role shop_seller")
        with psycopg.connect(make_conninfo(bridge_database, user=unique), autocommit=True) as connection:
            yield connection
        admin.execute(f"drop role {unique}")


def place(seller: Connection[TupleRow], items: str, reference: str = "5f2b9c1e-7f7b-4a55-9d5b-3f1c2d1e0a01") -> str:
    row = seller.execute("select shop.place_order(%s, 1, %s)", (reference, items)).fetchone()
    assert row is not None
    number: str = row[0]
    return number


def test_an_order_that_is_sent_again_is_placed_once(seller: Connection[TupleRow], bridge_database: str) -> None:
    first = place(seller, '[{"sku": "CUP", "quantity": 2}]')
    assert place(seller, '[{"sku": "CUP", "quantity": 2}]') == first
    with psycopg.connect(bridge_database) as admin:
        topics = admin.execute("select topic from bridge.outbox order by id").fetchall()
    assert [row[0] for row in topics] == [
        "shop.stock.updated",
        "shop.order.placed",
        "shop.invoice.requested",
        "shop.payment.requested",
    ]


def test_tax_is_rounded_once_per_rate_on_the_sum_of_its_lines(seller: Connection[TupleRow]) -> None:
    # 3 * 3.33 = 9.99 and 12.90 at 19 %: 22.89, tax 4.3491; 6.95 at 7 %: tax 0.4865.
    place(
        seller,
        '[{"sku": "SIEVE", "quantity": 3}, {"sku": "CUP", "quantity": 1}, {"sku": "TEA-GREEN", "quantity": 1}]',
    )
    row = seller.execute("select net::text, tax::text, total::text from shop.orders").fetchone()
    assert row == ("29.84", "4.84", "34.68")


@pytest.mark.parametrize("items", ["[]", "null", '[{"sku": "X", "quantity": 1}]', '[{"sku": "CUP", "quantity": 999}]'])
def test_an_order_that_cannot_be_filled_leaves_no_event(
    seller: Connection[TupleRow], bridge_database: str, items: str
) -> None:
    with pytest.raises((psycopg.errors.InvalidParameterValue, psycopg.errors.CheckViolation)):
        place(seller, items)
    with psycopg.connect(bridge_database) as admin:
        assert admin.execute("select count(*) from bridge.outbox").fetchone() == (0,)


def test_the_reply_stores_the_pdf_once_and_tells_it(seller: Connection[TupleRow], bridge_database: str) -> None:
    number = place(seller, '[{"sku": "CUP", "quantity": 2}]')
    sha256 = hashlib.sha256(b"pdf").hexdigest()
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        request = admin.execute("select request from shop.invoices").fetchone()
        assert request is not None
        admin.execute("set role bridge_worker")
        result = json.dumps({"path": "/invoices/1.pdf", "bytes": 3, "sha256": sha256})
        admin.execute("select shop.invoice_rendered(%s, %s)", (request[0], result))
        with pytest.raises(psycopg.errors.NoDataFound):
            admin.execute("select shop.invoice_rendered(gen_random_uuid(), %s)", (result,))
        admin.execute("reset role")
        assert admin.execute("select path, bytes, sha256 from shop.invoices").fetchall() == [
            ("/invoices/1.pdf", 3, sha256)
        ]
        told = admin.execute("select key from bridge.outbox where topic = 'shop.invoice.rendered'").fetchall()
    assert told == [(number,)]


def test_the_till_may_place_orders_and_nothing_else(seller: Connection[TupleRow]) -> None:
    for statement in (
        "update shop.products set price = 0",
        "delete from shop.orders",
        "select * from bridge.outbox",
        "update shop.invoices set path = '/etc/passwd'",
        "select shop.invoice_rendered(gen_random_uuid(), '{}')",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            seller.execute(statement)
