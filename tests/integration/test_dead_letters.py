"""`pgbridge dead`: one surface over the outbox's dead letters and those of the workers' queues."""

import getpass
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aio_pika
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.support.commands import command, json_of
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings
from tests.support.pubsub import PROJECT
from tests.support.servers import RabbitMQServer
from tests.support.until import rows_become
from tests.support.unwrapped import unwrapped

LETTER = """
insert into bridge.dead_letter
  (bridge, event_id, sequence, topic, key, payload, content_type, headers, created_at, sink, code, reason, attempts)
select 'test', gen_random_uuid(), n, %s, 'k', n::text, 'text/plain', '{"tenant": "a"}', now(), %s, %s, 'because', 2
from generate_series(1, %s) n
"""


@pytest.fixture
def config(bridge_database: str, messages: Messages, tmp_path: Path) -> str:
    return str(Daemon(tmp_path, settings(bridge_database, messages)).config)


async def test_letters_are_listed_filtered_and_shown(bridge_database: str, config: str) -> None:
    await execute(bridge_database, LETTER, "shop.a", "events", "too_large", 2)
    await execute(bridge_database, LETTER, "other", None, "no_route", 1)
    await execute(bridge_database, "update bridge.dead_letter set failed_at = now() - interval '3h' where id = 1")
    options = ("dead", "list", "--config", config)
    assert [letter["id"] for letter in await json_of(*options)] == ["outbox:1", "outbox:2", "outbox:3"]
    for filters, found in (
        (("--topic", "shop.*"), ["outbox:1", "outbox:2"]),
        (("--code", "no_route"), ["outbox:3"]),
        (("--sink", "events"), ["outbox:1", "outbox:2"]),
        (("--since", "1h"), ["outbox:2", "outbox:3"]),
        (("--since", "1h", "--sink", "events"), ["outbox:2"]),
    ):
        assert [letter["id"] for letter in await json_of(*options, *filters)] == found, filters
    text, said = await command(*options, "--limit", "2")
    assert ("outbox:2" in text, "outbox:3" in text, "more than 2" in said) == (True, False, True)
    shown = await json_of("dead", "show", "outbox:1", "--config", config)
    assert (shown["payload"], shown["headers"], shown["attempts"]) == ("1", {"tenant": "a"}, 2)
    _, said = await command("dead", "show", "outbox:9", "--config", config, expect=2)
    assert "there is no dead letter outbox:9" in said
    _, said = await command("dead", "show", "nobody:9", "--config", config, expect=2)
    assert "there is no worker 'nobody'" in said


async def test_a_letter_is_published_again_to_the_sink_that_refused_it_and_audited(
    bridge_database: str, messages: Messages, config: str
) -> None:
    await execute(bridge_database, LETTER, "shop.a", "events", "unroutable", 250)
    wanted = await execute(bridge_database, "select event_id::text from bridge.dead_letter order by id")
    _, said = await command("dead", "replay", "--all", "--dry-run", "--config", config)
    assert "250 would be replayed" in said
    _, said = await command("dead", "replay", "--all", "--config", config)
    assert "250 replayed." in said
    taken = await messages.take(250)
    assert [(message.message_id,) for message in taken] == wanted
    assert {(m.headers["tenant"], m.headers["cloudEvents_subject"]) for m in taken} == {("a", "k")}
    assert len({m.headers["replayed"] for m in taken}) == 1, "one replay has one mark"
    assert await execute(bridge_database, "select count(*) from bridge.dead_letter") == [(0,)]
    assert await execute(bridge_database, "select count(*) from bridge.outbox") == [(0,)]
    audits = await execute(
        bridge_database, "select distinct action, role, split_part(person, '@', 1) from bridge.dead_letter_audit"
    )
    assert audits == [("replayed", "postgres", getpass.getuser())]


async def test_a_letter_that_is_refused_again_stays_with_the_new_reason(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    text = settings(bridge_database, messages).replace('topic = "#"', 'topic = "shop.#"')
    config = str(Daemon(tmp_path, text).config)
    await execute(bridge_database, LETTER, "other", None, "old", 1)
    await execute(bridge_database, LETTER, "shop.a", None, "old", 1)
    out, said = await command("dead", "replay", "--code", "old", "--config", config, expect=1)
    assert "outbox:1  refused again: no route takes the topic 'other'" in out
    assert "1 replayed.\n1 refused again; they stay" in said
    assert await execute(bridge_database, "select id, code, attempts from bridge.dead_letter") == [(1, "no_route", 3)]
    (message,) = await messages.take(1)
    assert message.routing_key == "shop.a"


async def test_a_replay_keeps_its_rate(bridge_database: str, config: str) -> None:
    await execute(bridge_database, LETTER, "shop.a", "events", "unroutable", 30)
    began = time.monotonic()
    await command("dead", "replay", "--all", "--rate", "20", "--limit", "21", "--config", config)
    assert time.monotonic() - began > 0.9
    assert await execute(bridge_database, "select count(*) from bridge.dead_letter") == [(9,)]


async def test_discarding_needs_a_choice_and_a_reason_and_is_audited(bridge_database: str, config: str) -> None:
    await execute(bridge_database, LETTER, "shop.a", "events", "too_large", 3)
    await command("dead", "discard", "outbox:1", "--config", config, expect=2)
    _, said = await command("dead", "discard", "--why", "tidy", "--config", config, expect=2)
    assert "which letters?" in said
    await command("dead", "discard", "outbox:2", "--why", "a test order", "--config", config)
    assert await execute(bridge_database, "select id from bridge.dead_letter order by id") == [(1,), (3,)]
    audits = await execute(bridge_database, "select letter, action, topic, code, why from bridge.dead_letter_audit")
    assert audits == [("outbox:2", "discarded", "shop.a", "too_large", "a test order")]
    _, said = await command("dead", "discard", "outbox:2", "--why", "again", "--config", config, expect=1)
    assert "There are no such letters: outbox:2" in said


async def test_a_login_of_the_operators_role_may_do_all_of_it(
    bridge_database: str, messages: Messages, tmp_path: Path, unique: str
) -> None:
    role = sql.Identifier(unique)
    with psycopg.connect(bridge_database, autocommit=True) as admin:
        admin.execute(sql.SQL("create role {} login in role bridge_operator").format(role))
    try:
        dsn = make_conninfo(bridge_database, user=unique)
        text = settings(dsn, messages).replace('topic = "#"', 'topic = "shop.#"')
        config = ("--config", str(Daemon(tmp_path, text).config))
        await execute(bridge_database, LETTER, "shop.a", "events", "unroutable", 2)
        await execute(bridge_database, LETTER, "other", None, "no_route", 1)
        await execute(bridge_database, "select bridge.emit('shop.b', 'x'), bridge.emit('other', 'y')")
        await command("status", *config, expect=1)
        await command("dead", "discard", "outbox:1", "--why", "x", *config)
        await command("dead", "replay", "--all", *config, expect=1)
        await command("replay", "--from", "1h", *config, expect=1)
        assert len(await messages.take(2)) == 2
        audits = await execute(bridge_database, "select distinct role from bridge.dead_letter_audit")
        assert audits == [(unique,)]
    finally:
        with psycopg.connect(bridge_database, autocommit=True) as admin:
            admin.execute(sql.SQL("drop role {}").format(role))


def with_worker(text: str, worker: str) -> str:
    return f"""{text}
[workers.{worker}]
handler = "tests.support.worker_handlers:refuse"
max_attempts = 1
"""


@pytest.fixture(params=["rabbitmq", "nats", "pubsub"])
async def refusing(
    request: pytest.FixtureRequest, bridge_database: str, tmp_path: Path, unique: str
) -> AsyncIterator[tuple[Daemon, str]]:
    """A worker that refuses three events, on each broker; the bridge that brought them still runs."""
    fixture = {"rabbitmq": "rabbitmq", "nats": "nats_server", "pubsub": "pubsub_emulator"}[request.param]
    server = request.getfixturevalue(fixture)
    sink = {
        "rabbitmq": lambda: f'type = "rabbitmq"\nexchange = "{unique}"\nurl = "{server.url}"',
        "nats": lambda: f'type = "nats"\nstream = "{unique}"\nurl = "{server.url}"',
        "pubsub": lambda: (
            f'type = "pubsub"\nproject = "{PROJECT}"\ntopic = "{unique}"\nemulator_host = "{server.address}"'
        ),
    }[request.param]()
    text = with_worker(
        f'name = "test"\n[postgres]\ndsn = "{bridge_database}"\n[sinks.events]\n{sink}\n'
        f'[[routes]]\ntopic = "#"\nsink = "events"\n',
        unique,
    )
    bridge = Daemon(tmp_path / "bridge", text)
    await command("topology", "--apply", "--config", str(bridge.config))
    worker = Daemon(tmp_path / "worker", text, "run", unique, module="workers.cli")
    with bridge, worker:
        worker.wait_for("worker.started")
        await execute(bridge_database, "select bridge.emit('refuse.' || n, n::text) from generate_series(1, 3) n")
        worker.wait_for("event.dead_lettered", count=3)
        yield worker, unique


async def test_letters_of_a_worker_are_shown_replayed_and_discarded(
    refusing: tuple[Daemon, str], bridge_database: str
) -> None:
    worker, name = refusing
    config = ("--config", str(worker.config))
    for _ in range(3):
        found = await json_of("dead", "list", *config)
        assert sorted(letter["topic"] for letter in found) == ["refuse.1", "refuse.2", "refuse.3"], "looking keeps them"
    assert {(letter["box"], letter["code"], letter["attempts"]) for letter in found} == {(name, "rejected", 1)}
    by_topic = {letter["topic"]: letter for letter in found}
    shown = await json_of("dead", "show", by_topic["refuse.2"]["id"], *config)
    assert (shown["payload"], shown["reason"]) == ("2", "no")
    assert await json_of("dead", "list", "--worker", name, "--sink", "events", *config) == []

    await command("dead", "discard", by_topic["refuse.1"]["id"], "--why", "nonsense", *config)
    await command("dead", "replay", by_topic["refuse.2"]["id"], *config)
    # The worker gets it again, and refuses it again.
    worker.wait_for("event.dead_lettered", count=4)
    left = await json_of("dead", "list", "--worker", name, *config)
    assert sorted(letter["topic"] for letter in left) == ["refuse.2", "refuse.3"]
    again = next(letter for letter in left if letter["topic"] == "refuse.2")
    assert (again["id"], again["headers"].keys()) == (by_topic["refuse.2"]["id"], {"replayed"})
    audits = await execute(bridge_database, "select letter, action, why from bridge.dead_letter_audit order by id")
    assert audits == [
        (by_topic["refuse.1"]["id"], "discarded", "nonsense"),
        (by_topic["refuse.2"]["id"], "replayed", ""),
    ]


async def test_a_missing_dead_letter_queue_ends_with_69_and_the_outbox_is_still_listed(
    bridge_database: str, messages: Messages, tmp_path: Path, unique: str
) -> None:
    text = with_worker(settings(bridge_database, messages), unique)
    config = ("--config", str(Daemon(tmp_path, text).config))
    await execute(bridge_database, LETTER, "shop.a", "events", "too_large", 1)
    out, said = await command("dead", "list", *config, expect=69)
    assert "outbox:1" in out
    assert f"the dead letters of {unique}: " in said
    assert "pgbridge topology --apply" in said


async def test_what_the_broker_lacks_ends_topology_and_check_with_the_same_words_and_code(
    bridge_database: str, messages: Messages, tmp_path: Path, unique: str
) -> None:
    text = with_worker(settings(bridge_database, messages), unique)
    config = ("--config", str(Daemon(tmp_path, text).config))
    out, said = await command("topology", *config, expect=69)
    assert "missing" in out
    (words,) = [line.partition(": ")[2] for line in said.splitlines()]
    assert words.startswith("missing: ")
    assert f"queue {unique} (worker {unique})" in words
    assert words.endswith(". Declare what is missing: pgbridge topology --apply")
    out, _ = await command("check", *config, expect=69)
    assert f"FAIL  topology           {words}" in unwrapped(out)
    await command("topology", "--apply", *config)
    await command("topology", *config)


async def test_a_message_that_is_not_an_event_can_be_discarded(
    bridge_database: str, rabbitmq: RabbitMQServer, messages: Messages, tmp_path: Path, unique: str
) -> None:
    text = with_worker(settings(bridge_database, messages), unique)
    config = ("--config", str(Daemon(tmp_path, text).config))
    await command("topology", "--apply", *config)
    channel = await messages.connection.channel()
    await channel.default_exchange.publish(aio_pika.Message(b"\xff", message_id="strange"), f"{unique}.dead")
    (letter,) = await json_of("dead", "list", *config)
    assert (letter["id"], letter["topic"], letter["event_id"]) == (f"{unique}:strange", None, None)
    await command("dead", "discard", letter["id"], "--why", "not ours", *config)
    await rows_become(bridge_database, "select letter, event_id from bridge.dead_letter_audit", [(letter["id"], None)])
    assert await json_of("dead", "list", *config) == []
