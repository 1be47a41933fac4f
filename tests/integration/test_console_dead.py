"""Dead letters on the console, over HTTP, on a real PostgreSQL and real brokers; and an event published again."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlencode
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from bridge.brokers.contract import Failure, Subscription
from bridge.brokers.registry import broker_of
from bridge.console.dead import boxes
from bridge.event import Event
from bridge.settings import Settings, load
from tests.support.commands import json_of
from tests.support.console import TOKEN, TOKENS, VIEWER_TOKEN, Browser, Page, events_of, served
from tests.support.dead import bury, give_up
from tests.support.messages import Messages, execute, settings
from tests.support.servers import NatsServer, free_port
from tests.support.until import until

WORKER = '\n[workers.{name}]\nhandler = "tests.support.worker_handlers:refuse"\n'
CONSOLE = '\n[console]\ninterval = "100ms"\nlisten = "127.0.0.1:{port}"\n{more}\n'
REJECTED = Failure("rejected", "no invoice 17 for <b>you</b>", "Traceback:\n  boom", 3)


def console_at(folder: Path, text: str, more: str = TOKENS) -> Settings:
    """Settings of a console in `folder`, which commands may read too."""
    config = folder / "bridge.toml"
    config.write_text(text + CONSOLE.format(port=free_port(), more=more))
    return load(config, environ={})


@pytest.fixture
def shop(bridge_database: str, messages: Messages, unique: str, tmp_path: Path) -> Settings:
    """A bridge with a sink, and a worker whose queue has not been declared; a second sink and route of one topic."""
    return console_at(tmp_path, settings(bridge_database, messages) + WORKER.format(name=unique))


@pytest.fixture
async def operator(shop: Settings) -> AsyncIterator[Browser]:
    async with served(shop) as (_, base, _), Browser(base) as browser:
        await browser.log_in(TOKEN)
        yield browser


def links(html: str, path: str) -> list[str]:
    return [link.replace("&amp;", "&") for link in re.findall(rf'href="({re.escape(path)}[^"]*)"', html)]


async def confirm(browser: Browser, plan: str, **more: str) -> Page:
    """Does what a page before an act offers; gives the page where that is told."""
    page = await browser.page(plan)
    [action] = [each for each in page.forms if each and each.startswith("/dead/") and each != "/dead/stop"]
    form = {name: page.field(name) for name in ("form_token", "back", "choice")}
    answer = await browser.post(action, data={**form, **more})
    assert answer.status_code == 303, answer.text
    return await browser.page(answer.headers["location"])


async def left(dsn: str) -> list[object]:
    return [id_ for (id_,) in await execute(dsn, "select id from bridge.dead_letter order by id")]


# Looking


async def test_letters_of_outbox_and_workers_stand_in_one_list_by_the_groups_of_the_command(
    bridge_database: str, messages: Messages, unique: str, tmp_path: Path, operator: Browser
) -> None:
    await bury(bridge_database, 5, "events", "too_large", "message %s is larger than 1.5 MB")
    await bury(bridge_database, 1, None, "no_route", "no route takes the topic; %s", "other")
    ids = await give_up(messages.connection, unique, [b"1", b"2", b"3"], REJECTED)
    html = (await operator.get("/dead")).text
    page = Page(html)
    assert "9 dead letters, in 3 groups" in page.words
    groups = await json_of("dead", "list", "--group", "--config", str(tmp_path / "bridge.toml"))
    assert re.findall(r'id="group-(\w+)"', html) == [group["id"] for group in groups]
    for group in groups:
        assert f"{group['place']} {group['code']} {group['reason']}" in page.words
    assert "5 in the last 24 h, 2 in the last hour" in page.words  # now, and half an hour ago
    assert {f"/dead/letter?id={unique}%3A{id_}" for id_ in ids} < set(links(html, "/dead/letter?"))
    assert "<b>you" not in html
    for filters, count in (
        ({"worker": unique}, 3),
        ({"sink": "events"}, 5),
        ({"code": "no_route"}, 1),
        ({"topic": "shop.order.#, other"}, 6),
        ({"since": "40m"}, 6),
        ({"group": groups[0]["id"]}, 5),
        ({"group": groups[0]["id"], "since": "40m"}, 2),
    ):
        words = (await operator.page(f"/dead?{urlencode(filters)}")).words
        assert f"{count} dead letter{'s' if count > 1 else ''}, in " in words, filters
    assert "There are no such dead letters." in (await operator.page("/dead?code=nothing")).words
    assert "since: 'soon' is not a time" in (await operator.page("/dead?since=soon")).words


async def test_no_dead_letters_are_good_news(messages: Messages, unique: str, operator: Browser) -> None:
    await give_up(messages.connection, unique, [], REJECTED)
    assert "There are no dead letters." in (await operator.page("/dead")).words
    assert "Nobody has replayed" in (await operator.page("/dead/audit")).words


async def test_however_many_look_a_box_is_looked_into_once(
    bridge_database: str, messages: Messages, unique: str, shop: Settings
) -> None:
    await bury(bridge_database, 2, "events", "too_large", "%s")
    await give_up(messages.connection, unique, [b"1"], REJECTED)
    async with served(shop) as (console, base, _), Browser(base) as browser:
        await browser.log_in(TOKEN)
        pages = await asyncio.gather(*(browser.page(f"/dead?since={n}h") for n in range(1, 11)))
        assert all("3 dead letters" in page.words for page in pages)
        async with aclosing(events_of(browser, "/live/dead")) as renewals:
            for _ in range(3):
                assert "3 dead letters" in Page(await anext(renewals)).words
        assert console.parts.dead.looks == 2  # the outbox, and the worker's


async def test_pages_of_letters_lead_to_all_of_them(bridge_database: str, operator: Browser) -> None:
    await bury(bridge_database, 120, "events", "too_large", "%s")
    found: list[str] = []
    path: str | None = "/dead"
    while path is not None:
        html = (await operator.get(path)).text
        found += re.findall(r'name="id" value="(outbox:\d+)"', html)
        path = next((link for link in links(html, "/dead?") if "before" in link), None)
    assert found == [f"outbox:{n}" for n in range(1, 121)]


async def test_what_cannot_be_looked_into_is_named_with_its_mend_and_the_rest_shows(
    bridge_database: str, operator: Browser, unique: str
) -> None:
    await bury(bridge_database, 1, "events", "too_large", "%s")
    words = (await operator.page("/dead")).words
    assert f"The dead letters of {unique} cannot be looked into" in words
    assert "pgbridge topology --apply" in words
    assert "1 dead letter, in 1 group" in words


async def test_without_its_database_the_page_says_so(tmp_path: Path, messages: Messages) -> None:
    text = settings("postgresql://nobody@127.0.0.1:1/none", messages)
    async with served(console_at(tmp_path, text)) as (_, base, _), Browser(base) as browser:
        await browser.log_in(TOKEN)
        page = await browser.page("/dead")
        assert "The dead letters of outbox cannot be looked into postgres.dsn: " in page.words
        form = {"form_token": page.field("form_token"), "back": "/dead", "choice": "until=2100-01-01"}
        await browser.post("/dead/replay", data=form)
        assert "Not done: the database has not answered yet: " in (await browser.page("/dead")).words


async def test_a_broker_that_does_not_answer_keeps_no_page_waiting(
    bridge_database: str, messages: Messages, unique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boxes, "SECONDS", 1.0)
    monkeypatch.setattr(boxes, "_PATIENCE", 0.2)
    await bury(bridge_database, 1, "events", "too_large", "%s")
    taken: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: taken.append(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    text = settings(bridge_database, messages).replace(messages.url, f"amqp://a:b@127.0.0.1:{port}/")
    async with (
        served(console_at(tmp_path, text + WORKER.format(name=unique))) as (_, base, _),
        Browser(base) as browser,
    ):
        await browser.log_in(TOKEN)
        words = (await browser.page("/dead")).words
        assert f"The broker of {unique} has not answered yet" in words
        assert "1 dead letter, in 1 group" in words

        async def is_told() -> bool:
            words = (await browser.page("/dead")).words
            return f"The dead letters of {unique} cannot be looked into its broker has not answered within 1 s" in words

        await until(is_told)
    for writer in taken:
        writer.close()
    silent.close()


async def test_of_a_large_box_some_are_looked_at_and_that_is_said(
    bridge_database: str, messages: Messages, unique: str, operator: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boxes, "LETTERS", 3)
    await bury(bridge_database, 4, "events", "too_large", "%s")
    await give_up(messages.connection, unique, [b"x"] * 4, REJECTED)
    words = (await operator.page("/dead")).words
    assert "6 dead letters, in 2 groups" in words
    assert "Of outbox there are more letters than the 3 that were looked at" in words
    assert f"Of {unique} there are more letters than the 3 that were looked at" in words
    assert "Replay at least 6 dead letters" in (await operator.page("/dead/plan?action=replay")).words
    channel = await messages.connection.channel()
    queue = await channel.declare_queue(f"{unique}.dead", passive=True)
    assert queue.declaration_result.message_count == 4, "all are given back"


async def test_a_letter_has_a_page_of_its_own(
    bridge_database: str, messages: Messages, unique: str, operator: Browser
) -> None:
    await bury(bridge_database, 1, "events", "too_large", "%s")
    [event_id] = await give_up(messages.connection, unique, [b"<script>alert(1)</script>\x1b[2J"], REJECTED)
    [path] = links((await operator.get(f"/dead?worker={unique}")).text, "/dead/letter?")
    html = (await operator.get(path)).text
    words = Page(html).words
    assert "rejected no invoice 17 for <b>you</b>" in words
    assert "Traceback: boom" in words
    assert "<script>alert(1)</script>\\x1b[2J" in words
    assert "<script>alert" not in html
    assert f'href="/events/{event_id}"' in html
    words = (await operator.page("/dead/letter?id=outbox:1")).words
    assert '{ "n": 1 }' in words
    assert "tenant a" in words
    assert "There is no such dead letter" in (await operator.page("/dead/letter?id=outbox:99")).words
    assert "There is no such dead letter" in (await operator.page(f"/dead/letter?id={unique}:1/?x%23")).words
    assert (await operator.get("/dead/letter?id=nobody:1")).status_code == 422


# Acting


async def test_a_group_is_replayed_after_a_page_that_says_what_would_be_done_and_does_nothing(
    bridge_database: str, messages: Messages, operator: Browser
) -> None:
    await bury(bridge_database, 3, "events", "unroutable", "%s")
    await bury(bridge_database, 2, "events", "too_large", "%s")
    wanted = await execute(bridge_database, "select event_id::text from bridge.dead_letter where code = 'unroutable'")
    html = (await operator.get("/dead?code=unroutable")).text
    plan = next(link for link in links(html, "/dead/plan?") if "group=" in link and "action=replay" in link)
    page = await operator.page(plan)
    assert "Replay 3 dead letters" in page.words
    assert "3 to the sink events, which had refused them, and to no other" in page.words
    assert await left(bridge_database) == [1, 2, 3, 4, 5]
    assert "3 dead letters replayed." in (await confirm(operator, plan)).words
    assert {(message.message_id,) for message in await messages.take(3)} == set(wanted)
    assert await left(bridge_database) == [4, 5]
    acts = "select distinct action, person, role from bridge.dead_letter_audit"
    assert await execute(bridge_database, acts) == [("replayed", "anna (console)", "postgres")]
    assert "2 dead letters, in 1 group" in (await operator.page("/dead")).words, "it looks again after an act"


async def test_a_selection_is_discarded_with_a_reason_that_the_audit_shows(
    bridge_database: str, operator: Browser
) -> None:
    await bury(bridge_database, 3, "events", "too_large", "%s")
    assert "no letter is selected" in (await operator.get("/dead/plan?selected=yes&action=discard")).text
    plan = "/dead/plan?selected=yes&id=outbox:1&id=outbox:3&action=discard"
    assert "2 deleted for good" in (await operator.page(plan)).words
    for why, wrong in (("  ", "give a reason"), ("x" * 501, "the reason has 501 letters")):
        assert f"Not done: {wrong}" in (await confirm(operator, plan, why=why)).words
    assert await left(bridge_database) == [1, 2, 3]
    assert "2 dead letters discarded." in (await confirm(operator, plan, why="a test order")).words
    assert await left(bridge_database) == [2]
    await confirm(operator, "/dead/plan?action=discard", why="the last <one>")
    words = (await operator.page("/dead/audit")).words
    assert words.index("the last <one>") < words.index("a test order")
    assert words.count("discarded anna (console) postgres") == 3


async def test_what_came_after_the_page_was_shown_is_left_alone(bridge_database: str, operator: Browser) -> None:
    await bury(bridge_database, 2, "events", "too_large", "%s")
    await execute(bridge_database, "update bridge.dead_letter set failed_at = failed_at - interval '1 h'")
    page = await operator.page("/dead/plan?action=discard")
    await bury(bridge_database, 1, "events", "too_large", "%s")
    # Its transaction began before the look, and ended behind it.
    await execute(
        bridge_database, "update bridge.dead_letter set failed_at = now() - interval '10 minutes' where id = 3"
    )
    form = {name: page.field(name) for name in ("form_token", "back", "choice")}
    await operator.post("/dead/discard", data={**form, "why": "x"})
    assert await left(bridge_database) == [3]


async def test_nothing_is_done_without_the_page_before(bridge_database: str, operator: Browser) -> None:
    await bury(bridge_database, 1, "events", "too_large", "%s")
    await operator.fill("/dead/discard", {"why": "x", "back": "/dead"}, of="/dead/plan?action=discard")
    assert "look first at what would be done" in (await operator.page("/dead")).words
    assert await left(bridge_database) == [1]


async def test_letters_of_a_sink_that_is_gone_cannot_be_replayed_and_the_page_says_so(
    bridge_database: str, operator: Browser
) -> None:
    await bury(bridge_database, 2, "gone", "too_large", "%s")
    page = await operator.page("/dead/plan?action=replay")
    assert "refused by the sink gone, which is not in the settings" in page.words
    assert "/dead/replay" not in page.forms


async def test_letters_of_a_worker_go_back_to_its_queue(
    bridge_database: str, messages: Messages, unique: str, operator: Browser
) -> None:
    ids = await give_up(messages.connection, unique, [b"1", b"2"], REJECTED)
    plan = f"/dead/plan?action=replay&id={unique}:{ids[1]}"
    assert f"1 back to the queue of the worker {unique}" in (await operator.page(plan)).words
    assert "1 dead letter replayed." in (await confirm(operator, plan)).words
    channel = await messages.connection.channel()
    queue = await channel.declare_queue(unique, passive=True)
    message = await queue.get(no_ack=True)
    assert message.message_id == ids[1]
    assert "replayed" in message.headers
    acts = await execute(bridge_database, "select letter, action, person from bridge.dead_letter_audit")
    assert acts == [(f"{unique}:{ids[1]}", "replayed", "anna (console)")]


async def test_letters_on_nats_are_shown_and_replayed(
    bridge_database: str, nats_server: NatsServer, unique: str, tmp_path: Path
) -> None:
    text = (
        f'name = "test"\n[postgres]\ndsn = "{bridge_database}"\n[sinks.events]\ntype = "nats"\nstream = "{unique}"\n'
        f'url = "{nats_server.url}"\n[[routes]]\ntopic = "#"\nsink = "events"\n{WORKER.format(name=unique)}'
    )
    shop = console_at(tmp_path, text)
    broker, table = broker_of(shop.sinks["events"]), shop.sinks["events"]
    sink, queue = broker.sink(table), broker.queue(table, Subscription(unique, ["#"], 10, [1.0], 3, 30.0))
    await sink.topology(apply=True)
    await queue.topology(apply=True)
    await sink.open()
    await queue.open()
    await sink.publish([Event(str(uuid4()), "shop.a", b"x", None, "/shop/test", datetime.now(UTC), "text/plain", {})])
    await (await anext(queue.deliveries())).dead_letter(REJECTED)
    await queue.close()
    await sink.close()
    async with served(shop) as (_, base, _), Browser(base) as browser:
        await browser.log_in(TOKEN)
        assert f"{unique} rejected no invoice # for <b>you</b>" in (await browser.page("/dead")).words
        assert "1 dead letter replayed." in (await confirm(browser, "/dead/plan?action=replay")).words
        assert "There are no dead letters." in (await browser.page("/dead")).words


@pytest.mark.parametrize("more", [TOKENS, f"read_only = true\n{TOKENS}"])
async def test_who_may_only_look_sees_letters_and_nothing_that_acts(
    bridge_database: str, messages: Messages, unique: str, tmp_path: Path, more: str
) -> None:
    await bury(bridge_database, 1, "events", "too_large", "%s")
    await execute(bridge_database, "select bridge.emit('shop.a', 'x')")
    text = settings(bridge_database, messages)
    async with served(console_at(tmp_path, text, more)) as (_, base, _), Browser(base) as browser:
        await browser.log_in(TOKEN if "read_only" in more else VIEWER_TOKEN)
        token = (await browser.page("/dead")).field("form_token")  # of logging out
        for path in ("/dead", "/dead/plan?action=replay", "/dead/letter?id=outbox:1", "/events/1", "/replay?number=1"):
            page = await browser.page(path)
            assert {form for form in page.forms if form not in ("/logout", "/dead", "/events")} == set(), path
            assert not [tag for tag, attributes in page.tags if attributes.get("type") == "checkbox"]
        for path in ("/dead/replay", "/dead/discard", "/dead/stop", "/replay/start"):
            form = {"form_token": token, "choice": "until=2100-01-01", "why": "x", "number": "1"}
            assert (await browser.post(path, data=form)).status_code == 403
    assert await left(bridge_database) == [1]


async def test_a_login_of_the_database_that_may_only_look_publishes_nothing(
    bridge_database: str, messages: Messages, unique: str, tmp_path: Path
) -> None:
    await bury(bridge_database, 1, "events", "too_large", "%s")
    await execute(bridge_database, "select bridge.emit('shop.a', 'x')")
    role = sql.Identifier(unique)
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(sql.SQL("create role {} login in role bridge_viewer").format(role))
        try:
            text = settings(make_conninfo(bridge_database, user=unique), messages)
            async with served(console_at(tmp_path, text)) as (_, base, _), Browser(base) as browser:
                await browser.log_in(TOKEN)
                page = await browser.page("/dead/plan?action=replay")
                assert "may only look" in page.words
                for path, more in (
                    ("/dead/replay", {"choice": "until=2100-01-01"}),
                    ("/replay/start", {"number": "1"}),
                ):
                    form = {"form_token": page.field("form_token"), "back": "/dead", **more}
                    await browser.post(path, data=form)
                    assert "Not done: the console's login" in (await browser.page("/dead")).words
        finally:
            admin.execute(sql.SQL("drop role {}").format(role))
    assert (await messages.queue.declare()).message_count == 0


# What goes on in the background


async def test_a_long_replay_goes_on_with_its_progress_one_at_a_time_and_can_be_stopped(
    bridge_database: str, messages: Messages, unique: str, operator: Browser
) -> None:
    await give_up(messages.connection, unique, [b"x"] * 60, REJECTED)
    page = await confirm(operator, "/dead/plan?action=replay", rate="2")
    assert "Replay of 60 dead letters: it has begun" in page.words
    assert "By anna (console), since" in page.words
    async with aclosing(events_of(operator, "/live/dead")) as renewals:
        async for renewal in renewals:
            if re.search(r"([3-9]|[1-5]\d) done, of 60; [12]/s", Page(renewal).words):
                break
    words = (await operator.page("/dead/plan?action=discard")).words
    assert "It looks again once that has ended" in (await operator.page("/dead")).words
    assert "anna (console) has begun something that goes on" in words
    form = {"choice": "until=2100-01-01", "why": "x", "back": "/dead"}
    await operator.fill("/dead/discard", form, of="/dead")
    page = await operator.page("/dead")
    assert "Not done: anna (console) has begun something that goes on: Replay of 60 dead letters" in page.words
    assert "/dead/stop" in page.forms
    await operator.fill("/dead/stop", {"back": "/dead"}, of="/dead")

    async def has_ended() -> bool:
        words = (await operator.page("/dead")).words
        return bool(re.search(r"Stopped by anna \(console\): \d+ dead letters replayed, of 60\.", words))

    await until(has_ended)
    acts = len(await execute(bridge_database, "select id from bridge.dead_letter_audit"))
    assert 3 <= acts < 60
    channel = await messages.connection.channel()

    async def are_back() -> bool:
        queue = await channel.declare_queue(f"{unique}.dead", passive=True)
        return bool(queue.declaration_result.message_count == 60 - acts)

    await until(are_back)


async def test_a_slow_replay_stops_at_once_and_not_when_the_next_letter_is_due(
    bridge_database: str, messages: Messages, unique: str, operator: Browser
) -> None:
    await give_up(messages.connection, unique, [b"x"] * 2, REJECTED)
    await confirm(operator, "/dead/plan?action=replay", rate="0.01")
    await operator.fill("/dead/stop", {"back": "/dead"}, of="/dead")

    async def has_ended() -> bool:
        return "Stopped by anna (console): 1 dead letter replayed, of 2." in (await operator.page("/dead")).words

    await until(has_ended)


async def test_a_console_that_stops_ends_what_goes_on_in_order(
    bridge_database: str, messages: Messages, shop: Settings
) -> None:
    await bury(bridge_database, 30, "events", "unroutable", "%s")
    async with served(shop) as (console, base, _), Browser(base) as browser:
        await browser.log_in(TOKEN)
        page = await confirm(browser, "/dead/plan?action=replay", rate="2")
        assert "it has begun" in page.words
        job = console.parts.work.job
    assert job is not None
    assert re.fullmatch(r"Stopped by the console, which stopped: \d+ dead letters? replayed, of 30\.", job.words)
    assert len(await left(bridge_database)) == 30 - job.done
    assert len(await messages.take(job.done)) == job.done


async def test_a_broker_that_is_gone_ends_an_act_with_its_reason(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    await bury(bridge_database, 1, "events", "unroutable", "%s")
    text = settings(bridge_database, messages).replace(messages.url, f"amqp://a:b@127.0.0.1:{free_port()}/")
    async with served(console_at(tmp_path, text)) as (_, base, _), Browser(base) as browser:
        await browser.log_in(TOKEN)
        words = (await confirm(browser, "/dead/plan?action=replay")).words
        assert "Not done: Ended early: sinks.events.url" in words
    assert await left(bridge_database) == [1]


@pytest.mark.parametrize("rate", ["fast", "0", "-1", "nan", "inf"])
async def test_a_rate_that_is_none_is_told(bridge_database: str, operator: Browser, rate: str) -> None:
    await bury(bridge_database, 1, "events", "unroutable", "%s")
    assert "is no number of letters a second" in (await confirm(operator, "/dead/plan?action=replay", rate=rate)).words
    assert await left(bridge_database) == [1]


# One event of the log


async def test_one_event_is_published_again_from_its_page_under_its_id(
    bridge_database: str, messages: Messages, operator: Browser
) -> None:
    await execute(bridge_database, "select bridge.emit('shop.a', n::text) from generate_series(1, 3) n")
    [(event_id,)] = await execute(bridge_database, "select event_id::text from bridge.outbox where id = 2")
    assert "/replay?number=2" in links((await operator.get("/events/2")).text, "/replay?")
    page = await operator.page("/replay?number=2")
    assert "the sink events rabbitmq" in page.words
    form = {name: page.field(name) for name in ("form_token", "back", "number")}
    answer = await operator.post("/replay/start", data=form)
    assert answer.headers["location"] == "/events/2"
    assert "Event 2 is published again, to the sink events." in (await operator.page("/events/2")).words
    (message,) = await messages.take(1)
    assert (message.message_id, message.body) == (event_id, b"2")
    assert "replayed" in message.headers
    assert (await messages.queue.declare()).message_count == 0


async def test_an_event_without_a_route_is_told_to_have_none(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    await execute(bridge_database, "select bridge.emit('other', 'x')")
    text = settings(bridge_database, messages).replace('topic = "#"', 'topic = "shop.#"')
    async with served(console_at(tmp_path, text)) as (_, base, _), Browser(base) as browser:
        await browser.log_in(TOKEN)
        page = await browser.page("/replay?number=1")
        assert "No route takes its topic today" in page.words
        assert "/replay/start" not in page.forms
        for number, status in (("2", 422), ("x", 422), ("", 422)):
            assert (await browser.get(f"/replay?number={number}")).status_code == status
