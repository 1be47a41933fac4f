"""`pgbridge replay`: part of the log again, beside a bridge that runs."""

import asyncio
import json
import signal
import time
from pathlib import Path

from tests.support.commands import command, json_of
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings


async def at(dsn: str) -> str:
    ((now,),) = await execute(dsn, "select clock_timestamp()")
    return str(now.isoformat())  # type: ignore[attr-defined]


async def test_a_part_is_published_again_in_order_with_the_same_ids_and_marked(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    with Daemon(tmp_path, settings(bridge_database, messages)) as bridge:
        config = ("--config", str(bridge.config))
        await execute(bridge_database, "select bridge.emit('shop.early', 'x')")
        since = await at(bridge_database)
        await execute(
            bridge_database,
            "select bridge.emit(case n %% 2 when 0 then 'shop.even' else 'shop.odd' end, n::text, 'k',"
            ' \'{"tenant": "a"}\') from generate_series(1, 3000) n order by n',
        )
        until = await at(bridge_database)
        await execute(bridge_database, "select bridge.emit('shop.even', 'late')")
        first = await messages.take(3002)
        part = ("replay", "--from", since, "--to", until, "--topic", "*.even", *config)
        assert (await json_of(*part, "--dry-run"))["by_topic"] == {"shop.even": 1500}
        told = await json_of(*part)
        assert (told["confirmed"], told["refused"]) == (1500, 0)
        again = await messages.take(1500)
        assert [int(message.body) for message in again] == list(range(2, 3001, 2))
        assert [m.message_id for m in again] == [m.message_id for m in first if m.routing_key == "shop.even"][:1500]
        assert {m.headers["tenant"] for m in again} == {"a"}
        assert len({m.headers["replayed"] for m in again}) == 1, "one replay has one mark"
        assert all("replayed" not in message.headers for message in first)
        await execute(bridge_database, "select bridge.emit('after', 'x')")
        (last,) = await messages.take(1)
        assert last.routing_key == "after", "the bridge goes on, and the dry run published nothing"


async def test_a_rate_is_kept_and_an_interrupt_settles_what_is_in_flight(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    daemon = Daemon(tmp_path, settings(bridge_database, messages))
    await execute(bridge_database, "select bridge.emit('a', n::text) from generate_series(1, 1000) n order by n")
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *daemon.command[:3], "replay", "--from", "1h", "--rate", "100", "--json", *daemon.command[4:],
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    await messages.take(50)
    process.send_signal(signal.SIGINT)
    out, _ = await process.communicate()
    assert process.returncode == 130
    told = json.loads(out)["confirmed"]
    assert 50 <= told < 100 * (time.monotonic() - began) + 20
    rest = await messages.take(told - 50) if told > 50 else []
    assert [int(message.body) for message in rest] == list(range(51, told + 1))


async def test_what_can_never_be_published_again_becomes_a_dead_letter(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    text = settings(bridge_database, messages).replace('topic = "#"', 'topic = "shop.#"')
    config = str(Daemon(tmp_path, text).config)
    await execute(bridge_database, "select bridge.emit('shop.a', 'x'), bridge.emit('other', 'y')")
    told = await json_of("replay", "--from", "1h", "--config", config, expect=1)
    assert (told["confirmed"], told["refused"]) == (1, 1)
    letters = await execute(bridge_database, "select topic, code from bridge.dead_letter")
    assert letters == [("other", "no_route")]


async def test_what_is_pruned_is_told(bridge_database: str, messages: Messages, tmp_path: Path) -> None:
    config = str(Daemon(tmp_path, settings(bridge_database, messages)).config)
    await execute(bridge_database, "select bridge.emit('a', 'x') from generate_series(1, 3)")
    await execute(bridge_database, "delete from bridge.outbox where id = 1")
    _, said = await command("replay", "--from", "7d", "--dry-run", "--config", config)
    assert "The log begins at" in said
    assert "2 would be published" in said
    _, said = await command("replay", "--from", "yesterday", "--config", config, expect=2)
    assert "is not a time" in said


async def test_an_empty_log_replays_nothing(bridge_database: str, messages: Messages, tmp_path: Path) -> None:
    config = str(Daemon(tmp_path, settings(bridge_database, messages)).config)
    assert (await json_of("replay", "--from", "7d", "--config", config))["confirmed"] == 0


async def test_only_the_sinks_that_the_part_needs_are_opened(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    """One of two sinks is down, and what goes there is not in the part."""
    dead = '[sinks.dead]\ntype = "rabbitmq"\nurl = "amqp://guest@127.0.0.1:1"\n'
    dead += '[[routes]]\ntopic = "other.#"\nsink = "dead"'
    text = settings(bridge_database, messages, dead).replace('topic = "#"', 'topic = "shop.#"')
    config = str(Daemon(tmp_path, text).config)
    await execute(bridge_database, "select bridge.emit('shop.a', n::text) from generate_series(1, 10) n order by n")
    told = await json_of("replay", "--from", "1h", "--config", config)
    assert told == {"confirmed": 10, "refused": 0, "by_topic": {"shop.a": 10}}
    await execute(bridge_database, "select bridge.emit('shop.a', '11'), bridge.emit('other.a', 'x')")
    _, said = await command("replay", "--from", "1h", "--config", config, expect=69)
    assert "sinks.dead.url: RabbitMQ at 127.0.0.1:1 does not answer" in said
    told = await json_of("replay", "--from", "1h", "--topic", "shop.*", "--config", config)
    assert told["confirmed"] == 11
    bodies = [int(message.body) for message in await messages.take(21)]
    assert bodies == [*range(1, 11), *range(1, 12)], "the replay that ended with 69 published nothing"
