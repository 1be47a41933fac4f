"""Webhooks in the database: who gets what, what is claimed, and what outcomes do; with several sessions at once."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from tests.support.webhooks import SCHEDULE, Claim, Webhooks
from workers.webhooks.url import UrlRefused, parse


@pytest.fixture
def hooks(bridge_database: str) -> Iterator[Webhooks]:
    with Webhooks(bridge_database) as opened:
        yield opened


@pytest.fixture
def other(bridge_database: str) -> Iterator[Webhooks]:
    """Another process."""
    with Webhooks(bridge_database) as opened:
        yield opened


# Who gets what. -------------------------------------------------------------------------------------------


def test_an_event_goes_once_to_each_endpoint_that_wants_its_topic(hooks: Webhooks) -> None:
    wanting = [hooks.add("{shop.#}"), hooks.add("{x,*.order}"), hooks.add("{shop.order}")]
    others = [hooks.add("{shop}"), hooks.add("{shop.order.#.x,SHOP.order}")]
    [event] = hooks.emit(topic="shop.order", body='{"n": 1}')
    # As from another worker that takes the topic, too, or after a replay.
    hooks.rows('select bridge.webhook_fan_out(%s, \'{"topic": "shop.order", "body": "other"}\')', event)
    found = hooks.rows("select endpoint, event_id::text, state from bridge.webhook_delivery order by endpoint")
    assert found == [(endpoint, event, "due") for endpoint in wanting]
    assert [hooks.states(endpoint) for endpoint in others] == [{}, {}]
    assert hooks.rows("select topic, body, key from bridge.webhook_message") == [("shop.order", '{"n": 1}', None)]


def test_what_nobody_wants_is_not_stored(hooks: Webhooks) -> None:
    hooks.add("{other.#}")
    hooks.emit()
    assert hooks.one("select count(*) from bridge.webhook_message") == 0


def test_a_claim_has_all_that_a_sender_needs(hooks: Webhooks) -> None:
    endpoint = hooks.add("{#}")
    [event] = hooks.emit(body='{"a":"ü"}')
    [row] = hooks.rows("select * from bridge.webhook_claim(10, 1000, 60, '{}')")
    secret = hooks.one("select secret from bridge.webhook_secret")
    [delivery] = hooks.one("select array_agg(id) from bridge.webhook_delivery")
    assert (row[0], row[1], str(row[2]), *row[3:]) == (
        *(delivery, 1, event, endpoint, "https://example.com/hook", [secret], '{"a":"ü"}'),
    )


def test_both_secrets_sign_until_the_old_one_expires(hooks: Webhooks) -> None:
    endpoint = hooks.add()
    old = hooks.one("select secret from bridge.webhook_secret")
    new = hooks.one("select bridge.rotate_secret(%s)", endpoint)
    hooks.emit(2)
    assert hooks.one("select secrets from bridge.webhook_claim(1, 1000, 60, '{}')") == [new, old]
    hooks.rows("update bridge.webhook_secret set expires_at = clock_timestamp() where secret = %s returning 1", old)
    assert hooks.one("select secrets from bridge.webhook_claim(1, 1000, 60, '{}')") == [new]


@pytest.mark.parametrize(
    "url",
    [
        *("https://example.com", "http://example.com.:8080/a?b", "https://x?y", "https://under_score.example"),
        *("https://[2001:db8::1]:1/x", "https://[::ffff:10.0.0.1]", "https://192.0.2.1", 'https://a-b.example/%zz"<>'),
        *("https://1.2.3", "https://0x7f.1", "https://a..b", "https://[1:2]", "https://a:", "https://a:0", "https://"),
        *(
            "https://127.0.0.01",
            "https://256.1.1.1",
            "https://[fe80::1%25eth0]",
            "https://a/b#c",
            "https://a@b",
            "https://-a",
        ),
        *(
            "ftp://a",
            "https://a\\b",
            "https://ü.example",
            "https://a.b..",
            "https://[::1",
            "https://a:65536",
            "https://a.",
        ),
        *(
            f"https://{'x' * 63}.example",
            f"https://{'x' * 64}.example",
            f"https://{'x.' * 126}y",
            f"https://{'x.' * 127}y",
        ),
    ],
)
def test_a_url_is_taken_where_the_sender_can_read_it(hooks: Webhooks, url: str) -> None:
    """Else every delivery to it would fail."""
    try:
        parse(url)
        readable = True
    except UrlRefused:
        readable = False
    try:
        hooks.rows("select bridge.check_webhook_url(%s)", url)
        taken = True
    except psycopg.errors.InvalidParameterValue:
        taken = False
    assert taken == readable


# Claims. --------------------------------------------------------------------------------------------------


def test_what_is_claimed_is_not_claimed_again_before_its_lease_ends(hooks: Webhooks, other: Webhooks) -> None:
    hooks.add(concurrency=10)
    hooks.emit(3)
    claimed = hooks.claim(2)
    assert [claim.attempt for claim in claimed] == [1, 1]
    rest = other.claim()
    assert len({claim.delivery for claim in [*claimed, *rest]}) == 3
    assert other.claim() == []
    assert 50 < (other.next_due() or 0) <= 60  # until the leases end
    hooks.end_leases()
    assert sorted(other.claim()) == sorted(claim._replace(attempt=2) for claim in [*claimed, *rest])


def test_a_process_does_not_get_again_what_it_has_in_hand_though_its_lease_has_ended(
    hooks: Webhooks, other: Webhooks
) -> None:
    hooks.add(concurrency=3)
    hooks.emit(1)
    mine = hooks.claim()
    hooks.end_leases()
    hooks.emit(2)
    rest = hooks.claim(in_hand=mine)
    assert len({claim.delivery for claim in [*mine, *rest]}) == 3
    assert hooks.record(mine) == ["done"]
    hooks.end_leases()
    assert sorted(other.claim()) == sorted(claim._replace(attempt=2) for claim in rest)


def test_what_a_dead_process_had_in_hand_is_noted_as_an_attempt_without_an_outcome(hooks: Webhooks) -> None:
    hooks.add()
    hooks.emit()
    hooks.claim()
    hooks.end_leases()
    [again] = hooks.claim()
    assert hooks.record([again]) == ["done"]
    attempts = hooks.rows("select number, status, duration is null, error <> '' from bridge.webhook_attempt order by 1")
    assert attempts == [(1, None, True, True), (2, 200, False, False)]


def test_a_late_answer_of_a_lost_claim_is_refused(hooks: Webhooks, other: Webhooks) -> None:
    hooks.add()
    hooks.emit()
    [lost] = hooks.claim()
    hooks.end_leases()
    [claim] = other.claim()
    assert hooks.record([lost], 410) == ["late"]
    assert hooks.states(claim.endpoint) == {"sending": 1}
    assert hooks.endpoint(claim.endpoint).disabled_at is None
    assert other.record([claim]) == ["done"]
    assert hooks.record([lost], 500) == ["late"]
    assert hooks.states(claim.endpoint) == {"done": 1}


def test_an_outcome_that_is_recorded_twice_counts_once(hooks: Webhooks) -> None:
    endpoint = hooks.add()
    hooks.emit()
    claims = hooks.claim()
    assert hooks.record(claims, 500) == ["due"]
    # As when the answer to the first was lost.
    assert hooks.record(claims, 500) == ["repeated"]
    assert hooks.endpoint(endpoint).failures == 1


def test_the_outcome_for_an_endpoint_that_was_removed_meanwhile_is_late(hooks: Webhooks) -> None:
    endpoint = hooks.add()
    hooks.emit()
    claims = hooks.claim()
    hooks.rows("select bridge.remove_endpoint(%s)", endpoint)
    assert hooks.record(claims) == ["late"]
    assert hooks.one("select count(*) from bridge.webhook_delivery") == 0


def test_concurrency_is_that_of_all_processes_together(hooks: Webhooks, other: Webhooks) -> None:
    endpoint = hooks.add(concurrency=3)
    hooks.emit(10)
    first = hooks.claim(2)
    second = other.claim()
    assert (len(first), len(second)) == (2, 1)
    assert hooks.claim() == []
    # Its own request must end first; when it does nobody knows.
    assert hooks.next_due() is None
    hooks.record(first[:1])
    assert hooks.next_due() == 0
    assert len(other.claim()) == 1
    assert hooks.states(endpoint) == {"sending": 3, "done": 1, "due": 6}


def test_processes_that_claim_at_the_same_time_never_share_a_delivery_nor_exceed_the_concurrency(
    bridge_database: str, hooks: Webhooks
) -> None:
    endpoints = [hooks.add(concurrency=3) for _ in range(4)]
    hooks.emit(30)
    barrier = threading.Barrier(4)
    excess: list[int] = []

    def process() -> list[Claim]:
        mine = []
        with Webhooks(bridge_database) as session:
            barrier.wait(30)
            while session.one("select count(*) from bridge.webhook_delivery where state <> 'done'"):
                claims = session.claim(5)
                most = session.one(
                    "select coalesce(max(n), 0) from (select count(*) as n from bridge.webhook_delivery"
                    " where state = 'sending' group by endpoint) s"
                )
                excess.extend([most] if most > 3 else [])
                mine += claims
                assert set(session.record(claims)) <= {"done"}
        return mine

    with ThreadPoolExecutor(4) as pool:
        done = [each.result(timeout=60) for each in [pool.submit(process) for _ in range(4)]]
    claimed = [claim for claims in done for claim in claims]
    assert not excess
    assert len(claimed) == len(set(claimed)) == 30 * len(endpoints)
    assert {claim.attempt for claim in claimed} == {1}


def test_a_claim_passes_over_what_another_one_has_locked(hooks: Webhooks, other: Webhooks) -> None:
    locked, free = hooks.add(), hooks.add()
    hooks.emit()
    with hooks.connection.transaction():
        hooks.rows("select from bridge.webhook_endpoint where id = %s for no key update", locked)
        other.connection.execute("set statement_timeout = '20s'")
        assert [claim.endpoint for claim in other.claim()] == [free]
    assert [claim.endpoint for claim in other.claim()] == [locked]


def test_an_endpoint_with_a_backlog_leaves_room_for_the_others(hooks: Webhooks) -> None:
    loaded = hooks.add("{a}", concurrency=100)
    hooks.emit(50, topic="a")
    small = [hooks.add("{b}", concurrency=100) for _ in range(3)]
    hooks.emit(2, topic="b")
    claimed = Counter(claim.endpoint for claim in hooks.claim(10))
    assert claimed == {loaded: 4, **dict.fromkeys(small, 2)}
    # The next request goes to whoever has the fewest, though others wait for longer.
    hooks.emit(2, topic="b")
    assert Counter(claim.endpoint for claim in hooks.claim(3)) == dict.fromkeys(small, 1)


def test_what_is_due_first_goes_first(hooks: Webhooks) -> None:
    hooks.add(concurrency=100)
    events = hooks.emit(20)
    found = [str(event) for (event,) in hooks.rows("select event from bridge.webhook_claim(20, 1000000, 60, '{}')")]
    assert found == events


def test_a_claim_has_no_more_bytes_than_there_is_room_for_but_one_goes_always(hooks: Webhooks) -> None:
    hooks.add(concurrency=10)
    hooks.add("{none}", concurrency=10)
    hooks.emit(5, body="x" * 1000)
    assert len(hooks.claim(bytes_room=2500)) == 3
    assert len(hooks.claim(bytes_room=1)) == 1
    assert len(hooks.claim(bytes_room=0)) == 0


def test_a_rate_holds_over_all_processes_and_saves_little_up(hooks: Webhooks, other: Webhooks) -> None:
    hooks.add(rate=10.0, concurrency=1000)
    hooks.emit(50)
    first = [*hooks.claim(), *other.claim()]
    # A burst is what the rate gives in the 0.2 s between two looks, and the one that begins now.
    assert 3 <= len(first) <= 4
    seconds = hooks.next_due()
    assert seconds is not None
    assert 0 < seconds <= 0.1
    # An idle hour saves no more up.
    hooks.rows("update bridge.webhook_endpoint set next_start_at = next_start_at - interval '1 hour' returning 1")
    assert 3 <= len(other.claim()) <= 4


def test_a_rate_of_less_than_one_a_second_gives_one_after_the_other(hooks: Webhooks) -> None:
    hooks.add(rate=1 / 3600, concurrency=10)
    hooks.emit(3)
    assert len(hooks.claim()) == 1
    assert hooks.claim() == []
    assert hooks.next_due() == pytest.approx(3600, abs=30)


def test_a_clock_that_went_back_does_not_stop_an_endpoint_with_a_rate(hooks: Webhooks) -> None:
    hooks.add(rate=100.0, concurrency=100)
    hooks.emit(3)
    hooks.claim(1)
    hooks.rows("update bridge.webhook_endpoint set next_start_at = next_start_at + interval '1 day' returning 1")
    seconds = hooks.next_due()
    assert seconds is not None
    assert seconds <= 0.01


def test_what_is_due_is_found_without_looking_at_the_history(hooks: Webhooks) -> None:
    """On a table whose statistics know of nothing, and in which nearly all is done."""
    if hooks.connection.info.server_version < 150_000:
        pytest.skip("PostgreSQL 14 tells what a session has read only some time later")
    endpoint = hooks.add(concurrency=10)
    hooks.connection.execute("set session_replication_role = replica")  # without a message for each
    hooks.connection.execute(
        "insert into bridge.webhook_delivery (endpoint, event_id, state, finished_at)"
        " select %s, gen_random_uuid(), (array['done', 'failed', 'skipped'])[1 + i %% 3], clock_timestamp()"
        " from generate_series(1, 30000) i",
        [endpoint],
    )
    hooks.connection.execute("set session_replication_role = origin")
    hooks.emit(10)

    def rows_read() -> int:
        hooks.one("select pg_stat_force_next_flush()::text")
        return int(
            hooks.one(
                "select seq_tup_read + (select sum(i.idx_tup_read) from pg_stat_user_indexes i where i.relid = t.relid)"
                " from pg_stat_user_tables t where t.relid = 'bridge.webhook_delivery'::regclass"
            )
        )

    before = rows_read()
    for _ in range(8):  # past the executions after which PostgreSQL keeps a generic plan
        assert hooks.next_due() == 0
        [claim] = hooks.claim(1)
        assert hooks.record([claim]) == ["done"]
    read = rows_read() - before
    assert read < 1000


# Outcomes. ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_any_2xx_is_delivered(hooks: Webhooks, status: int) -> None:
    endpoint = hooks.add()
    hooks.emit()
    claims = hooks.claim()
    assert hooks.record(claims, status, answer="thanks") == ["done"]
    assert hooks.claim() == []
    assert hooks.next_due() is None
    assert hooks.endpoint(endpoint).last_success_at is not None
    assert hooks.rows("select number, status, duration, answer from bridge.webhook_attempt") == [
        (1, status, 0.1, "thanks")
    ]


@pytest.mark.parametrize("status", [None, 100, 301, 400, 404, 500])
def test_anything_else_is_tried_again_by_the_schedule_and_then_has_failed(hooks: Webhooks, status: int | None) -> None:
    endpoint = hooks.add()
    hooks.emit()
    for wait in SCHEDULE:
        [claim] = hooks.claim()
        assert hooks.record([claim], status) == ["due"]
        due_in = hooks.delivery(claim.delivery)["due_in"]
        assert 0.9 * wait - 1 < due_in <= 1.1 * wait
        assert hooks.claim() == []
        hooks.make_due()
    assert hooks.record(hooks.claim(), status) == ["failed"]
    assert hooks.states(endpoint) == {"failed": 1}
    assert hooks.endpoint(endpoint).failed == 1


def test_delays_are_drawn_at_random_so_that_what_failed_together_does_not_come_together(hooks: Webhooks) -> None:
    hooks.add(concurrency=100)
    hooks.emit(50)
    hooks.record(hooks.claim(), 500, schedule=[1000.0])
    waits = [
        wait
        for (wait,) in hooks.rows(
            "select extract(epoch from due_at - clock_timestamp())::float8 from bridge.webhook_delivery"
        )
    ]
    assert 880 < min(waits) < 960 < 1040 < max(waits) <= 1100


@pytest.mark.parametrize(("asked", "least", "most"), [(0, 0, 6), (100, 90, 100), (10**9, 86000, 86400), (-5, 0, 6)])
def test_the_later_of_schedule_and_retry_after_counts_and_at_most_a_day(
    hooks: Webhooks, asked: float, least: float, most: float
) -> None:
    hooks.add()
    hooks.emit()
    [claim] = hooks.claim()
    hooks.record([claim], 400, retry_after=asked)
    assert least <= hooks.delivery(claim.delivery)["due_in"] <= most


@pytest.mark.parametrize(("status", "pauses"), [(429, True), (502, True), (503, True), (504, True), (500, False)])
def test_an_endpoint_that_says_that_it_is_too_much_gets_nothing_for_as_long_as_it_says(
    hooks: Webhooks, status: int, pauses: bool
) -> None:
    hooks.add(concurrency=1)
    hooks.emit(2)
    hooks.record(hooks.claim(), status, retry_after=100)
    seconds = hooks.next_due()
    assert seconds is not None
    assert (90 < seconds <= 100) if pauses else seconds == 0
    assert len(hooks.claim()) == (0 if pauses else 1)


def test_410_disables_the_endpoint_at_once_and_tells_it(hooks: Webhooks) -> None:
    endpoint = hooks.add(concurrency=2)
    hooks.emit(5)
    gone, sending = hooks.claim(2)
    assert hooks.record([gone], 410) == ["failed"]
    assert hooks.states(endpoint) == {"failed": 1, "sending": 1, "skipped": 3}
    assert "410" in hooks.endpoint(endpoint).disabled_why
    [(topic, key, payload)] = hooks.rows("select topic, key, payload from bridge.outbox")
    assert (topic, key) == ("bridge.webhook.disabled", f"webhook:{endpoint}")
    told = json.loads(payload)
    assert {name: told[name] for name in ("endpoint", "url", "why")} == {
        "endpoint": endpoint,
        "url": "https://example.com/hook",
        "why": "it answered 410 Gone",
    }
    assert told["since"]
    # What was on the way then, and what comes.
    assert hooks.record([sending], 500) == ["skipped"]
    hooks.emit()
    assert hooks.states(endpoint) == {"failed": 1, "skipped": 5}
    assert hooks.claim() == []


def test_a_success_of_a_disabled_endpoint_is_still_a_success(hooks: Webhooks) -> None:
    endpoint = hooks.add()
    hooks.emit()
    claims = hooks.claim()
    hooks.rows("select bridge.disable_endpoint(%s)", endpoint)
    assert hooks.record(claims) == ["done"]


def test_a_disabling_that_is_rolled_back_tells_nothing(hooks: Webhooks) -> None:
    endpoint = hooks.add()
    hooks.emit()
    with hooks.connection.transaction(force_rollback=True):
        hooks.rows("select bridge.disable_endpoint(%s)", endpoint)
    assert hooks.one("select count(*) from bridge.outbox") == 0
    assert hooks.states(endpoint) == {"due": 1}


# The circuit breaker. -------------------------------------------------------------------------------------


def test_after_five_failures_in_a_row_nothing_is_sent_for_a_while_and_no_attempt_counted(hooks: Webhooks) -> None:
    endpoint = hooks.add(concurrency=1)
    hooks.emit(10)
    for _ in range(4):
        hooks.record(hooks.claim(), 500)
    assert hooks.endpoint(endpoint).breaker == "closed"
    hooks.record(hooks.claim(), 500)
    assert hooks.endpoint(endpoint).breaker == "open"
    assert hooks.claim() == []
    seconds = hooks.next_due()
    assert seconds is not None
    assert 9 < seconds <= 10
    assert hooks.one("select max(attempts) from bridge.webhook_delivery") == 1


def test_a_success_between_failures_keeps_the_breaker_closed(hooks: Webhooks) -> None:
    endpoint = hooks.add(concurrency=1)
    hooks.emit(20)
    for status in [500, 500, 500, 500, 200] * 3:
        hooks.record(hooks.claim(), status)
    assert hooks.endpoint(endpoint).breaker == "closed"


def test_it_opens_for_twice_as_long_each_time_and_for_15_minutes_at_most(hooks: Webhooks) -> None:
    endpoint = hooks.add(concurrency=1)
    hooks.emit(30)
    hooks.fail(5)
    opened = []
    for _ in range(9):
        opened.append(hooks.one("select extract(epoch from open_until - now())::float8 from bridge.webhook_endpoint"))
        hooks.fail(1)
    assert opened == pytest.approx([10, 20, 40, 80, 160, 320, 640, 900, 900], abs=2)
    hooks.make_due()
    assert hooks.record(hooks.claim(1)) == ["done"]
    assert hooks.endpoint(endpoint).breaker == "closed"
    hooks.fail(5)
    assert 8 < hooks.one("select extract(epoch from open_until - now())::float8 from bridge.webhook_endpoint") <= 10


def test_what_was_on_the_way_when_it_opened_does_not_open_it_for_longer(hooks: Webhooks) -> None:
    endpoint = hooks.add(concurrency=10)
    hooks.emit(10)
    hooks.record(hooks.claim(), 500)
    assert hooks.endpoint(endpoint).failures == 10
    assert hooks.one("select opened from bridge.webhook_endpoint") == 1


def test_half_open_it_gets_exactly_one_probe_whoever_asks(bridge_database: str, hooks: Webhooks) -> None:
    hooks.add(concurrency=10)
    hooks.emit(20)
    hooks.record(hooks.claim(5), 500)
    hooks.make_due()
    barrier = threading.Barrier(4)

    def process() -> list[Claim]:
        with Webhooks(bridge_database) as session:
            barrier.wait(30)
            return [claim for _ in range(20) for claim in session.claim()]

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(process) for _ in range(4)]
        [probe] = [claim for each in asked for claim in each.result(timeout=60)]
    assert hooks.claim() == []
    assert hooks.next_due() is None, "whoever waits for the probe need not ask again and again"
    hooks.record([probe])
    assert len(hooks.claim()) == 10


def test_a_probe_that_dies_with_its_process_is_followed_by_another_one(hooks: Webhooks) -> None:
    hooks.add(concurrency=1)
    hooks.emit(9)
    hooks.fail(5)
    hooks.make_due()
    assert len(hooks.claim()) == 1
    assert hooks.claim() == []
    hooks.end_leases()
    assert len(hooks.claim()) == 1


# Long failure. --------------------------------------------------------------------------------------------


def test_an_endpoint_that_fails_for_days_is_disabled(hooks: Webhooks) -> None:
    endpoint = hooks.add()
    hooks.emit(10)
    for _ in range(5):
        hooks.fail(1, schedule=[1.0] * 99)
        hooks.pass_time(24.5)
        assert hooks.endpoint(endpoint).disabled_at is None
    hooks.fail(1, schedule=[1.0] * 99)
    assert hooks.endpoint(endpoint).disabled_why.startswith("nothing has succeeded since 20")
    assert hooks.states(endpoint) == {"skipped": 10}
    assert hooks.one("select count(*) from bridge.outbox where topic = 'bridge.webhook.disabled'") == 1


def test_one_failure_long_ago_and_one_now_disable_nothing(hooks: Webhooks) -> None:
    endpoint = hooks.add()
    hooks.emit(10)
    hooks.fail(1)
    hooks.pass_time(24 * 30)
    # Many at one time are one sign of many.
    hooks.fail(8, schedule=[1.0] * 99)
    assert hooks.endpoint(endpoint).disabled_at is None


def test_many_failures_apart_within_five_days_disable_nothing(hooks: Webhooks) -> None:
    endpoint = hooks.add()
    hooks.emit(1)
    for _ in range(30):
        hooks.fail(1, schedule=[1.0] * 99)
        hooks.pass_time(3.9)
    assert hooks.endpoint(endpoint).disabled_at is None


def test_a_success_begins_the_days_anew(hooks: Webhooks) -> None:
    endpoint = hooks.add()
    hooks.emit(30)
    for _ in range(4):
        for _ in range(4):
            hooks.fail(1, schedule=[1.0] * 99)
            hooks.pass_time(24)
        hooks.make_due()
        hooks.record(hooks.claim(1))
    assert hooks.endpoint(endpoint).disabled_at is None


# What people do. ------------------------------------------------------------------------------------------


def test_what_failed_or_was_skipped_since_then_is_recovered(hooks: Webhooks) -> None:
    endpoint = hooks.add(concurrency=10)
    hooks.emit(2)
    hooks.record(hooks.claim(), 500, schedule=[])
    hooks.pass_time(48)
    hooks.emit(3)
    hooks.record(hooks.claim(1), 200)
    hooks.record(hooks.claim(1), 500, schedule=[])
    hooks.rows("select bridge.disable_endpoint(%s)", endpoint)
    hooks.emit(4)
    assert hooks.states(endpoint) == {"failed": 3, "done": 1, "skipped": 5}
    assert hooks.one("select bridge.recover_endpoint(%s, now() - interval '1 day')", endpoint) == 6
    assert hooks.states(endpoint) == {"failed": 2, "done": 1, "due": 6}
    claims = hooks.claim()
    assert len(claims) == 6
    # With their whole schedule before them.
    assert set(hooks.record(claims, 500, schedule=[5.0])) == {"due"}
    assert hooks.one("select bridge.recover_endpoint(%s, now() - interval '3 days')", endpoint) == 2


def test_enabling_sends_what_comes_and_leaves_what_was_missed(hooks: Webhooks) -> None:
    endpoint = hooks.add(concurrency=1)
    hooks.emit(9)
    hooks.fail(6)
    hooks.rows("select bridge.disable_endpoint(%s, 'as they asked')", endpoint)
    assert hooks.endpoint(endpoint).disabled_why == "as they asked"
    assert not hooks.one("select bridge.disable_endpoint(%s, 'again')", endpoint)
    assert hooks.one("select bridge.enable_endpoint(%s)", endpoint)
    assert hooks.claim() == []
    assert hooks.endpoint(endpoint).breaker == "closed"
    hooks.emit()
    assert len(hooks.claim()) == 1


def test_what_is_stored_while_its_endpoint_is_being_disabled_is_skipped_by_the_next_claim(
    hooks: Webhooks, other: Webhooks
) -> None:
    endpoint = hooks.add()
    with hooks.connection.transaction():
        hooks.emit()
        # It neither waits for the one that stores, nor sees what that stores.
        other.connection.execute("set statement_timeout = '20s'")
        other.rows("select bridge.disable_endpoint(%s)", endpoint)
    assert hooks.states(endpoint) == {"due": 1}
    assert other.claim() == []
    assert hooks.states(endpoint) == {"skipped": 1}


def test_a_delivery_is_sent_again_whatever_became_of_it(hooks: Webhooks) -> None:
    hooks.add()
    hooks.emit()
    [first] = hooks.claim()
    hooks.record([first])
    hooks.rows("select bridge.resend_delivery(%s)", first.delivery)
    [second] = hooks.claim()
    assert second == first._replace(attempt=2)
    with pytest.raises(psycopg.errors.ObjectInUse, match="is being sent"):
        hooks.rows("select bridge.resend_delivery(%s)", first.delivery)
    hooks.record([second], 500, schedule=[])
    hooks.rows("select bridge.resend_delivery(%s)", first.delivery)
    [third] = hooks.claim()
    assert hooks.record([third], 500, schedule=[100.0]) == ["due"]
    # Now, and not when it would be due.
    hooks.rows("select bridge.resend_delivery(%s)", first.delivery)
    assert [claim.attempt for claim in hooks.claim()] == [4]


def test_a_delivery_of_a_disabled_endpoint_is_not_sent_again(hooks: Webhooks) -> None:
    endpoint = hooks.add()
    hooks.emit()
    [claim] = hooks.claim()
    hooks.record([claim])
    hooks.rows("select bridge.disable_endpoint(%s)", endpoint)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="is disabled"):
        hooks.rows("select bridge.resend_delivery(%s)", claim.delivery)


def test_another_url_begins_without_the_old_ones_trouble(hooks: Webhooks) -> None:
    endpoint = hooks.add(concurrency=1)
    hooks.emit(9)
    hooks.fail(6)
    hooks.rows("select bridge.change_endpoint(%s, concurrency => 3)", endpoint)
    assert hooks.endpoint(endpoint).breaker == "open"
    hooks.rows("select bridge.change_endpoint(%s, url => 'https://b.example', topics => '{x}')", endpoint)
    now = hooks.endpoint(endpoint)
    assert (now.breaker, now.failures, now.url, now.topics, now.concurrency) == (
        "closed",
        0,
        "https://b.example",
        ["x"],
        3,
    )
    hooks.emit()
    assert hooks.one("select count(*) from bridge.webhook_delivery") == 9, "it wants other topics now"


def test_the_last_deliveries_of_each_state_are_shown(hooks: Webhooks) -> None:
    endpoint = hooks.add(concurrency=100)
    hooks.add("{#}")
    hooks.emit(10)
    mine = [claim for claim in hooks.claim() if claim.endpoint == endpoint]
    hooks.record(mine[:4])
    hooks.record(mine[4:5], 410)
    shown = hooks.rows("select state, last_status from bridge.endpoint_deliveries(%s, 3)", endpoint)
    assert Counter(state for state, _ in shown) == {"sending": 3, "failed": 1, "done": 2}


# Pruning. -------------------------------------------------------------------------------------------------


def test_what_was_finished_long_ago_is_pruned_in_chunks_and_what_is_to_be_sent_stays(hooks: Webhooks) -> None:
    hooks.add(concurrency=100)
    slow = hooks.add("{shop.#}", concurrency=1)
    hooks.emit(5)
    claims = hooks.claim()
    hooks.record([claim for claim in claims if claim.endpoint != slow])
    hooks.rows("update bridge.webhook_message set created_at = created_at - interval '40 days' returning 1")
    hooks.pass_time(24 * 40)
    prune = "select deliveries::int, messages::int from bridge.webhook_prune(now() - interval '30 days', 3)"
    assert hooks.rows(prune) == [(3, 0)]
    assert hooks.rows(prune) == [(2, 0)]
    assert hooks.rows(prune) == [(0, 0)]
    assert hooks.one("select count(*) from bridge.webhook_attempt") == 0
    assert hooks.states(slow) == {"due": 4, "sending": 1}
    hooks.rows("select bridge.remove_endpoint(%s)", slow)
    assert hooks.rows(prune) == [(0, 3)]
    assert hooks.rows(prune) == [(0, 2)]


def test_what_is_finished_and_young_is_kept(hooks: Webhooks) -> None:
    endpoint = hooks.add()
    hooks.emit(2)
    hooks.record(hooks.claim())
    assert hooks.rows("select * from bridge.webhook_prune(now() - interval '1 day', 100)") == [(0, 0)]
    assert hooks.states(endpoint) == {"done": 2}
