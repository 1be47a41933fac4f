"""The console's pages of workers and of webhooks in a real Chromium."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest

from bridge.postgres.schema import migrate
from tests.support.chromium import Chromium
from tests.support.console import TOKEN, TOKENS, console_settings
from tests.support.daemons import Daemon
from tests.support.servers import PostgresServer
from tests.support.webhooks import Webhooks

WORKERS = """
[workers.invoices]
handler = "a:b"
subscribe = ["#"]
sink = "events"
[workers.mails]
handler = "a:b"
subscribe = ["#"]
sink = "events"
"""

FILLED = """
insert into bridge.inbox (worker, event_id, attempts, started_at, finished_at, due_at, failure, ended_at, effects)
select w, gen_random_uuid(), 1 + mod(n, 3), now() - n * interval '7 s',
    case when n > 8 then now() - n * interval '6.9 s' end,
    case when n between 4 and 6 then now() + interval '1 min' end,
    case when n = 7 then '{"code": "failed", "reason": "ValueError: the printer is out of paper again"}' end::jsonb,
    case when n = 8 then now() end,
    case when n = 5 then '{"charge": {"idempotency_key": "k", "started_at": "2026-02-03T04:05:06+00:00"}}'
         else '{}' end::jsonb
from generate_series(1, 30) n, unnest('{invoices,mails}'::text[]) w;
insert into bridge.held (worker, event_id, key)
select 'invoices', gen_random_uuid(), 'customer ' || mod(n, 3) from generate_series(1, 9) n;
insert into bridge.sample
select 15, 'worker', '', w, to_timestamp(floor(extract(epoch from now()) / 15) * 15) - (n - 40) * interval '15 s', 15,
    jsonb_build_object('handled', 100 + mod(n * 37, 60), 'retried', mod(n, 3), 'in_hand', 30 + mod(n, 7),
                       'le_0.005', 40, 'le_0.01', 55, 'le_0.025', 8, 'le_0.05', 2),
    '{"queue_depth": 12}'
from generate_series(0, 240) n, unnest('{invoices,mails}'::text[]) w; -- those of the next minutes, too
"""


@dataclass
class Shop:
    """A console, and what it shows."""

    hooks: Webhooks
    base: str


@pytest.fixture(scope="module")
def shop(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    dsn = postgres.create_database("console_workers")
    migrate(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(FILLED.encode())
    settings = console_settings(folder, dsn, TOKENS, WORKERS)
    with Webhooks(dsn) as hooks, Daemon(folder, folder / "bridge.toml", "console") as console:
        hooks.add("{shop.#}", "https://partner.example/hooks/events?token=x", description="the partner", concurrency=9)
        hooks.add("{shop.order}", "https://warehouse.example/in")
        hooks.emit(4, body='{"type":"shop.order","data":{"number":"2026-100001"}}')
        claims = [claim for claim in hooks.claim() if claim.endpoint == 1]
        hooks.record(claims[:1], 200)
        hooks.record(claims[1:3], 500, answer="<h1>Internal Server Error</h1>\n" * 3, schedule=[])
        hooks.one("select bridge.disable_endpoint(1, 'they move to another address')")
        console.wait_for("console.started")
        yield Shop(hooks, f"http://{settings.console.listen}")
    postgres.drop_database("console_workers")


@pytest.fixture
def browser(browser: Chromium, shop: Shop) -> Chromium:
    """An operator is logged in."""
    browser.go(shop.base + "/workers")
    browser.find("#name").send_keys("anna")
    browser.find("#token").send_keys(TOKEN)
    browser.find("form button").click()
    browser.until(lambda: browser.path == "/workers", "the page")
    browser.complaints()  # of the login
    return browser


PAGES = ("/workers", "/workers/invoices", "/webhooks", "/webhooks/1?since=2d", "/webhooks/deliveries/2")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_keeps_anybody_out_and_nothing_scrolls_sideways(
    browser: Chromium, shop: Shop, scheme: str, width: int
) -> None:
    browser.look_like(width, scheme)
    for path in PAGES:
        browser.go(shop.base + path).sees("Live")
        assert browser.ask("return document.documentElement.scrollWidth") == width, path
        assert browser.barriers() == [], path


def test_flow_and_worker_say_what_is_handled_and_what_waits_in_the_queue(browser: Chromium, shop: Shop) -> None:
    for path in ("/", "/workers/invoices"):
        browser.go(shop.base + path).sees("Live")
        facts = browser.ask(
            "return [...document.querySelectorAll('dl div')].map(x => [x.children[0].innerText.toLowerCase(), "
            "x.children[1].innerText])"
        )
        assert ["in its queue", "12"] in facts, path
        browser.sees("Waiting in the queue")
        if path == "/":
            assert [value for what, value in facts if what == "handled" and re.fullmatch(r"[89]\.\d+/s", value)]


def test_a_worker_is_paused_and_goes_on_from_its_own_page(browser: Chromium, shop: Shop) -> None:
    browser.find("tbody th a").click()
    browser.sees("Worker invoices")
    browser.sees("Live")
    browser.find("#why-invoices").send_keys("stocktaking\n")
    browser.sees("The worker invoices is paused")
    assert browser.path == "/workers/invoices"
    browser.sees("by anna (console): stocktaking")
    browser.find("[aria-label='Resume worker invoices']").click()
    browser.sees("The worker invoices goes on")


def test_what_an_endpoint_has_missed_is_counted_and_sent_again(browser: Chromium, shop: Shop) -> None:
    browser.go(shop.base + "/webhooks/1").sees("Live")
    browser.find("#since").send_keys("2d\n")
    browser.sees("2 failed for good, 0 skipped")
    browser.sees("Live")
    assert shop.hooks.states(1)["failed"] == 2
    browser.find("#act-recover form button").click()
    browser.sees("The endpoint 1 is enabled, and 2 deliveries are due now.")
    assert "failed" not in shop.hooks.states(1)
