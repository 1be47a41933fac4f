"""Looking through the log, and the pages Events and One event of the console."""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from uuid import uuid4

import pytest

from bridge.errors import UsageError
from bridge.postgres.connection import connect
from bridge.postgres.events import Page, Search, content, neighbours, search
from bridge.postgres.wire import Connection
from bridge.settings import PostgresSettings
from tests.support.console import browsing, console_settings, events_of
from tests.support.messages import execute
from tests.support.until import until

FILLED = """
insert into bridge.outbox (topic, key, payload, content_type, headers, created_at)
select 'shop.' || case when mod(n, 10) = 0 then 'order' else 'stock' end || '.updated', 'k' || mod(n, 50),
       json_build_object('n', n), 'application/json',
       case when mod(n, 20) = 0 then '{"tenant": "acme"}' else '{}' end::jsonb,
       now() - (%s - n) * interval '1 minute'
from generate_series(1, %s) n order by n
"""


@pytest.fixture
async def connection(bridge_database: str) -> AsyncIterator[Connection]:
    async with await connect(PostgresSettings.model_validate({"dsn": bridge_database}), "test") as connection:
        yield connection


async def filled(dsn: str, events: int = 200) -> None:
    await execute(dsn, FILLED, events, events)


def numbers(page: Page) -> list[int]:
    return [event.id for event in page.events]


async def test_pages_go_from_the_newest_to_the_oldest_and_have_each_event_once(
    bridge_database: str, connection: Connection
) -> None:
    await filled(bridge_database)
    seen: list[int] = []
    before = None
    while True:
        page = await search(connection, Search(), before, page=60)
        seen += numbers(page)
        if not page.is_full:
            break
        assert len(page.events) == 60
        before = page.next_before
    assert seen == list(range(200, 0, -1))
    assert page.next_before is None
    assert page.events[0].head == '{"n" : 20}'


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (Search(topics=("shop.order.#",)), [200, 190, 180, 170, 160]),
        (Search(topics=("shop.order.*", "none")), [200, 190, 180, 170, 160]),
        (Search(key="k7"), [157, 107, 57, 7]),
        (Search(header="tenant"), [200, 180, 160, 140, 120]),
        (Search(header="tenant", value="acme", key="k0"), [200, 100]),
        (Search(header="tenant", value="other"), []),
        (Search(text=": 199}"), [199]),
        (Search(text="%"), []),
        (Search(text="n", topics=("shop.order.#",), key="k30"), [180, 130, 80, 30]),
    ],
)
async def test_what_is_asked_for_is_found_and_nothing_else(
    bridge_database: str, connection: Connection, wanted: Search, found: list[int]
) -> None:
    await filled(bridge_database)
    page = await search(connection, wanted, page=5)
    assert numbers(page) == found
    if len(found) == 5:
        assert (page.is_full, page.next_before) == (True, found[-1])
    else:
        assert (page.is_full, page.next_before, page.looked) == (False, None, 200)


async def test_a_time_is_a_part_of_the_log(bridge_database: str, connection: Connection) -> None:
    await filled(bridge_database)
    [(since, until_)] = await execute(
        bridge_database,
        "select min(created_at), max(created_at) from bridge.outbox where id in (90, 95)",
    )
    page = await search(connection, Search(since=since, until=until_))  # type: ignore[arg-type]
    assert numbers(page) == [94, 93, 92, 91, 90]
    assert page.looked < 15, "of the rest of the log nothing is looked at"


async def test_a_search_looks_at_no_more_than_its_bound_and_goes_on_from_there(
    bridge_database: str, connection: Connection
) -> None:
    await filled(bridge_database)
    first = await search(connection, Search(key="k7"), page=5, bound=80)
    assert (numbers(first), first.looked, first.next_before, first.is_full) == ([157], 80, 121, False)
    second = await search(connection, Search(key="k7"), first.next_before, page=5, bound=80)
    assert (numbers(second), second.next_before) == ([107, 57], 41)


async def test_a_search_for_a_text_reads_few_large_payloads_at_a_time(
    bridge_database: str, connection: Connection
) -> None:
    await execute(
        bridge_database,
        "insert into bridge.outbox (topic, payload, content_type)"
        " select 'large', repeat('x', 3000000) || n, 'text/plain' from generate_series(1, 4) n order by n",
    )
    parts = (
        "select distinct looked, next_before from"
        " bridge.search_events(%s, 0, 1000, 5, 4000000, %s, null, null, null, null, null, 'y')"
    )
    # The first is always read; what else is asked spares the others.
    assert await execute(bridge_database, parts, 2**62, None) == [(2, 3)]
    assert await execute(bridge_database, parts, 2**62, ["small"]) == [(4, 1)]
    assert numbers(await search(connection, Search(text="x1"))) == [1]


async def test_filters_that_can_fit_nothing_are_refused() -> None:
    for wrong in ({"key": "a\0"}, {"text": "x" * 2000}, {"value": "a"}, {"topics": ("a" * 2000,)}):
        with pytest.raises(UsageError):
            Search(**wrong)


async def test_rows_that_no_emit_would_write_can_be_listed(bridge_database: str, connection: Connection) -> None:
    await execute(
        bridge_database,
        "insert into bridge.outbox (topic, payload, content_type, headers, created_at) values"
        " ('', '', '', '[1]', 'infinity'), ('t', 'p', 'c', '3', '-infinity'),"
        " ('t', 'p', 'c', '{\"a\": {\"b\": 1}}', now())",
    )
    assert len((await search(connection, Search())).events) == 3
    assert numbers(await search(connection, Search(header="a"))) == [3]
    found = [await content(connection, number) for number in (1, 3, 4)]
    assert [None if each is None else each.headers for each in found] == [{}, {"a": {"b": 1}}, None]


async def test_the_nearest_events_of_the_same_key_are_its_neighbours(
    bridge_database: str, connection: Connection
) -> None:
    await execute(
        bridge_database,
        "insert into bridge.outbox (topic, key, payload, content_type)"
        " select 't', case when mod(n, 2) = 0 then 'even' end, n::text, 'text/plain' from generate_series(1, 40) g (n)"
        " order by g.n",
    )
    assert [other.id for other in await neighbours(connection, 20, "even")] == [10, 12, 14, 16, 18, 22, 24, 26, 28, 30]
    assert await neighbours(connection, 20, "odd") == []
    near = "select id from bridge.event_neighbours(20, 'even', 5, 4)"
    assert await execute(bridge_database, near) == [(16,), (18,), (22,), (24,)]


# Pages


async def test_events_are_listed_filtered_and_led_to(bridge_database: str, tmp_path: Path) -> None:
    await filled(bridge_database)
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        page = await browser.page("/events")
        links = [attributes.get("href") for tag, attributes in page.tags if tag == "a"]
        assert "/events/200" in links
        assert "/events?before=151" in links
        assert "/events?topic=shop.order.updated" in links
        older = await browser.page("/events?before=11")
        assert "Events before number 11" in older.words
        assert "Older" not in older.words
        some = await browser.page("/events?topic=shop.order.%23&key=k30")
        assert (some.field("topic"), some.field("key")) == ("shop.order.#", "k30")
        assert "Looked at 200 events, and at all that there are" in some.words
        none = await browser.page("/events?key=nobody")
        assert "Nothing that fits, down to the beginning of the log." in none.words
        jump = await browser.page("/events?id=77")
        assert "/events/77" in [attributes.get("href") for tag, attributes in jump.tags if tag == "a"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("since=yesterday", "since: 'yesterday' is not a time"),
        ("until=99999999d", "until: "),
        ("key=%00", "key: at most"),
        ("id=none", "'none' is not the id of an event"),
        ("header==x", "value: is that of a header"),
    ],
)
async def test_what_cannot_be_searched_for_is_said_beside_the_form(
    bridge_database: str, tmp_path: Path, query: str, words: str
) -> None:
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        page = await browser.page(f"/events?{query}")
        assert words in page.words
        assert "/events" in page.forms


async def test_a_number_that_is_none_is_no_page_of_the_log(bridge_database: str, tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        for path in ("?before=x", f"?before={2**63}", "/none", "/77", f"/{'9' * 30}"):
            assert (await browser.get(f"/events{path}")).status_code == 422, path


async def test_an_empty_log_says_how_an_event_comes_into_it(bridge_database: str, tmp_path: Path) -> None:
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        assert "pgbridge emit" in (await browser.page("/events")).words


async def test_new_events_come_by_themselves(bridge_database: str, tmp_path: Path) -> None:
    text = ""

    async def comes() -> bool:
        nonlocal text
        text = await anext(renewals)
        return "hello" in text

    async with (
        browsing(console_settings(tmp_path, bridge_database)) as browser,
        aclosing(events_of(browser, "/live/events?topic=new.%23")) as renewals,
    ):
        assert "Nothing that fits" in await anext(renewals)
        await execute(bridge_database, "select bridge.emit('old', 'x'), bridge.emit('new.one', 'hello')")
        await until(comes)
        assert "new.one" in text
        assert '"/events/1"' not in text


async def test_however_many_browsers_look_a_search_is_made_once(
    bridge_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(bridge_database)
    made = 0

    async def counted(*asked: object) -> Page:
        nonlocal made
        made += 1
        return await search(*asked)  # type: ignore[arg-type]

    monkeypatch.setattr("bridge.console.events.search", counted)
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        for _ in range(20):
            await browser.page("/events?before=100&key=k7")
    assert made == 1


async def test_what_an_event_carries_is_text(bridge_database: str, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\x1b[2J\u202e"
    [(event_id,)] = await execute(
        bridge_database,
        "select bridge.emit('t', %s::jsonb, %s, %s::jsonb)",
        json.dumps({"hostile": hostile.replace("\x1b", "")}), "<b>key", json.dumps({"h": "<i>\x1b"}),
    )  # fmt: skip
    await execute(bridge_database, "select bridge.emit('text', %s::text)", hostile)
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        for path in ("/events", "/events/1", "/events/2", f"/events/{event_id}"):
            answer = await browser.get(path)
            assert answer.status_code == 200
            assert "<script>alert" not in answer.text
            assert not [part for part in ("<b>key", "<i>", "\x1b", "\u202e") if part in answer.text]
            assert "&lt;script&gt;" in answer.text
        assert "\\x1b[2J\\u202e" in (await browser.get("/events/2")).text


async def test_one_event_shows_its_life_its_context_and_its_neighbours(bridge_database: str, tmp_path: Path) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    await execute(
        bridge_database,
        "insert into bridge.cursor"
        " (name, sink, mark, gaps, old_gaps, held, horizon, system_identifier, patterns) values"
        " ('test', 'events', 3, '{}', '{}', '{[2,3)}', '3', 1, '{#}'),"
        " ('test', 'other', 3, '{}', '{}', '{}', '3', 1, '{#}')",
    )
    await execute(bridge_database, "select bridge.emit('a', 'first', 'k')")
    async with await connect(PostgresSettings.model_validate({"dsn": bridge_database}), "test") as session:
        await session.execute("select set_config('bridge.traceparent', %s, false)", [f"00-{trace}-00f067aa0ba902b7-01"])
        await session.execute("select set_config('bridge.actor', %s, false)", ['{"sub": "ann", "role": "web"}'])
        cursor = await session.execute("select bridge.emit('a', '{\"n\": 12345678901234567890.10}'::json, 'k')::text")
        [(event_id,)] = await cursor.fetchall()
    await execute(bridge_database, "select bridge.emit('a', 'third', 'k')")
    await execute(
        bridge_database,
        "insert into bridge.inbox (worker, event_id, attempts, started_at, finished_at, result, effects) values"
        " ('stock', %s, 2, now() - interval '3 s', now(), '{\"left\": 4}', '{\"charge\": {\"idempotency_key\":"
        " \"stock:1:charge\", \"started_at\": \"2026-02-03T04:05:06+00:00\", \"result\": {}}}'),"
        " ('mails', %s, 5, now(), null, null, '{}')",
        event_id, event_id,
    )  # fmt: skip
    await execute(
        bridge_database,
        "insert into bridge.dead_letter (bridge, event_id, sequence, topic, payload, content_type, headers, created_at,"
        " sink, code, reason, attempts) values"
        " ('test', %s, 2, 'a', 'x', 'c', '{}', now(), 'other', 'too_large', 'it is', 1)",
        event_id,
    )
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        page = await browser.page(f"/events/{event_id}")
        for words in (
            trace, "ann, as web", "Recorded in the log", "Held: the broker refused it for now",
            "no bridge named test is running", "Dead letter: sink other of bridge test", "too_large: it is",
            "Finished: worker stock", '{"left": 4}', "Effect charge of worker stock", "stock:1:charge",
            "Waits for another attempt: worker mails", "12345678901234567890.10", "before", "after",
        ):  # fmt: skip
            assert words in page.words, words
        links = [attributes.get("href") for tag, attributes in page.tags if tag == "a"]
        assert {"/events/1", "/events/2", "/events/3", "/events?key=k"} <= set(links)
        assert (await browser.page("/events/2")).words == page.words
        unknown = await browser.page(f"/events/{uuid4()}")
        assert "There is no trace of this event" in unknown.words


async def test_of_a_large_payload_the_beginning_is_shown(bridge_database: str, tmp_path: Path) -> None:
    await execute(bridge_database, "select bridge.emit('t', repeat('é', 2000000))")
    async with browsing(console_settings(tmp_path, bridge_database)) as browser:
        answer = await browser.get("/events/1")
        assert answer.text.count("é") == 65_536
        assert "The first 65,536 characters of it." in answer.text
        assert (await browser.get("/events")).text.count("é") == 200
