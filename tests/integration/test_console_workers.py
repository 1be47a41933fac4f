"""The console's pages Workers and One worker, over what real workers have left in a real PostgreSQL."""

import asyncio
from contextlib import aclosing
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from bridge.event import Event
from bridge.postgres import workers
from bridge.postgres.connection import connect
from bridge.settings import PostgresSettings, Settings
from tests.support.commands import json_of
from tests.support.console import TOKEN, TOKENS, VIEWER_TOKEN, Page, browsing, console_settings, events_of
from tests.support.events import make_event
from tests.support.messages import execute
from tests.support.scripted_queue import ScriptedQueue
from tests.support.servers import free_port
from tests.support.until import until
from tests.support.working import working
from workers.effects import effect
from workers.handler import Reject, Result, Retry

WORKER = '[workers.invoices]\nhandler = "a:b"\nsubscribe = ["#"]\nsink = "events"'

LATEST = "to_timestamp(floor(extract(epoch from clock_timestamp()) / 15) * 15 - 15)"
"""The step of 15 seconds that is over last."""


def settings_of(folder: Path, dsn: str, console: str = "") -> Settings:
    return console_settings(folder, dsn, console, WORKER)


def links(page: Page) -> list[str | None]:
    return [attributes.get("href") for tag, attributes in page.tags if tag == "a"]


def section(page: Page, title: str) -> str:
    """The words of a page from a heading on."""
    return page.words.partition(f" {title} ")[2]


async def test_a_worker_at_work_is_shown_with_its_process_and_its_events(
    shop: PostgresSettings, bridge_database: str, tmp_path: Path
) -> None:
    gate = asyncio.Event()

    async def run(event: Event) -> Result:
        match event.json():
            case "slow":
                async with effect("charge"):
                    await gate.wait()
            case "bad":
                raise Reject("no such customer")
            case "later":
                raise Retry("not yet", after=3600)
        return {"of": event.json()}

    events = {name: make_event(payload=name, key=name[0]) for name in ("slow", "bad", "later", "good", "behind bad")}
    async with (
        browsing(settings_of(tmp_path, bridge_database)) as browser,
        working(run, shop, ScriptedQueue(), ordered=True, concurrency=4, on_dead_letter="hold") as queue,
    ):
        for name in ("slow", "bad", "later", "good"):
            queue.add(events[name])

        async def has_begun_all() -> bool:
            found = await execute(
                bridge_database,
                "select count(*) from bridge.inbox where finished_at is not null or ended_at is not null"
                " or due_at is not null or effects <> '{}'",
            )
            return found == [(4,)]

        await until(has_begun_all)
        queue.add(events["behind bad"])
        await until(lambda: len([verb for _, verb, _ in queue.settled if verb == "dead_letter"]) == 2)

        async def shows_all() -> bool:
            words = (await browser.page("/workers")).words
            return "has dead letters 1 " in words and " 1 1 1 2 Handled, and durations" in words

        await until(shows_all)
        told = await json_of("status", "--config", str(tmp_path / "bridge.toml"), expect=1)
        [known] = told["workers"]
        assert (known["running"], known["waiting"], known["held_keys"], known["dead_letters"]) == (1, 1, 1, 2)
        page = await browser.page("/workers")
        assert "/workers/invoices" in links(page)
        [(pid, host)] = await execute(
            bridge_database,
            "select pid, coalesce(host(client_addr), '–') from pg_stat_activity join pg_locks using (pid)"
            " where application_name = 'pgbridge-worker invoices' and locktype = 'advisory'",
        )
        assert f"invoices {pid} {host} " in section(page, "Processes")

        page = await browser.page("/workers/invoices")
        assert "Worker invoices" in page.words
        assert f"{pid} {host}" in section(page, "Processes")
        for title, name, more in (
            ("In hand now", "slow", f"1 {pid}"),
            ("To be tried again", "later", ""),
            ("Keys that wait", "bad", "1 A key goes on"),
            ("Open effects", "slow", "charge, "),
            ("What failed last", "behind bad", "in its dead letter 0"),
            ("What failed last", "bad", "in its dead letter 1"),
            ("What finished last", "good", "1 Of each"),
        ):
            # The facts at the top have some of these words, too.
            words = page.words.rpartition(f" {title} ")[2]
            assert events[name].id in words, title
            assert more in words.partition(events[name].id)[2], title
            assert f"/events/{events[name].id}" in links(page)
        assert {"/events?key=b", f"/dead/letter?id=invoices%3A{events['bad'].id}"} <= set(links(page))
        gate.set()
        await until(lambda: len(queue.settled) == 4)  # what is to be tried again stays

        async def shows_that_it_is_done() -> bool:
            words = (await browser.page("/workers/invoices")).words
            return events["slow"].id in words.rpartition(" What finished last ")[2]

        await until(shows_that_it_is_done)
    async with browsing(settings_of(tmp_path, bridge_database)) as browser:
        assert "None runs. Start one: pgbridge-worker run invoices" in (await browser.page("/workers/invoices")).words


async def test_what_workers_counted_lately_is_shown_with_durations(bridge_database: str, tmp_path: Path) -> None:
    await execute(
        bridge_database,
        "insert into bridge.sample select 15, 'worker', '', 'invoices', " + LATEST + " - n * interval '15 s', 15,"
        ' \'{"handled": 300, "retried": 2, "le_0.005": 0, "le_0.01": 297, "le_0.25": 0, "le_0.5": 3}\','
        " '{\"queue_depth\": 7}' from generate_series(0, 1) n",
    )
    async with browsing(settings_of(tmp_path, bridge_database)) as browser:
        row = section(await browser.page("/workers"), "Dead letters invoices")
        assert row.startswith("waits for events 0 – 20/s 7.53 ms 10 ms 0 ")
        page = await browser.page("/workers/invoices")
        assert "Deliveries, last five minutes 600 handled, 4 retried" in page.words
        assert "In its queue 7" in page.words
        await execute(bridge_database, "update bridge.sample set at = at - interval '1 minute'")
    async with browsing(settings_of(tmp_path, bridge_database)) as browser:
        # A figure of long ago does not say what waits now.
        page = await browser.page("/workers/invoices")
        assert "600 handled, 4 retried" in page.words
        assert "In its queue" not in page.words
        assert "Handled by workers" in page.words  # a chart
        assert "nothing is known for" in page.words


async def test_a_worker_is_paused_with_a_reason_and_the_persons_name_and_goes_on(
    bridge_database: str, tmp_path: Path
) -> None:
    pauses = "select kind, bridge, name, who, why from bridge.pause"
    async with browsing(settings_of(tmp_path, bridge_database, TOKENS)) as browser:
        await browser.log_in(TOKEN)
        for form, wrong in (
            ({"worker": "invoices", "why": " "}, "Not done: give a reason: whoever finds the worker paused"),
            ({"worker": "invoices", "why": "x" * 501}, "Not done: the reason has 501 letters"),
            ({"worker": "none", "why": "x"}, "Not done: there is no worker 'none'; the settings have: invoices"),
        ):
            answer = await browser.fill("/workers/pause", form, of="/workers")
            assert answer.headers["location"] == "/workers"
            assert wrong in (await browser.page("/workers")).words
        assert await execute(bridge_database, pauses) == []
        own = "/workers/invoices"
        form = {"worker": "invoices", "why": "stocktaking", "back": own}
        assert (await browser.fill("/workers/pause", form, of=own)).headers["location"] == own
        shown = (await browser.page(own)).words
        assert "The worker invoices is paused" in shown
        assert "by anna (console): stocktaking" in shown
        assert await execute(bridge_database, pauses) == [("worker", "", "invoices", "anna (console)", "stocktaking")]
        assert "paused by anna (console): stocktaking" in (await browser.page("/workers")).words
        await browser.fill("/workers/resume", {"worker": "invoices"}, of="/workers")
        assert "The worker invoices goes on" in (await browser.page("/workers")).words
        assert await execute(bridge_database, pauses) == []
        browser.cookies.clear()
        await browser.log_in(VIEWER_TOKEN)
        for path in ("/workers", own):
            page = await browser.page(path)
            assert "You may look, and not act." in page.words
            assert "/workers/pause" not in page.forms
        assert (await browser.fill("/workers/pause", form, of="/workers")).status_code == 403


@pytest.mark.parametrize("role", ["bridge_viewer", "bridge_relay"])
async def test_logins_of_the_database_see_what_they_may_and_why_not_the_rest(
    bridge_database: str, unique: str, tmp_path: Path, role: str
) -> None:
    await execute(bridge_database, "insert into bridge.held (worker, event_id, key) values ('invoices', %s, 'k7')", ID)
    login = sql.Identifier(unique)
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(sql.SQL("create role {} login in role {}").format(login, sql.Identifier(role)))
        try:
            async with browsing(settings_of(tmp_path, make_conninfo(bridge_database, user=unique))) as browser:
                for path in ("/workers", "/workers/invoices"):
                    page = await browser.page(path)
                    assert "/workers/pause" not in page.forms
                    assert "may only look" in page.words
                    assert ("Not all can be shown" in page.words) == (role == "bridge_relay")
                assert ("k7" in page.words) == (role == "bridge_viewer")
        finally:
            admin.execute(sql.SQL("drop role {}").format(login))


ID = "3b9a6110-4813-44e5-b7a7-e9e5472a07f0"


async def test_names_that_others_wrote_are_text_and_lead_to_their_pages(bridge_database: str, tmp_path: Path) -> None:
    hostile = "<b>/x\x1b ü?#"
    await execute(bridge_database, "insert into bridge.inbox (worker, event_id) values (%s, %s)", hostile, ID)
    await execute(
        bridge_database, "insert into bridge.held (worker, event_id, key) values (%s, %s, '<i>')", hostile, ID
    )
    async with browsing(settings_of(tmp_path, bridge_database)) as browser:
        for path in ("/workers", "/"):
            answer = await browser.get(path)
            assert "<b>/x" not in answer.text
            assert "&lt;b&gt;/x\\x1b ü?#" in answer.text
            [link] = [link for link in links(Page(answer.text)) if (link or "").startswith("/workers/%3Cb")]
        answer = await browser.get(link or "")
        [live] = [attributes["data-live"] for _, attributes in Page(answer.text).tags if "data-live" in attributes]
        async with aclosing(events_of(browser, live or "")) as renewals:
            assert f"/events/{ID}" in await anext(renewals)
        assert answer.status_code == 200
        assert f"/events/{ID}" in links(Page(answer.text))
        assert not [part for part in ("<b>/x", "<i>", "\x1b") if part in answer.text]


async def test_a_worker_that_nobody_knows_has_no_page(bridge_database: str, tmp_path: Path) -> None:
    async with browsing(settings_of(tmp_path, bridge_database)) as browser:
        for path in (
            "/workers/none",
            "/workers/",
            "/workers/%00",
            "/workers/invoices?held=x",
            f"/workers/invoices?held={2**63}",
        ):
            assert (await browser.get(path)).status_code == 422, path
        assert "there is no worker &#39;none&#39;" in (await browser.get("/workers/none")).text


async def test_without_a_worker_the_page_says_how_to_begin(bridge_database: str, tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        assert "There is no worker yet" in (await browser.page("/workers")).words


async def test_workers_are_listed_a_page_at_a_time(bridge_database: str, tmp_path: Path) -> None:
    await execute(
        bridge_database,
        "insert into bridge.inbox (worker, event_id)"
        " select 'w' || n, gen_random_uuid() from generate_series(100, 170) n",
    )
    seen: list[str] = []
    path = "/workers"
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        while path:
            page = await browser.page(path)
            found = [link or "" for link in links(page)]
            seen += [link.rpartition("/")[2] for link in found if link.startswith("/workers/w")]
            path = next((link for link in found if link.startswith("/workers?after=")), "")
    assert seen == [f"w{n}" for n in range(100, 171)]


async def test_held_keys_are_listed_once_each_beside_those_of_others(bridge_database: str, tmp_path: Path) -> None:
    await execute(
        bridge_database,
        "insert into bridge.held (worker, event_id, key) select w, gen_random_uuid(), 'k' || mod(n, 45)"
        " from generate_series(1, 135) n, unnest('{invoices,other}'::text[]) w",
    )
    seen: list[str] = []
    path = "/workers/invoices"
    async with browsing(settings_of(tmp_path, bridge_database)) as browser:
        while path:
            page = await browser.page(path)
            found = [link or "" for link in links(page)]
            seen += [link.partition("key=")[2] for link in found if link.startswith("/events?key=")]
            path = next(("/workers/invoices" + link for link in found if link.startswith("?held=")), "")
            assert " 2 k" in section(page, "Keys that wait")  # so many wait behind each
    assert sorted(seen) == sorted(f"k{n}" for n in range(45))


async def test_however_many_events_there_are_a_bounded_number_is_looked_at(bridge_database: str) -> None:
    await execute(
        bridge_database,
        "insert into bridge.inbox (worker, event_id, started_at)"
        " select case when n <= 7 then 'old' else 'busy' end, gen_random_uuid(), now() + n * interval '1 ms'"
        " from generate_series(1, %s) n",
        workers.LOOK_AT + 5,
    )  # fmt: skip
    await execute(
        bridge_database,
        "insert into bridge.held (worker, event_id, key) select 'busy', gen_random_uuid(), 'k' || n"
        " from generate_series(1, %s) n",
        workers.STEPS + 5,
    )  # fmt: skip
    async with await connect(PostgresSettings.model_validate({"dsn": bridge_database}), "test") as connection:
        assert set(await workers.at_work(connection, ["old", "busy", "new"])) == {"old", "busy", "new"}
        assert len((await workers.worker_events(connection, "old"))["waiting"]) == 2
        assert len((await workers.worker_events(connection, "busy"))["waiting"]) == workers.SHOWN
        held = await workers.held_keys(connection, "old")
        assert held.keys == []
        assert held.next_after is not None, "it stops, and says where"
        assert await workers.held_keys(connection, "old", held.next_after) == workers.HeldKeys([], None)


async def test_the_page_of_a_worker_is_renewed_by_itself(bridge_database: str, tmp_path: Path) -> None:
    async with (
        browsing(settings_of(tmp_path, bridge_database)) as browser,
        aclosing(events_of(browser, "/live/workers/invoices")) as live,
    ):
        assert ID not in await anext(live)
        await execute(bridge_database, "insert into bridge.inbox (worker, event_id) values ('invoices', %s)", ID)
        async with asyncio.timeout(20):
            async for event in live:
                if ID in event:
                    break


async def test_flow_leads_to_the_page_of_each_worker(bridge_database: str, tmp_path: Path) -> None:
    await execute(bridge_database, "insert into bridge.inbox (worker, event_id) values ('a worker', %s)", ID)
    async with browsing(settings_of(tmp_path, bridge_database)) as browser:
        assert f"/workers/{quote('a worker')}" in links(await browser.page("/"))


async def test_while_the_database_is_gone_the_pages_of_workers_and_webhooks_say_so(tmp_path: Path) -> None:
    async with browsing(settings_of(tmp_path, f"postgresql://nobody@127.0.0.1:{free_port()}/none")) as browser:
        for path in ("/workers", "/workers/invoices", "/webhooks", "/webhooks/1", "/webhooks/deliveries/1"):
            assert "The database does not answer" in (await browser.page(path)).words, path
