"""The console's pages of webhooks, over endpoints and deliveries as their processes leave them in a real PostgreSQL."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.support.console import TOKEN, TOKENS, VIEWER_TOKEN, Browser, Page, browsing, console_settings
from tests.support.messages import execute
from tests.support.until import until
from tests.support.webhooks import Webhooks


@pytest.fixture
def hooks(bridge_database: str) -> Iterator[Webhooks]:
    with Webhooks(bridge_database) as opened:
        yield opened


def links(page: Page) -> list[str]:
    return [attributes.get("href") or "" for tag, attributes in page.tags if tag == "a"]


async def shows(browser: Browser, path: str, words: str) -> Page:
    """The page, once it says so: what it asks the database is kept for twenty times as long as that took."""
    page = await browser.page(path)

    async def is_there() -> bool:
        nonlocal page
        page = await browser.page(path)
        return words in page.words

    await until(is_there, f"{words} on {path}")
    return page


async def test_without_an_endpoint_the_page_says_how_to_begin(bridge_database: str, tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        page = await browser.page("/webhooks")
        assert "There is no endpoint yet" in page.words
        for words in (
            'handler = "workers.webhooks:fan_out"',
            "pgbridge-worker deliver",
            "pgbridge-worker webhooks add",
        ):
            assert words in page.words
        assert "/webhooks" in links(await browser.page("/"))  # in the menu


async def test_endpoints_are_listed_with_how_each_is_and_without_secrets(
    hooks: Webhooks, bridge_database: str, tmp_path: Path
) -> None:
    for topic in ("ok", "gone", "down", "some"):
        url = f"https://{topic}.example/hook?token=s3cret-{topic}"
        hooks.add(f"{{{topic}}}", url, concurrency=9, description=f"<i>{topic}")
        hooks.emit(6, topic)
    claims = hooks.claim()
    for endpoint, status in ((1, 200), (2, 410), (3, 500)):
        hooks.record([claim for claim in claims if claim.endpoint == endpoint], status)
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        page = await browser.page("/webhooks")
        of = {number: page.words.partition(f"https://{name}.example/hook?… ")[2] for number, name in NAMES.items()}
        assert of[1].startswith("ok; <i>ok ok 0 0 0 0 2")  # due, being sent, failed, skipped, last success
        assert of[2].startswith("gone; <i>gone disabled: it answered 410 Gone since 2")
        assert " UTC 0 0 6 0 –" in of[2][:90]
        assert of[3].startswith("down; <i>down failing, next try in ")
        assert of[4].startswith("some; <i>some ok 0 6 0 0 –")
        assert {f"/webhooks/{number}" for number in NAMES} <= set(links(page))
        for path in ("/webhooks", "/webhooks/1", "/webhooks/2", "/webhooks/deliveries/1"):
            html = (await browser.get(path)).text
            assert not [secret for secret in ("s3cret", "whsec_", "<i>") if secret in html], path


NAMES = {1: "ok", 2: "gone", 3: "down", 4: "some"}


async def test_deliveries_and_their_attempts_are_shown_as_text(
    hooks: Webhooks, bridge_database: str, tmp_path: Path
) -> None:
    hooks.add(url="https://partner.example/hooks", rate=2.5)
    hostile = "<script>alert(1)</script>\x1b[2J"
    [event] = hooks.emit(body='{"n":12345678901234567890.10,"text":"<b>"}')
    hooks.record(hooks.claim(), 500, answer=hostile)
    hooks.make_due()
    hooks.record(hooks.claim(), None)
    hooks.emit(body="x" * 70_000)
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        page = await browser.page("/webhooks/1")
        assert "Endpoint 1" in page.words
        assert "Failing since 2" in page.words
        assert ", 2 in a row" in page.words
        assert "At once, and a second 4, 2.5" in page.words
        assert {"/webhooks/deliveries/1", "/webhooks/deliveries/2"} <= set(links(page))
        answer = await browser.get("/webhooks/deliveries/1")
        page = Page(answer.text)
        assert "<script>alert" not in answer.text
        assert "\x1b" not in answer.text
        assert "<script>alert(1)</script>\\x1b[2J" in page.words
        for words in ("State due Next attempt, not before 2", "UTC 500 100 ms", "UTC none 100 ms"):
            assert words in page.words
        assert '"n": 12345678901234567890.10' in page.words
        assert f"/events/{event}" in links(page)
        large = (await browser.get("/webhooks/deliveries/2")).text
        assert large.count("x" * 65_536) == 1
        assert "x" * 65_537 not in large
        assert "The first 65,536 characters of it." in large
        assert "70,000 bytes" in large


async def test_an_operator_sends_a_delivery_again(hooks: Webhooks, bridge_database: str, tmp_path: Path) -> None:
    hooks.add()
    hooks.emit(2)
    [first, second] = hooks.claim()
    hooks.record([first])
    async with browsing(console_settings(tmp_path, bridge_database, TOKENS)) as browser:
        await browser.log_in(TOKEN)
        own = f"/webhooks/deliveries/{first.delivery}"
        form = {"delivery": str(first.delivery), "back": own}
        assert (await browser.fill("/webhooks/resend", form, of=own)).headers["location"] == own
        assert f"The delivery {first.delivery} is due now" in (await browser.page(own)).words
        assert hooks.delivery(first.delivery)["state"] == "due"
        for number, wrong in (
            (str(second.delivery), "is being sent. Wait"),
            ("99", "no delivery 99"),
            ("x", "'x' is not"),
        ):
            await browser.fill("/webhooks/resend", {"delivery": number, "back": "/webhooks"}, of="/webhooks/1")
            words = (await browser.page("/webhooks")).words
            assert "Not done: " in words
            assert wrong in words


async def test_what_an_endpoint_has_missed_is_counted_and_then_sent_again(
    hooks: Webhooks, bridge_database: str, tmp_path: Path
) -> None:
    hooks.add(concurrency=9)
    hooks.emit(3)
    hooks.record(hooks.claim(), 500, schedule=[])
    hooks.pass_time(30)
    hooks.emit(2)
    hooks.one("select bridge.disable_endpoint(1, 'they moved')")
    async with browsing(console_settings(tmp_path, bridge_database, TOKENS)) as browser:
        await browser.log_in(TOKEN)
        assert "disabled: they moved" in (await browser.page("/webhooks/1")).words
        for since, words in (("1d", "0 failed for good, 2 skipped"), ("2d", "3 failed for good, 2 skipped")):
            page = await browser.page(f"/webhooks/1?since={since}")
            assert words in page.words
        assert "Send these 5 again, and enable it" in page.words
        assert hooks.states(1) == {"failed": 3, "skipped": 2}, "counting does nothing"
        wrong = await browser.page("/webhooks/1?since=yesterday")
        assert "since: 'yesterday' is not a time" in wrong.words
        assert "/webhooks/recover" not in wrong.forms

        since = (await browser.page("/webhooks/1?since=1d")).field("since")
        assert since == "1d"  # of the form that counts; the other one has the time
        at = (datetime.now(UTC) - timedelta(days=1)).isoformat()
        form = {"endpoint": "1", "since": at, "back": "/webhooks/1"}
        answer = await browser.fill("/webhooks/recover", form, of="/webhooks/1")
        assert answer.headers["location"] == "/webhooks/1"
        words = (await browser.page("/webhooks/1")).words
        assert "The endpoint 1 is enabled, and 2 deliveries are due now." in words
        assert hooks.states(1) == {"failed": 3, "due": 2}
        for form, wrong_words in (
            ({"endpoint": "7", "since": "1d"}, "there is no endpoint 7"),
            ({"endpoint": "1"}, "since: give a time"),
            ({"endpoint": "1", "since": "?"}, "since: '?' is not a time"),
        ):
            await browser.fill("/webhooks/recover", form, of="/webhooks/1")
            assert wrong_words in (await browser.page("/webhooks")).words


async def test_more_than_a_statement_should_take_is_left_to_the_command(
    hooks: Webhooks, bridge_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.console.webhooks.MOST_RECOVERED", 2)
    monkeypatch.setattr("bridge.console.webhook.MOST_RECOVERED", 2)
    hooks.add()
    hooks.emit(3)
    hooks.one("select bridge.disable_endpoint(1)")
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        page = await browser.page("/webhooks/1?since=1d")
        assert "pgbridge-worker webhooks recover 1 --since" in page.words
        assert "/webhooks/recover" not in page.forms
        form = {"endpoint": "1", "since": "1d", "back": "/webhooks/1"}
        await browser.fill("/webhooks/recover", form, of="/webhooks/1")
        assert "Not done: more than" in (await browser.page("/webhooks/1")).words
    assert hooks.states(1) == {"skipped": 3}


async def test_an_operator_enables_an_endpoint_and_closes_its_circuit_breaker(
    hooks: Webhooks, bridge_database: str, tmp_path: Path
) -> None:
    hooks.add()
    hooks.emit(1)
    hooks.fail(5, schedule=[5.0] * 9)
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        form = {"endpoint": "1", "back": "/webhooks/1"}
        assert "Close its circuit breaker" in (await browser.page("/webhooks/1")).words
        await browser.fill("/webhooks/enable", form, of="/webhooks/1")
        assert "its circuit breaker is closed now" in (await browser.page("/webhooks/1")).words
        assert hooks.endpoint(1).breaker == "closed"
        hooks.one("select bridge.disable_endpoint(1)")
        page = await shows(browser, "/webhooks/1", "disabled: by hand")
        assert "Enable it" in page.words
        await browser.fill("/webhooks/enable", form, of="/webhooks/1")
        assert (
            "gets what comes from now on; what it has missed stays skipped" in (await browser.page("/webhooks/1")).words
        )
        assert hooks.endpoint(1).disabled_at is None
        assert hooks.states(1) == {"skipped": 1}


async def test_a_viewer_looks_and_does_not_act(hooks: Webhooks, bridge_database: str, tmp_path: Path) -> None:
    hooks.add()
    hooks.emit(1)
    hooks.one("select bridge.disable_endpoint(1)")
    async with browsing(console_settings(tmp_path, bridge_database, TOKENS)) as browser:
        await browser.log_in(VIEWER_TOKEN)
        for path in ("/webhooks/1?since=1d", "/webhooks/deliveries/1"):
            page = await browser.page(path)
            assert "You may look, and not act." in page.words
            assert not [
                form for form in page.forms if form in ("/webhooks/resend", "/webhooks/recover", "/webhooks/enable")
            ]
        for name in ("resend", "recover", "enable"):
            form = {"endpoint": "1", "delivery": "1", "since": "1d"}
            assert (await browser.fill(f"/webhooks/{name}", form, of="/webhooks")).status_code == 403
    assert hooks.states(1) == {"skipped": 1}


@pytest.mark.parametrize("role", ["bridge_viewer", "bridge_relay"])
async def test_logins_of_the_database_see_what_they_may_and_why_not_the_rest(
    hooks: Webhooks, bridge_database: str, unique: str, tmp_path: Path, role: str
) -> None:
    hooks.add()
    hooks.emit(1)
    login = sql.Identifier(unique)
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(sql.SQL("create role {} login in role {}").format(login, sql.Identifier(role)))
        try:
            async with browsing(console_settings(tmp_path, make_conninfo(bridge_database, user=unique))) as browser:
                for path in ("/webhooks", "/webhooks/1", "/webhooks/deliveries/1", "/webhooks/1?since=1d"):
                    page = await browser.page(path)
                    assert ("cannot be shown: " in page.words) == (role == "bridge_relay"), path
                    assert ("shop.order" in page.words or "https://example.com" in page.words) == (
                        role == "bridge_viewer"
                    )
                    assert "/webhooks/resend" not in page.forms
        finally:
            admin.execute(sql.SQL("drop role {}").format(login))


async def test_what_is_not_there_has_no_page(bridge_database: str, tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        for path in ("1", "x", "0", f"{2**63}", "²", "deliveries/1", "deliveries/x", f"deliveries/{2**64}"):
            answer = await browser.get(f"/webhooks/{path}")
            assert answer.status_code == 422, path
        assert (await browser.get("/webhooks?after=x")).status_code == 422


async def test_endpoints_are_listed_a_page_at_a_time_and_counted_so_far(
    hooks: Webhooks, bridge_database: str, tmp_path: Path
) -> None:
    for number in range(41):
        hooks.add(url=f"https://example.com/{number}", topics="{none}")
    await execute(
        bridge_database,
        "insert into bridge.webhook_message (event_id, topic, event_time, body)"
        " select gen_random_uuid(), 't', now(), '{}' from generate_series(1, 1100)",
    )
    await execute(
        bridge_database,
        "insert into bridge.webhook_delivery (endpoint, event_id, state, due_at)"
        " select 1, event_id, 'due', now() from bridge.webhook_message",
    )
    seen: list[str] = []
    path = "/webhooks"
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        assert "100+ 0 0 0" in (await browser.page(path)).words
        assert "1,000+, 0" in (await browser.page("/webhooks/1")).words
        while path:
            page = await browser.page(path)
            seen += dict.fromkeys(link for link in links(page) if link.removeprefix("/webhooks/").isdecimal())
            path = next((link for link in links(page) if link.startswith("/webhooks?after=")), "")
    assert seen == [f"/webhooks/{number}" for number in range(1, 42)]
