"""The web console over HTTP, on a real PostgreSQL: who gets in, who may act, and what pages say."""

import asyncio
import socket
import time
from contextlib import AsyncExitStack, aclosing
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import httpx
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from bridge.console.access import HEADERS
from bridge.console.reader import SELDOM, Subject
from bridge.console.server import Console
from bridge.errors import SettingsError
from bridge.settings import Settings, load
from tests.support.commands import command, json_of
from tests.support.console import (
    TOKEN,
    TOKENS,
    VIEWER_TOKEN,
    Browser,
    Page,
    browsing,
    console_settings,
    events_of,
    served,
)
from tests.support.daemons import Daemon
from tests.support.messages import execute
from tests.support.servers import NOT_DURABLE, NatsServer, PostgresServer, free_port
from tests.support.until import until

POSITIONS = (
    "insert into bridge.cursor (name, sink, mark, gaps, old_gaps, held, horizon, system_identifier, patterns)"
    " values ('test', 'events', 2, '{[1,2)}', '{}', '{}', '3', 1, '{#}'),"
    " ('test', 'other', 5, '{}', '{}', '{[5,6)}', '3', 1, '{other.#}')"
)


NOWHERE = "postgresql://nobody@127.0.0.1:1/none"
"""A database that does not answer, for what asks it nothing."""


@pytest.fixture
async def positions(bridge_database: str) -> str:
    """A database in which a bridge has run that does not lead now."""
    await execute(bridge_database, "select bridge.emit('other.a', 'x') from generate_series(1, 9)")
    await execute(bridge_database, POSITIONS)
    return bridge_database


# Who gets in


@pytest.mark.parametrize("address", ["0.0.0.0", "[::]", "192.0.2.1"])  # noqa: S104 - which is what is refused
def test_a_console_that_is_open_to_a_network_without_a_login_does_not_start(tmp_path: Path, address: str) -> None:
    settings = console_settings(tmp_path, "postgresql:///none", f'listen = "{address}:8417"')
    with pytest.raises(SettingsError, match=r"console\.listen: .* is open to a network.*console\.token"):
        Console(settings)


async def test_the_command_says_so_and_ends_with_78(tmp_path: Path) -> None:
    console_settings(tmp_path, "postgresql:///none", 'listen = "0.0.0.0:8417"')
    _, said = await command("console", "--config", str(tmp_path / "bridge.toml"), expect=78)
    assert "console.listen: 0.0.0.0:8417 is open to a network" in said


@pytest.mark.parametrize("token", ["short", "x" * 19])
def test_a_token_that_can_be_guessed_is_no_token(tmp_path: Path, token: str) -> None:
    with pytest.raises(SettingsError, match=r"console\.token: has \d+ characters"):
        console_settings(tmp_path, "postgresql:///none", f'token = "{token}"')


@pytest.mark.parametrize(
    ("table", "wrong"),
    [
        ('url = "console.example.com"', "console.url: is no address of a console"),
        ('url = "https://example.com/console"', "console.url: is no address of a console"),
        (TOKENS.replace(VIEWER_TOKEN, TOKEN), "console.viewer_token: is the same as token"),
        ("[console.proxy]\naddresses = []", "console.proxy.addresses: "),
        ('[console.proxy]\naddresses = ["proxy.internal"]', "'proxy.internal' is no address, nor a network"),
        ('[console.proxy]\naddresses = ["10.0.0.1"]\nuser_header = "X User"', "console.proxy.user_header: "),
    ],
)
def test_what_is_wrong_in_the_settings_is_named(tmp_path: Path, table: str, wrong: str) -> None:
    with pytest.raises(SettingsError) as refused:
        console_settings(tmp_path, NOWHERE, table)
    assert wrong in str(refused.value)
    assert TOKEN not in str(refused.value)


async def test_on_loopback_everybody_is_in_and_may_act(positions: str, tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, positions)) as browser:
        page = await browser.page("/bridges")
        assert "operator" in page.words
        assert "/bridges/pause" in page.forms


async def test_an_address_that_names_another_host_gets_nothing(tmp_path: Path) -> None:
    """A page of somebody else's, whose name leads to 127.0.0.1, would be its own origin."""
    settings = console_settings(tmp_path, NOWHERE, 'url = "https://console.example.com"')
    async with browsing(settings) as browser:
        for host in ("attacker.example", "attacker.example:8417", "", "127.0.0.1.attacker.example"):
            answer = await browser.get("/", headers={"host": host})
            assert answer.status_code == 421
            assert "console.url" in answer.text
        for host in ("localhost:99", "127.0.0.1", "[::1]:8417", "console.example.com", "CONSOLE.example.com"):
            assert (await browser.get("/", headers={"host": host})).status_code == 200


async def test_whoever_logs_in_comes_to_the_page_that_was_asked_for(tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, NOWHERE, TOKENS)) as browser:
        answer = await browser.get("/bridges?a=b")
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?back=/bridges%3Fa%3Db")
        assert (await browser.get("/live/")).status_code == 401
        login = await browser.page(answer.headers["location"])
        before = dict(browser.cookies)
        form = {key: login.field(key) for key in ("form_token", "back")}
        answer = await browser.post("/login", data={**form, "name": "anna", "token": TOKEN})
        assert (answer.status_code, answer.headers["location"]) == (303, "/bridges?a=b")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert "Secure" not in cookie
        assert dict(browser.cookies) != before  # else who had planted the first one would be logged in, too
        assert "anna operator" in (await browser.page("/")).words
        kept = httpx.Cookies(browser.cookies)
        assert (await browser.fill("/logout", {}, of="/")).status_code == 303
        browser.cookies = kept
        assert (await browser.get("/")).status_code == 303


@pytest.mark.parametrize("back", ["//attacker.example/", "https://attacker.example", "/\\attacker.example", "x"])
async def test_a_login_leads_to_no_other_server(tmp_path: Path, back: str) -> None:
    async with browsing(console_settings(tmp_path, NOWHERE, TOKENS)) as browser:
        answer = await browser.fill("/login", {"name": "anna", "token": TOKEN, "back": back}, of="/login")
        assert (answer.status_code, answer.headers["location"]) == (303, "/")


async def test_behind_tls_the_cookie_goes_over_tls_only(tmp_path: Path) -> None:
    settings = console_settings(tmp_path, NOWHERE, f'url = "https://console.example.com"\n{TOKENS}')
    async with browsing(settings, headers={"host": "console.example.com"}) as browser:
        cookie = (await browser.get("/login")).headers["set-cookie"]
        assert cookie.startswith("__Host-pgbridge-test=")
        assert "; Secure" in cookie


async def test_after_five_wrong_tokens_an_address_waits(tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, NOWHERE, TOKENS)) as browser:
        for _ in range(5):
            answer = await browser.log_in("x" * 30)
            assert answer.status_code == 403
            assert "This token is not right" in Page(answer.text).words
        answer = await browser.log_in(TOKEN)
        assert answer.status_code == 429
        assert 0 < int(answer.headers["retry-after"]) <= 61
        assert TOKEN not in answer.text
        assert (await browser.get("/")).status_code == 303


async def test_a_name_that_cannot_be_written_down_is_refused(tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, NOWHERE, TOKENS)) as browser:
        for name in ("", "  ", "a\nb", "x" * 101):
            assert (await browser.log_in(TOKEN, name)).status_code == 422


async def test_a_login_ends(tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, NOWHERE, f'session = "300ms"\n{TOKENS}')) as browser:
        await browser.log_in(TOKEN)

        async def is_out() -> bool:
            return (await browser.get("/")).status_code == 303

        await until(is_out)
        assert (await browser.get("/live/")).status_code == 401


PROXY = '[console.proxy]\naddresses = ["127.0.0.0/8"]\ngroups_header = "X-Groups"\noperators = ["dba", "erik"]'


async def test_a_proxy_says_who_is_there_and_groups_say_who_may_act(tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, NOWHERE, PROXY)) as browser:
        for headers, role in (
            ({"X-Forwarded-User": "anna"}, "looking only"),
            ({"X-Forwarded-User": "anna", "X-Groups": "staff, dba"}, "operator"),
            ({"X-Forwarded-User": "erik"}, "operator"),
        ):
            page = Page((await browser.get("/", headers=headers)).text)
            assert f"{headers['X-Forwarded-User']} {role}" in page.words
        for wrong in ([], [("X-Forwarded-User", "anna"), ("X-Forwarded-User", "erik")], [("X-Forwarded-User", "")]):
            answer = await browser.get("/", headers=wrong)
            assert answer.status_code == 403
            assert "console.proxy" in answer.text


async def test_a_proxys_header_from_elsewhere_means_nothing(tmp_path: Path) -> None:
    settings = console_settings(tmp_path, NOWHERE, PROXY.replace("127.0.0.0/8", "10.0.0.7"))
    async with browsing(settings) as browser:
        assert (await browser.get("/", headers={"X-Forwarded-User": "erik"})).status_code == 403


# Who may act


async def test_a_viewer_looks_and_does_not_act(positions: str, tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, positions, TOKENS)) as browser:
        await browser.log_in(VIEWER_TOKEN)
        page = await browser.page("/bridges")
        assert "You may look, and not act." in page.words
        assert "/bridges/pause" not in page.forms
        answer = await browser.fill("/bridges/pause", {"sink": "events", "why": "x"}, of="/bridges")
        assert answer.status_code == 403
    assert await rows(positions, "select * from bridge.pause") == []


async def test_a_read_only_console_lets_nobody_act(positions: str, tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, positions, f"read_only = true\n{TOKENS}")) as browser:
        await browser.log_in(TOKEN)
        assert "console.read_only is set" in (await browser.page("/bridges")).words
        answer = await browser.fill("/bridges/pause", {"sink": "events", "why": "x"}, of="/bridges")
        assert answer.status_code == 403
    assert await rows(positions, "select * from bridge.pause") == []


async def test_with_a_viewers_login_in_the_database_the_console_looks_and_says_why_it_does_not_act(
    positions: str, unique: str, tmp_path: Path
) -> None:
    role = sql.Identifier(unique)
    with psycopg.connect(positions, autocommit=True) as admin:
        admin.execute(sql.SQL("create role {} login in role bridge_viewer").format(role))
        try:
            settings = console_settings(tmp_path, make_conninfo(positions, user=unique))
            async with browsing(settings) as browser:
                assert "sink events" in (await browser.page("/")).words
                page = await browser.page("/bridges")
                assert "may only look" in page.words
                token = (await browser.get("/bridges")).text.partition('name="form_token" value="')[2][:64]
                assert token == ""
        finally:
            admin.execute(sql.SQL("drop role {}").format(role))


async def test_a_form_that_is_not_the_consoles_does_nothing(positions: str, tmp_path: Path) -> None:
    settings = console_settings(tmp_path, positions)
    async with served(settings) as (_, base, _), Browser(base) as mine, Browser(base) as theirs:
        form = {"sink": "events", "why": "x"}
        token, other = (
            (await mine.page("/bridges")).field("form_token"),
            (await theirs.page("/bridges")).field("form_token"),
        )
        bare = Browser(base)  # as after SameSite has kept the cookie back
        for browser, data, headers in (
            (mine, form, {}),
            (mine, {**form, "form_token": "x"}, {}),
            (mine, {**form, "form_token": other}, {}),
            (bare, {**form, "form_token": token}, {}),
            (mine, {**form, "form_token": token}, {"origin": "https://attacker.example"}),
            (mine, {**form, "form_token": token}, {"sec-fetch-site": "cross-site"}),
            (mine, {**form, "form_token": token}, {"sec-fetch-site": "same-site"}),
        ):
            answer = await browser.post("/bridges/pause", data=data, headers=headers)
            assert answer.status_code == 403, (data, headers)
        await bare.aclose()
        assert await rows(positions, "select * from bridge.pause") == []
        right = {"origin": base, "sec-fetch-site": "same-origin"}
        answer = await mine.post("/bridges/pause", data={**form, "form_token": token}, headers=right)
        assert answer.status_code == 303
    assert await rows(positions, "select name from bridge.pause") == [("events",)]


async def test_a_form_that_is_too_large_or_no_form_is_refused(tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, NOWHERE)) as browser:
        assert (await browser.post("/bridges/pause", data={"why": "x" * 70_000})).status_code == 413
        assert (await browser.post("/bridges/pause", json={"why": "x"})).status_code == 415
        form = {"content-type": "application/x-www-form-urlencoded"}
        assert (await browser.post("/bridges/pause", content=b"\xff", headers=form)).status_code == 400
        assert (await browser.get("/bridges/pause")).status_code == 405


async def test_a_sink_is_paused_with_a_reason_and_the_persons_name_and_goes_on(positions: str, tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, positions, TOKENS)) as browser:
        await browser.log_in(TOKEN)
        answer = await browser.fill("/bridges/pause", {"sink": "events", "why": " "}, of="/bridges")
        assert answer.headers["location"] == "/bridges"
        assert "Not done: give a reason" in (await browser.page("/bridges")).words
        assert "Not done" not in (await browser.page("/bridges")).words  # it is said once
        answer = await browser.fill("/bridges/pause", {"sink": "nothing", "why": "x"}, of="/bridges")
        assert "Not done: there is no sink 'nothing'" in (await browser.page("/bridges")).words

        await browser.fill("/bridges/pause", {"sink": "events", "why": "the broker moves"}, of="/bridges")
        page = (await browser.page("/bridges")).words  # shown after the act, as a browser without scripts leaves it
        assert "The sink events is paused" in page
        assert "by anna (console): the broker moves" in page
        assert await rows(positions, "select kind, bridge, name, who, why from bridge.pause") == [
            ("sink", "test", "events", "anna (console)", "the broker moves")
        ]
        told, _ = await command("status", "--config", str(tmp_path / "bridge.toml"), expect=1)
        assert "by anna (console): the broker moves" in " ".join(told.split())
        assert "paused by anna (console): the broker moves" in (await browser.page("/")).words
        await browser.fill("/bridges/resume", {"sink": "events"}, of="/bridges")
        page = (await browser.page("/bridges")).words
        assert "The sink events goes on" in page
        assert "anna (console) resumed the sink events" in page
        assert "anna (console) paused the sink events : the broker moves" in page
        assert await rows(positions, "select * from bridge.pause") == []
        assert await rows(positions, "select action, person, role from bridge.pause_audit order by id") == [
            ("paused", "anna (console)", "postgres"),
            ("resumed", "anna (console)", "postgres"),
        ]


# What pages say


async def test_every_answer_has_the_headers_that_keep_a_browser_safe(tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, NOWHERE, TOKENS)) as browser:
        for path in ("/", "/login", "/nothing", "/static/console.css", "/static/nothing", "/live/", "/logout"):
            answer = await browser.get(path)
            for name, value in HEADERS.items():
                wanted = (
                    "no-cache" if (name, answer.status_code, path[:7]) == ("Cache-Control", 200, "/static") else value
                )
                assert answer.headers.get_list(name) == [wanted], (path, name)
        answer = await browser.get("/", headers={"host": "attacker.example"})
        assert answer.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
        await browser.log_in(TOKEN)
        async with browser.stream("GET", "/live/") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert {name: stream.headers[name] for name in HEADERS} == dict(HEADERS)


async def test_what_others_wrote_is_text(positions: str, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>\x1b[31m\u202e"
    await execute(positions, "select bridge.set_pause('sink', 'test', 'events', %s, %s)", hostile, hostile)
    async with browsing(console_settings(tmp_path, positions)) as browser:
        for path in ("/", "/bridges"):
            html = (await browser.get(path)).text
            assert "<img src=x" not in html
            assert "&lt;img src=x onerror=alert(1)&gt;\\x1b[31m\\u202e" in html
            assert "\x1b" not in html


async def test_no_page_holds_a_secret_or_markup_that_the_policy_forbids(positions: str, tmp_path: Path) -> None:
    dsn = make_conninfo(positions, password="hunter2-secret")
    async with browsing(console_settings(tmp_path, dsn, TOKENS)) as browser:
        await browser.log_in(TOKEN)
        for path in ("/", "/bridges", "/nothing"):
            html = (await browser.get(path)).text
            assert not {secret for secret in ("hunter2-secret", TOKEN, VIEWER_TOKEN) if secret in html}
            for tag, attributes in Page(html).tags:
                assert tag != "style"
                assert "style" not in attributes
                assert not [name for name in attributes if name.startswith("on")]
                assert tag != "script" or (attributes.get("src") or "").startswith("/static/")


async def test_the_figures_are_those_of_status(positions: str, tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, positions)) as browser:
        told = await json_of("status", "--config", str(tmp_path / "bridge.toml"), expect=1)
        text, _ = await command("status", "--config", str(tmp_path / "bridge.toml"), expect=1)
        words = (await browser.page("/")).words
        [bridge] = told["bridges"]
        assert f"last event {bridge['last_id']}" in words
        assert f"size {told['guards']['outbox_bytes'] / 1e6:.1f} MB" in words
        assert {sink["sink"]: sink["backlog"] for sink in bridge["sinks"]} == {"events": 8, "other": 5}
        for sink in bridge["sinks"]:
            figures = words.partition(f"sink {sink['sink']} ")[2]
            assert f"backlog {sink['backlog']} " in figures[:200]
            assert f"held {sink['held']} in gaps {sink['gaps']}" in figures[:200]
            row = (await browser.page("/bridges")).words.partition(f"{sink['sink']} {sink['mark']} ")[2]
            assert row.startswith(f"{sink['backlog']} {sink['gaps']} {sink['held']} ")
        leader = "nobody; no bridge of this name is running"
        assert leader in text
        assert f"bridge test leader {leader} Start one: pgbridge run" in words


async def test_who_stands_by_is_counted_as_in_status(bridge_database: str, tmp_path: Path) -> None:
    settings = console_settings(tmp_path, bridge_database)
    with (
        Daemon(tmp_path / "a", tmp_path / "bridge.toml") as first,
        Daemon(tmp_path / "b", tmp_path / "bridge.toml") as second,
    ):
        first.wait_for("bridge.started")
        second.wait_for("bridge.started")
        told = await json_of("status", "--config", str(tmp_path / "bridge.toml"))
        assert [bridge["standing_by"] for bridge in told["bridges"]] == [1]
        async with browsing(settings) as browser:
            assert "; 1 stands by" in (await browser.page("/")).words
            assert "; 1 stands by" in (await browser.page("/bridges")).words


async def test_an_empty_database_says_what_to_do(bridge_database: str, tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        assert "No bridge has run on this database yet. Start one: pgbridge run" in (await browser.page("/")).words
        assert "No bridge has run on this database yet" in (await browser.page("/bridges")).words


async def test_a_page_that_does_not_exist_leads_back(tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, NOWHERE)) as browser:
        answer = await browser.get("/nothing")
        assert answer.status_code == 404
        assert "There is no such page" in Page(answer.text).words


# Live


async def test_a_page_is_renewed_by_itself(positions: str, tmp_path: Path) -> None:
    async with (
        browsing(console_settings(tmp_path, positions)) as browser,
        aclosing(events_of(browser, "/live/")) as live,
    ):
        assert "last event 9 " in Page(await anext(live)).words
        await execute(positions, "select bridge.emit('other.a', 'x') from generate_series(1, 3)")
        async with asyncio.timeout(20):
            async for event in live:
                if "last event 12 " in Page(event).words:
                    break


async def test_ten_browsers_cost_the_database_what_one_does_and_none_costs_nothing(
    positions: str, tmp_path: Path
) -> None:
    settings = console_settings(tmp_path, positions)
    async with served(settings) as (console, base, _):
        async with AsyncExitStack() as stack:
            lives = []
            for _ in range(10):
                browser = await stack.enter_async_context(Browser(base))
                lives.append(await stack.enter_async_context(aclosing(events_of(browser, "/live/"))))
            before, began = console.reader.looks, time.monotonic()
            for _ in range(20):
                await asyncio.gather(*(anext(live) for live in lives))
            looks, seconds = console.reader.looks - before, time.monotonic() - began
            assert 1 <= looks <= seconds / settings.console.interval + 1
            found = await rows(
                positions, "select count(*) from pg_stat_activity where application_name = 'pgbridge test console'"
            )
            assert found == [(1,)]

        async def rests() -> bool:
            before = console.reader.looks
            await asyncio.sleep(5 * settings.console.interval)
            return console.reader.looks == before

        await until(rests)


async def test_a_database_that_is_slow_to_answer_is_asked_less_often(positions: str, tmp_path: Path) -> None:
    settings = console_settings(tmp_path, positions)
    async with served(settings) as (console, base, _), Browser(base) as browser:
        await browser.page("/")
        async with await psycopg.AsyncConnection.connect(positions) as holder:
            await holder.execute("lock table bridge.dead_letter in access exclusive mode")

            async def waits() -> bool:
                await browser.get("/")
                return await _waits_for_a_lock(positions)

            await until(waits)
            began = time.monotonic()
            await asyncio.sleep(0.3)
        asked = await console.reader.look(Subject.BRIDGES)
        held = time.monotonic() - began
        while time.monotonic() - began < 3 * held:
            again = await console.reader.look(Subject.BRIDGES)
            await asyncio.sleep(0.02)
        assert again.status is asked.status


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/", {Subject.BRIDGES, Subject.WORKERS}),
        ("/bridges", {Subject.BRIDGES}),
        ("/workers", {Subject.WORKERS}),
        ("/workers/orders", {Subject.WORKERS}),
        *((path, set()) for path in ("/events", "/events/1", "/replay?number=1", "/dead", "/dead/audit", "/webhooks")),
    ],
)
async def test_a_page_asks_for_what_it_shows_and_no_more(
    positions: str, tmp_path: Path, path: str, asked: set[Subject]
) -> None:
    await execute(positions, "insert into bridge.inbox (worker, event_id) values ('orders', gen_random_uuid())")
    async with served(console_settings(tmp_path, positions)) as (console, base, _), Browser(base) as browser:
        await browser.page(path)
        seen = await console.reader.look()
    known = {Subject.BRIDGES} if seen.status is not None else set()
    known |= {Subject.WORKERS} if seen.workers is not None else set()
    assert (known, seen.outage, seen.may_act) == (asked, None, True)


async def test_what_is_found_among_many_rows_is_asked_for_seldom(positions: str, tmp_path: Path) -> None:
    settings = console_settings(tmp_path, positions)
    async with served(settings) as (console, _, _):

        async def shortest(subject: Subject) -> float:
            """Between two looks of five, in seconds."""
            times: list[datetime] = []
            while len(times) < 5:
                at = (await console.reader.look(subject)).at
                if at is not None and at not in times:
                    times.append(at)
                await asyncio.sleep(settings.console.interval / 10)
            return min((after - before).total_seconds() for before, after in pairwise(times))

        interval = settings.console.interval
        assert await shortest(Subject.BRIDGES) >= interval * 0.99
        assert await shortest(Subject.WORKERS) >= interval * 0.99 * SELDOM


async def test_pages_that_ask_for_different_things_at_different_times_share_the_looks(
    positions: str, tmp_path: Path
) -> None:
    settings = console_settings(tmp_path, positions)
    interval = settings.console.interval
    async with served(settings) as (console, _, _):

        async def page(*subjects: Subject) -> None:
            while time.monotonic() < ends:
                await console.reader.look(*subjects)
                await asyncio.sleep(interval / 20)

        began = time.monotonic()
        ends = began + 30 * interval
        await asyncio.gather(
            page(Subject.BRIDGES, Subject.WORKERS), page(Subject.BRIDGES), page(Subject.WORKERS), page()
        )
        # Each subject for the first time, and then once an interval.
        assert console.reader.looks <= len(Subject) + (time.monotonic() - began) / interval


async def test_a_page_waits_for_its_own_subject_while_another_is_looked_at(positions: str, tmp_path: Path) -> None:
    async with served(console_settings(tmp_path, positions)) as (console, _, _):
        async with await psycopg.AsyncConnection.connect(positions) as holder:
            await holder.execute("lock table bridge.cursor in access exclusive mode")
            first = asyncio.create_task(console.reader.look(Subject.BRIDGES))
            await until(lambda: _waits_for_a_lock(positions), "the look waits")
            second = asyncio.create_task(console.reader.look(Subject.WORKERS))
            await asyncio.sleep(5 * console.parts.settings.console.interval)  # it has asked long ago, and still waits
        seen = await first
        assert (seen.outage, seen.status is None) == (None, False)
        seen = await second
        assert (seen.outage, seen.workers) == (None, ())


async def test_an_outage_lasts_until_all_that_could_not_be_read_can_be(positions: str, tmp_path: Path) -> None:
    settings = console_settings(tmp_path, positions)
    async with served(settings) as (console, _, _):
        rename = "alter function bridge.worker_status(text[], integer) rename to worker_status_gone"
        await execute(positions, rename)
        assert "worker_status" in ((await console.reader.look(Subject.WORKERS)).outage or "")
        looks = console.reader.looks

        async def looked_again() -> bool:
            assert "worker_status" in ((await console.reader.look()).outage or ""), "somebody who asks for less"
            return console.reader.looks > looks

        await until(looked_again)
        await execute(positions, "alter function bridge.worker_status_gone(text[], integer) rename to worker_status")

        async def is_over() -> bool:
            return (await console.reader.look()).outage is None

        await until(is_over)
        assert (await console.reader.look()).workers == ()


async def test_a_stop_ends_open_streams_at_once(positions: str, tmp_path: Path) -> None:
    settings = console_settings(tmp_path, positions)
    async with (
        served(settings) as (_, base, stop),
        Browser(base) as browser,
        aclosing(events_of(browser, "/live/")) as live,
    ):
        await anext(live)
        stop.set()
        async with asyncio.timeout(10):
            async for _ in live:  # one that the server has to end breaks off, which httpx raises
                pass


async def test_sigterm_ends_the_process_with_open_streams_and_0(positions: str, tmp_path: Path) -> None:
    settings = console_settings(tmp_path, positions)
    with Daemon(tmp_path, tmp_path / "bridge.toml", "console") as process:
        process.wait_for("console.started")
        async with (
            Browser(f"http://{settings.console.listen}") as browser,
            aclosing(events_of(browser, "/live/")) as live,
        ):
            await anext(live)
            began = time.monotonic()
            assert await asyncio.to_thread(process.stop) == 0
            assert time.monotonic() - began < 5.0
        process.wait_for("console.stopped")


async def test_while_the_database_is_gone_pages_say_so_and_they_come_back(
    server_folder: Path, unique: str, tmp_path: Path
) -> None:
    from bridge.postgres.schema import migrate

    server = PostgresServer(server_folder / unique, settings=NOT_DURABLE)
    with server:
        dsn = server.create_database("gone")
        migrate(dsn)
        await execute(dsn, "select bridge.emit('other.a', 'x') from generate_series(1, 9)")
        await execute(dsn, POSITIONS)
        async with browsing(console_settings(tmp_path, dsn)) as browser:
            assert "The database does not answer" not in (await browser.page("/")).words
            async with aclosing(events_of(browser, "/live/")) as live:
                await anext(live)
                await asyncio.to_thread(server.stop)
                async with asyncio.timeout(20):
                    async for event in live:
                        if "The database does not answer" in event:
                            break
                words = Page(event).words
                assert "pgbridge check" in words
                assert "What follows is from" in words
                assert "last event 9" in words
                assert "The database does not answer" in (await browser.page("/bridges")).words
                await asyncio.to_thread(server.start)
                async with asyncio.timeout(20):
                    async for event in live:
                        if "The database does not answer" not in event:
                            break
            assert "last event 9" in (await browser.page("/")).words


async def test_a_console_starts_before_its_database(tmp_path: Path) -> None:
    dsn = f"postgresql://nobody@127.0.0.1:{free_port()}/none"
    async with browsing(console_settings(tmp_path, dsn)) as browser:
        for path in ("/", "/bridges"):
            words = (await browser.page(path)).words
            assert "The database does not answer" in words
            assert "postgres.dsn" in words


async def _waits_for_a_lock(dsn: str) -> bool:
    query = "select 1 from pg_stat_activity where application_name like '%console' and wait_event_type = 'Lock'"
    return bool(await rows(dsn, query))


async def rows(dsn: str, query: str) -> list[tuple[object, ...]]:
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        return await (await connection.execute(query.encode())).fetchall()


async def test_what_a_broker_lacks_is_named_and_one_that_is_gone_or_silent_hides_no_other(
    positions: str, nats_server: NatsServer, unique: str, tmp_path: Path
) -> None:
    console_settings(tmp_path, positions)
    config = tmp_path / "bridge.toml"
    silent = socket.create_server(("127.0.0.1", 0))  # takes connections, and says nothing
    sinks = (
        f'[sinks.there]\ntype = "nats"\nurl = "{nats_server.url}"\nstream = "{unique}"\n'
        f'[sinks.silent]\ntype = "nats"\nurl = "nats://127.0.0.1:{silent.getsockname()[1]}"\nstream = "{unique}"\n'
        f'[sinks.gone]\ntype = "nats"\nurl = "nats://127.0.0.1:{free_port()}"\nstream = "{unique}"\n'
    )
    config.write_text(config.read_text().replace("[sinks.other]", f"{sinks}[sinks.other]"))
    with silent:
        await _brokers_are_told(load(config, environ={}), unique)


async def _brokers_are_told(settings: Settings, unique: str) -> None:
    async with browsing(settings) as browser:
        assert "The brokers are being asked" in (await browser.page("/bridges")).words, "it waits for none of them"

        async def words() -> str:
            return (await browser.page("/bridges")).words.partition("What workers need")[2]

        async def is_known() -> bool:
            return await words() != ""

        await until(is_known, "the brokers have been asked")
        found = await words()
        assert "sink events : needs nothing there" in found
        assert f"sink there : stream {unique} is missing: pgbridge topology --apply" in found
        assert "sink gone : not known: sinks.gone.url: " in found
        assert "sink silent : not known: " in found
