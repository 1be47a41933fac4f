"""The process that sends webhooks, over a real PostgreSQL and endpoints that answer as a test says."""

import asyncio
import contextlib
import functools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo
from pydantic import SecretStr
from standardwebhooks import Webhook
from structlog.testing import capture_logs

from bridge.errors import PrivilegeError, SchemaError
from bridge.postgres.schema import migrate
from bridge.settings import PostgresSettings
from tests.support.proxy import Proxy
from tests.support.servers import PostgresServer
from tests.support.until import until
from tests.support.webhooks import Webhooks
from workers.webhooks.client import Answer
from workers.webhooks.deliveries import Claimed, Deliveries
from workers.webhooks.metrics import REGISTRY
from workers.webhooks.options import WebhookOptions
from workers.webhooks.sender import POLL_INTERVAL, Sender
from workers.webhooks.signature import sign

Behaviour = Callable[[], Awaitable[Answer]]


async def fine() -> Answer:
    return Answer(200, b"thanks", duration=0.01)


async def broken() -> Answer:
    return Answer(500, b"Internal \x00\xff error", duration=0.01)


@dataclass
class Endpoints:
    """A poster: what was posted, and how each URL answers."""

    posts: list[tuple[str, bytes, Mapping[str, str]]] = field(default_factory=list)
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    open: Counter[str] = field(default_factory=Counter)
    """Requests that are being answered, by URL."""
    most_open: Counter[str] = field(default_factory=Counter)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        self.posts.append((url, body, headers))
        self.open[url] += 1
        self.most_open[url] = max(self.most_open[url], self.open[url])
        try:
            return await self.behaviours.get(url, fine)()
        finally:
            self.open[url] -= 1

    def hang(self, url: str) -> asyncio.Event:
        """From now on the URL answers when the event is set."""
        gate = asyncio.Event()

        async def answer() -> Answer:
            await gate.wait()
            return await fine()

        self.behaviours[url] = answer
        return gate

    def posted(self, url: str) -> int:
        return sum(posted == url for posted, _, _ in self.posts)


class CountedDeliveries(Deliveries):
    """What is asked of the database, counted."""

    looks = 0
    waited_at: tuple[float, float] | None = None

    async def claim(self, room: int, bytes_room: int, in_hand: Sequence[int]) -> Sequence[Claimed]:
        self.looks += 1
        waited_at, self.waited_at = self.waited_at, None
        now = asyncio.get_running_loop().time()
        claimed = await super().claim(room, bytes_room, in_hand)
        if claimed and waited_at is not None:
            seconds, at = waited_at
            self.rests.append((seconds, now - at))
        return claimed

    async def next_due(self) -> float | None:
        seconds = await super().next_due()
        if seconds is not None:
            self.waited_at = (seconds, asyncio.get_running_loop().time())
        return seconds

    @functools.cached_property
    def rests(self) -> list[tuple[float, float]]:
        """Seconds until something was due, and those after which it was found."""
        return []


@pytest.fixture
def hooks(bridge_database: str) -> Iterator[Webhooks]:
    with Webhooks(bridge_database) as opened:
        yield opened


@pytest.fixture
def endpoints() -> Endpoints:
    return Endpoints()


def sender_of(
    settings: PostgresSettings, poster: Endpoints, *, lease: float = 60.0, limit: float = 10.0, **options: Any
) -> tuple[Sender, CountedDeliveries]:
    given = WebhookOptions.model_validate({"schedule": [0.01, 0.01], **options})
    deliveries = CountedDeliveries(settings, "hooks", lease=lease, schedule=given.schedule)
    return Sender("hooks", given, deliveries, poster, sign, shutdown_limit=limit), deliveries


@contextlib.asynccontextmanager
async def sending(settings: PostgresSettings, poster: Endpoints, **how: Any) -> AsyncIterator[Sender]:
    """A sender that runs until the block ends, and then must stop in order."""
    sender, _ = sender_of(settings, poster, **how)
    stop = asyncio.Event()
    task = asyncio.create_task(sender.run(stop))
    await until(lambda: sender.health().role == "sending" or task.done(), "it starts")
    try:
        yield sender
    finally:
        stop.set()
        async with asyncio.timeout(30):
            await task


def figure(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"pgbridge_webhook_{name}", {"worker": "hooks", **labels})


async def test_a_webhook_arrives_signed_by_both_secrets_and_is_done(
    shop: PostgresSettings, hooks: Webhooks, endpoints: Endpoints
) -> None:
    endpoint = hooks.add()
    old = hooks.one("select secret from bridge.webhook_secret")
    new = hooks.one("select bridge.rotate_secret(%s)", endpoint)
    [event] = hooks.emit(body='{"type":"shop.order","data":{"ü":1.10}}')
    async with sending(shop, endpoints):
        await until(lambda: hooks.states(endpoint) == {"done": 1}, "it is delivered")
    [(url, body, headers)] = endpoints.posts
    assert (url, headers["webhook-id"], headers["content-type"]) == (
        *("https://example.com/hook", event, "application/json"),
    )
    assert body == '{"type":"shop.order","data":{"ü":1.10}}'.encode()
    for secret in (old, new):
        Webhook(secret).verify(body, dict(headers))
    assert hooks.rows("select status, answer from bridge.webhook_attempt") == [(200, "thanks")]


async def test_what_fails_is_sent_again_with_the_same_id_until_it_is_taken(
    shop: PostgresSettings, hooks: Webhooks, endpoints: Endpoints
) -> None:
    endpoint = hooks.add()
    hooks.emit()
    answers = iter([broken, broken, fine])
    endpoints.behaviours["https://example.com/hook"] = lambda: next(answers)()
    async with sending(shop, endpoints):
        await until(lambda: hooks.states(endpoint) == {"done": 1}, "the third is taken")
    assert len({headers["webhook-id"] for _, _, headers in endpoints.posts}) == 1
    attempts = hooks.rows("select number, status, answer from bridge.webhook_attempt order by number")
    # What cannot be text is marked.
    assert attempts == [
        (1, 500, "Internal \ufffd\ufffd error"),
        (2, 500, "Internal \ufffd\ufffd error"),
        (3, 200, "thanks"),
    ]


async def test_what_becomes_of_attempts_is_counted_and_told(
    shop: PostgresSettings, hooks: Webhooks, endpoints: Endpoints
) -> None:
    def counted() -> dict[str, float]:
        return {
            outcome: figure("attempts_total", outcome=outcome) or 0 for outcome in ("delivered", "retried", "failed")
        }

    async def gone() -> Answer:
        return Answer(410, duration=0.01)

    before = counted()
    good, bad = hooks.add("{a}", "https://good/?token=hush"), hooks.add("{b}", "https://bad/?token=hush")
    hooks.emit(1, "a")
    hooks.emit(1, "b")
    endpoints.behaviours["https://bad/?token=hush"] = broken
    with capture_logs() as lines:
        async with sending(shop, endpoints):
            await until(lambda: (hooks.states(good), hooks.states(bad)) == ({"done": 1}, {"failed": 1}), "both end")
            endpoints.behaviours["https://bad/?token=hush"] = gone
            hooks.emit(1, "b")
            await until(lambda: any(line["event"] == "webhook.disabled" for line in lines), "it is disabled")
    after = counted()
    assert {name: after[name] - before[name] for name in after} == {"delivered": 1, "retried": 2, "failed": 2}
    [disabled] = [line for line in lines if line["event"] == "webhook.disabled"]
    assert (disabled["endpoint"], disabled["why"]) == (bad, "it answered 410 Gone")
    assert "hush" not in str(lines)
    assert "whsec_" not in str(lines)
    assert figure("request_seconds_count") is not None


async def test_an_endpoint_that_hangs_delays_no_other(
    shop: PostgresSettings, hooks: Webhooks, endpoints: Endpoints
) -> None:
    slow = hooks.add("{#}", "https://slow", concurrency=2)
    quick = [hooks.add("{#}", f"https://quick{n}") for n in range(3)]
    gate = endpoints.hang("https://slow")
    hooks.emit(30)
    async with sending(shop, endpoints, concurrency=20):
        await until(lambda: all(hooks.states(each) == {"done": 30} for each in quick), "the others get all")
        assert hooks.states(slow) == {"sending": 2, "due": 28}
        gate.set()
        await until(lambda: hooks.states(slow) == {"done": 30}, "and so does it")
    assert endpoints.most_open["https://slow"] == 2


async def test_one_process_has_no_more_requests_than_it_may(
    shop: PostgresSettings, hooks: Webhooks, endpoints: Endpoints
) -> None:
    endpoint = hooks.add(concurrency=50)
    gate = endpoints.hang("https://example.com/hook")
    hooks.emit(20)
    async with sending(shop, endpoints, concurrency=5):
        await until(lambda: len(endpoints.posts) == 5, "it has as many as it may")
        assert hooks.states(endpoint) == {"sending": 5, "due": 15}
        gate.set()
        await until(lambda: hooks.states(endpoint) == {"done": 20}, "all are sent")
    assert endpoints.most_open["https://example.com/hook"] == 5


async def test_two_processes_share_the_work_and_send_nothing_twice(
    shop: PostgresSettings, hooks: Webhooks, endpoints: Endpoints
) -> None:
    ids = [hooks.add("{#}", f"https://e{n}", concurrency=3) for n in range(4)]
    hooks.emit(50)
    async with sending(shop, endpoints), sending(shop, endpoints):
        await until(lambda: all(hooks.states(each) == {"done": 50} for each in ids), "all are sent")
    sent = Counter((url, headers["webhook-id"]) for url, _, headers in endpoints.posts)
    assert set(sent.values()) == {1}
    assert max(endpoints.most_open.values()) <= 3


async def test_a_stop_claims_nothing_more_and_lets_requests_end_and_be_recorded(
    shop: PostgresSettings, hooks: Webhooks, endpoints: Endpoints
) -> None:
    endpoint = hooks.add(concurrency=3)
    gate = endpoints.hang("https://example.com/hook")
    hooks.emit(10)
    sender, deliveries = sender_of(shop, endpoints)
    stop = asyncio.Event()
    task = asyncio.create_task(sender.run(stop))
    with capture_logs() as lines:
        await until(lambda: len(endpoints.posts) == 3, "three are on the way")
        looks = deliveries.looks
        stop.set()
        await until(lambda: any(line["event"] == "webhook.draining" for line in lines), "it drains")
        assert sender.health().role == "stopping"
        gate.set()
        await asyncio.wait_for(task, 10)
    assert hooks.states(endpoint) == {"done": 3, "due": 7}
    assert len(endpoints.posts) == 3
    assert deliveries.looks <= looks + 2, "the look that went on, and one that had begun"
    assert lines[-1]["event"] == "webhook.stopped"


async def test_a_stop_leaves_what_does_not_end_in_time_to_its_lease(
    shop: PostgresSettings, hooks: Webhooks, endpoints: Endpoints
) -> None:
    endpoint = hooks.add()
    endpoints.hang("https://example.com/hook")
    hooks.emit()
    async with asyncio.timeout(20):
        async with sending(shop, endpoints, limit=0.5):
            await until(lambda: len(endpoints.posts) == 1, "it is on the way")
    assert hooks.states(endpoint) == {"sending": 1}
    hooks.end_leases()
    endpoints.behaviours.clear()
    async with sending(shop, endpoints):
        await until(lambda: hooks.states(endpoint) == {"done": 1}, "another process sends it")


async def test_what_was_answered_while_the_database_was_away_is_recorded_and_not_sent_again(
    shop: PostgresSettings, hooks: Webhooks, endpoints: Endpoints, postgres: PostgresServer
) -> None:
    endpoint = hooks.add(concurrency=5)
    gate = endpoints.hang("https://example.com/hook")
    hooks.emit(8)
    async with Proxy("127.0.0.1", postgres.port) as proxy:
        dsn = make_conninfo(shop.dsn.get_secret_value(), port=proxy.port)
        behind = PostgresSettings(dsn=SecretStr(dsn), connect_timeout=1.0)
        with capture_logs() as lines:
            async with sending(behind, endpoints) as sender:
                await until(lambda: len(endpoints.posts) == 5, "five are on the way")
                proxy.refuse = True
                proxy.cut()
                gate.set()
                await until(lambda: sender.health().problems != (), "it says that it is unhealthy")
                assert "database" in sender.health().problems[0]
                assert figure("database_up") == 0
                # As after an outage that is longer than the leases.
                hooks.end_leases()
                proxy.refuse = False
                await until(lambda: hooks.states(endpoint) == {"done": 8}, "all are recorded", limit=60)
                await until(lambda: sender.health().problems == (), "it is healthy again")
    assert set(Counter(headers["webhook-id"] for _, _, headers in endpoints.posts).values()) == {1}
    assert hooks.one("select max(attempts) from bridge.webhook_delivery") == 1
    assert [line["event"] for line in lines].count("database.lost") >= 1


async def test_while_nothing_can_be_sent_it_sleeps_and_wakes_for_what_comes(
    shop: PostgresSettings, hooks: Webhooks, endpoints: Endpoints
) -> None:
    endpoint = hooks.add("{soon}")
    # Neither what waits for its time, nor what waits for another process' request, is a reason to look more often.
    waiting = hooks.add("{late}", concurrency=1)
    hooks.emit(3, "late")
    hooks.record(hooks.claim(), 500, schedule=[3600.0])
    hooks.claim()
    assert hooks.states(waiting) == {"sending": 1, "due": 2}
    hooks.add("{later}")
    hooks.emit(1, "later")
    hooks.record(hooks.claim(), 500, schedule=[3600.0])
    seconds = hooks.next_due()
    assert seconds is not None
    assert seconds > 3000
    sender, deliveries = sender_of(shop, endpoints)
    stop = asyncio.Event()
    task = asyncio.create_task(sender.run(stop))
    await until(lambda: deliveries.looks >= 2, "it looks")
    before, begun = deliveries.looks, asyncio.get_running_loop().time()
    await until(lambda: deliveries.looks >= before + 6, "it looks again and again")
    assert asyncio.get_running_loop().time() - begun > 5 * 0.19
    hooks.emit(1, "soon")
    await until(lambda: hooks.states(endpoint) == {"done": 1}, "and then it sends")
    stop.set()
    await asyncio.wait_for(task, 10)
    assert hooks.states(waiting) == {"sending": 1, "due": 2}


async def test_what_is_due_in_a_moment_is_looked_for_then_and_not_at_the_next_poll(
    shop: PostgresSettings, hooks: Webhooks, endpoints: Endpoints
) -> None:
    endpoint = hooks.add(rate=8.0, concurrency=1)
    hooks.emit(10)
    sender, deliveries = sender_of(shop, endpoints)
    stop = asyncio.Event()
    task = asyncio.create_task(sender.run(stop))
    await until(lambda: hooks.states(endpoint) == {"done": 10}, "all are sent")
    stop.set()
    await asyncio.wait_for(task, 10)
    # By its rate the next request may begin every 125 ms. The machine may be slow, but not always.
    rested = [rested for seconds, rested in deliveries.rests if 0 < seconds <= 0.125]
    assert rested
    assert min(rested) < POLL_INTERVAL


async def test_a_mistake_of_ours_costs_an_attempt_and_no_other_delivery(
    shop: PostgresSettings, hooks: Webhooks, endpoints: Endpoints
) -> None:
    bad, good = hooks.add("{#}", "https://bad"), hooks.add("{#}", "https://good")

    async def mistake() -> Answer:
        raise ZeroDivisionError

    endpoints.behaviours["https://bad"] = mistake
    hooks.emit()
    with capture_logs() as lines:
        async with sending(shop, endpoints):
            await until(lambda: (hooks.states(bad), hooks.states(good)) == ({"failed": 1}, {"done": 1}), "both end")
    assert {line["event"] for line in lines if line["log_level"] == "error"} == {"webhook.crashed"}
    [(error,)] = hooks.rows("select distinct error from bridge.webhook_attempt where status is null")
    assert "ZeroDivisionError" in error


async def test_answers_that_the_encoding_of_the_database_lacks_are_recorded_all_the_same(
    database: str, unique: str, endpoints: Endpoints
) -> None:
    async def foreign() -> Answer:
        return Answer(200, "danke 谢谢".encode(), duration=0.01)

    endpoints.behaviours["https://example.com/hook"] = foreign
    latin = f"{unique}_latin"
    with Webhooks(database) as admin:
        admin.connection.execute(f"create database {latin} encoding 'LATIN1' locale 'C' template template0".encode())
        dsn = make_conninfo(database, dbname=latin)
        try:
            migrate(dsn)
            with Webhooks(dsn) as hooks:
                endpoint = hooks.add()
                hooks.emit()
                async with sending(PostgresSettings(dsn=SecretStr(dsn)), endpoints):
                    await until(lambda: hooks.states(endpoint) == {"done": 1}, "it is recorded")
                assert hooks.one("select answer from bridge.webhook_attempt") == "danke \\u8c22\\u8c22"
        finally:
            admin.connection.execute(f"drop database {latin} with (force)".encode())


async def test_the_start_says_which_privileges_are_missing(
    shop: PostgresSettings, hooks: Webhooks, endpoints: Endpoints, unique: str
) -> None:
    hooks.connection.execute("revoke execute on function bridge.webhook_next() from bridge_worker")
    sender, _ = sender_of(shop, endpoints)
    with pytest.raises(PrivilegeError, match=r"bridge\.webhook_next\(\).*grant bridge_worker"):
        await sender.run(asyncio.Event())


async def test_the_start_says_when_the_schema_is_too_old(
    shop: PostgresSettings, hooks: Webhooks, endpoints: Endpoints
) -> None:
    hooks.connection.execute("drop function bridge.webhook_next()")
    sender, _ = sender_of(shop, endpoints)
    with pytest.raises(SchemaError, match="pgbridge migrate"):
        await sender.run(asyncio.Event())
