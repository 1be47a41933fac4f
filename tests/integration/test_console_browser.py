"""The web console in a real Chromium, with a bridge that runs behind it."""

from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest

from bridge.postgres.schema import migrate
from tests.support.chromium import Chromium
from tests.support.console import TOKEN, TOKENS, VIEWER_TOKEN, console_settings
from tests.support.daemons import Daemon
from tests.support.servers import PostgresServer

PAGES = ("/", "/events", "/events/1", "/bridges")


@dataclass
class Shop:
    """A bridge, its console, and what they work on."""

    dsn: str
    console: Daemon
    base: str

    def emit(self, count: int) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute("select bridge.emit('other.a', 'x') from generate_series(1, %s)", (count,))


@pytest.fixture(scope="module")
def shop(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    dsn = postgres.create_database("console_browser")
    migrate(dsn)
    settings = console_settings(folder, dsn, TOKENS)
    with (
        Daemon(folder, folder / "bridge.toml") as bridge,
        Daemon(folder / "c", folder / "bridge.toml", "console") as console,
    ):
        bridge.wait_for("bridge.leading")
        console.wait_for("console.started")
        yield Shop(dsn, console, f"http://{settings.console.listen}")
    postgres.drop_database("console_browser")


def log_in(browser: Chromium, shop: Shop, token: str = TOKEN, path: str = "/") -> None:
    browser.go(shop.base + path)
    assert browser.path.startswith("/login")
    browser.find("#name").send_keys("anna")
    browser.find("#token").send_keys(token)
    browser.find("form button").click()
    browser.until(lambda: browser.path == path, path)


def test_the_picture_follows_what_happens(browser: Chromium, shop: Shop) -> None:
    log_in(browser, shop)
    browser.sees("Live")
    browser.sees("Nothing is wrong")
    before = int(browser.ask("return document.querySelectorAll('.source dd')[1].textContent").replace(",", ""))
    browser.ask("window.isTheSame = true; document.querySelector('nav a').focus()")
    shop.emit(7)
    browser.sees(f"last event {before + 7:,}")
    browser.sees("up to date")
    assert browser.ask("return window.isTheSame === true && document.activeElement.textContent === 'Flow'")


def test_renewals_can_be_paused(browser: Chromium, shop: Shop) -> None:
    log_in(browser, shop)
    browser.sees("Live")
    browser.find("[data-liveness-toggle]").click()
    browser.sees("Paused")
    shown = browser.words
    shop.emit(1)
    browser.find("[data-liveness-toggle]").click()
    browser.sees("Live")
    browser.until(lambda: browser.words != shown, "a newer picture")


def test_a_wrong_token_is_told_and_a_right_one_leads_to_the_page(browser: Chromium, shop: Shop) -> None:
    browser.go(shop.base + "/bridges")
    browser.find("#name").send_keys("anna")
    browser.find("#token").send_keys("x" * 30)
    browser.find("form button").click()
    browser.sees("This token is not right")
    assert browser.find("#name").get_attribute("value") == "anna"
    browser.find("#token").send_keys(TOKEN)
    browser.find("form button").click()
    browser.sees("Bridges and database")
    assert browser.path == "/bridges"
    browser.find(".who button").click()
    browser.sees("Your name")
    browser.complaints()  # of the answer 403


def test_a_sink_is_paused_and_goes_on_and_what_is_being_written_outlasts_renewals(
    browser: Chromium, shop: Shop
) -> None:
    log_in(browser, shop, path="/bridges")
    browser.sees("Live")
    browser.find("#why-events").send_keys("the broker")
    before = browser.ask("return document.querySelector('.facts').textContent")
    shop.emit(3)
    browser.until(
        lambda: bool(browser.ask("return document.querySelector('.facts').textContent") != before), "a renewal"
    )
    browser.find("#why-events").send_keys(" moves\n")
    browser.sees("The sink events is paused")
    browser.sees("by anna (console): the broker moves")
    browser.go(shop.base + "/").sees("paused by anna (console): the broker moves")
    browser.go(shop.base + "/bridges")
    browser.find("[aria-label='Resume sink events']").click()
    browser.sees("The sink events goes on")


def test_a_viewer_sees_no_buttons_that_act(browser: Chromium, shop: Shop) -> None:
    log_in(browser, shop, VIEWER_TOKEN, "/bridges")
    browser.sees("You may look, and not act.")
    assert browser.ask("return document.querySelectorAll('main form').length") == 0


def test_pages_work_without_scripts(browser: Chromium, shop: Shop) -> None:
    browser.allow_scripts(False)
    try:
        log_in(browser, shop)
        shop.emit(1)
        browser.until(lambda: "Last event" in browser.go(shop.base + "/bridges").words, "the bridge")
        browser.find("#why-events").send_keys("no script\n")
        browser.sees("The sink events is paused")
        browser.find("[aria-label='Resume sink events']").click()
        browser.sees("The sink events goes on")
    finally:
        browser.allow_scripts(True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_keeps_anybody_out_and_nothing_scrolls_sideways(
    browser: Chromium, shop: Shop, scheme: str, width: int
) -> None:
    browser.look_like(width, scheme)
    browser.go(shop.base + "/")
    assert browser.barriers() == []
    log_in(browser, shop)
    shop.emit(3)
    for path in PAGES:
        browser.go(shop.base + path).sees("Live")
        assert browser.ask("return document.documentElement.scrollWidth") == width
        assert browser.barriers() == [], path


def test_every_control_that_is_shown_takes_the_focus(browser: Chromium, shop: Shop) -> None:
    log_in(browser, shop)
    browser.go(shop.base + "/bridges").sees("Live")
    controls = "a, button, input:not([type=hidden]), summary, [tabindex='0']"
    seen = browser.ask(
        "return [...document.querySelectorAll(arguments[0])].filter(each => each.checkVisibility())"
        ".filter(each => { each.focus(); return document.activeElement !== each; }).map(each => each.outerHTML)",
        controls,
    )
    assert seen == []
    assert browser.ask("return document.querySelector('.skip').getAttribute('href')") == "#content"


def test_a_console_that_is_gone_is_told_and_the_page_comes_back(browser: Chromium, shop: Shop) -> None:
    log_in(browser, shop)
    browser.sees("Live")
    assert shop.console.stop() == 0
    browser.sees("The console does not answer; trying again")
    shop.console.start()
    shop.console.wait_for("console.started")
    browser.sees("Log in")  # it has forgotten who was logged in
    browser.complaints()  # of the refused connections
