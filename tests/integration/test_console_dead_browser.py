"""Dead letters on the console in a real Chromium: what a person sees, selects and confirms, also without scripts."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import aio_pika
import pytest

from bridge.brokers.contract import Failure
from bridge.postgres.schema import migrate
from tests.support.chromium import Chromium
from tests.support.console import TOKEN, TOKENS, VIEWER_TOKEN
from tests.support.daemons import Daemon
from tests.support.dead import bury, give_up
from tests.support.messages import execute
from tests.support.servers import PostgresServer, RabbitMQServer, free_port

SETTINGS = """
name = "test"
[postgres]
dsn = "{dsn}"
[sinks.events]
type = "rabbitmq"
url = "{url}"
exchange = "{worker}"
[[routes]]
topic = "#"
sink = "events"
[workers.{worker}]
handler = "tests.support.worker_handlers:refuse"
[observe]
log_format = "json"
[console]
interval = "200ms"
listen = "127.0.0.1:{port}"
{tokens}
"""
TRACE = 'Traceback (most recent call last):\n  File "invoices.py", line 12, in render\nValueError: no customer 4711'


@dataclass
class Shop:
    """A console, and what it works on."""

    dsn: str
    url: str
    worker: str
    base: str
    ids: list[str]
    """Events that the worker gave up."""


async def fill(dsn: str, url: str, worker: str) -> list[str]:
    await bury(dsn, 60, "events", "too_large", "message %s is larger than 1.5 MB, the limit of the queue shop.orders")
    await bury(dsn, 3, None, "no_route", "no route takes the topic; event %s", "shop.stock.moved")
    await execute(dsn, "select bridge.emit('shop.a', 'x')")
    connection = await aio_pika.connect(url)
    channel = await connection.channel()
    exchange = await channel.declare_exchange(worker, aio_pika.ExchangeType.TOPIC, durable=True)
    await (await channel.declare_queue(f"{worker}-all", durable=True)).bind(exchange, "#")
    failure = Failure("attempts_exhausted", "ValueError: no customer 4711", TRACE, 5)
    ids = await give_up(connection, worker, [b'{"customer": 4711}'] * 5, failure)
    await connection.close()
    return ids


@pytest.fixture(scope="module")
def shop(
    postgres: PostgresServer, rabbitmq: RabbitMQServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    folder: Path = tmp_path_factory.mktemp("shop")
    worker = f"invoices{uuid4().hex[:8]}"
    dsn = postgres.create_database("console_dead_browser")
    migrate(dsn)
    ids = asyncio.run(fill(dsn, rabbitmq.url, worker))
    port = free_port()
    text = SETTINGS.format(dsn=dsn, url=rabbitmq.url, worker=worker, port=port, tokens=TOKENS)
    with Daemon(folder, text, "console") as console:
        console.wait_for("console.started")
        yield Shop(dsn, rabbitmq.url, worker, f"http://127.0.0.1:{port}", ids)
    postgres.drop_database("console_dead_browser")


def log_in(browser: Chromium, shop: Shop, token: str = TOKEN, path: str = "/dead") -> None:
    browser.go(shop.base + path)
    browser.find("#name").send_keys("anna")
    browser.find("#token").send_keys(token)
    browser.find("form button").click()
    browser.until(lambda: browser.path == path, path)


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_nothing_keeps_anybody_out_and_nothing_scrolls_sideways(
    browser: Chromium, shop: Shop, scheme: str, width: int
) -> None:
    browser.look_like(width, scheme)
    log_in(browser, shop)
    for path in (
        "/dead",
        f"/dead/letter?id={shop.worker}:{shop.ids[0]}",
        "/dead/plan?action=replay",
        "/dead/plan?action=discard&code=no_route",
        "/dead/audit",
        "/replay?number=1",
        "/events/1",
    ):
        browser.go(shop.base + path).sees("Live")
        assert browser.ask("return document.documentElement.scrollWidth") == width, path
        assert browser.barriers() == [], path


def test_a_selection_outlasts_renewals_and_is_replayed(browser: Chromium, shop: Shop) -> None:
    log_in(browser, shop)
    browser.sees("Live")
    browser.find(f"[aria-label='Select {shop.worker}:{shop.ids[0]}']").click()
    browser.ask("document.querySelector('[data-liveness-words]').textContent = ''")
    browser.sees("Live")  # which each renewal says
    browser.find("button[value=replay]").click()
    browser.sees("Replay 1 dead letter")
    browser.sees(f"1 back to the queue of the worker {shop.worker}")
    browser.find("#rate").send_keys("5\n")
    browser.sees("1 dead letter replayed.")
    browser.go(shop.base + "/dead/audit").sees("replayed anna (console)")


def test_what_is_being_written_into_a_field_for_an_id_outlasts_renewals(browser: Chromium, shop: Shop) -> None:
    """A form that has a control of that name has no id that is a text."""
    log_in(browser, shop, path="/events")
    browser.sees("Live")
    browser.find("input[name=id]").send_keys("12")
    browser.ask("document.querySelector('[data-liveness-words]').textContent = ''")
    browser.sees("Live")  # which each renewal says
    assert browser.find("input[name=id]").get_attribute("value") == "12"


def test_without_scripts_a_group_is_discarded_with_a_reason(browser: Chromium, shop: Shop) -> None:
    browser.allow_scripts(False)
    try:
        log_in(browser, shop, path="/dead?code=no_route")
        browser.find("a[href*='action=discard']").click()
        browser.sees("Discard 3 dead letters")
        browser.find("#why").send_keys("stock is counted elsewhere\n")
        browser.sees("3 dead letters discarded.")
    finally:
        browser.allow_scripts(True)


def test_a_viewer_sees_letters_and_nothing_that_acts(browser: Chromium, shop: Shop) -> None:
    log_in(browser, shop, VIEWER_TOKEN)
    browser.sees("You may look, and not act.")
    assert browser.ask("return document.querySelectorAll('main form[method=post], [type=checkbox]').length") == 0


def test_a_replay_that_takes_long_is_followed_and_stopped(browser: Chromium, shop: Shop) -> None:
    log_in(browser, shop, path="/dead/plan?action=replay&code=too_large")
    browser.find("#rate").send_keys("4\n")
    browser.sees("it has begun")
    browser.sees("done, of 60")
    browser.until(lambda: int(browser.ask("return document.querySelector('progress')?.value ?? 0")) >= 5, "progress")
    assert browser.barriers() == []
    browser.find("form[action='/dead/stop'] button").click()
    browser.sees("Stopped by anna (console)")
