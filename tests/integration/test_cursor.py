"""`pgbridge cursor`: positions are shown, moved and removed, and never by mistake."""

from pathlib import Path

from tests.support.commands import command, json_of
from tests.support.daemons import Daemon
from tests.support.messages import Messages, execute, settings
from tests.support.until import rows_become
from tests.support.unwrapped import unwrapped

EMIT = "select bridge.emit('a', n::text) from generate_series(%s::int, %s::int) n order by n"


async def ran(dsn: str, messages: Messages, folder: Path, events: int) -> tuple[Daemon, str]:
    """A bridge that has published so many events and is stopped; its settings' path."""
    bridge = Daemon(folder, settings(dsn, messages))
    with bridge:
        bridge.wait_for("bridge.leading")
        await execute(dsn, EMIT, 1, events)
        await messages.take(events)
        assert bridge.stop() == 0
    return bridge, str(bridge.config)


async def test_a_position_moved_back_publishes_again_and_one_moved_forward_skips(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    bridge, config = await ran(bridge_database, messages, tmp_path, 20)
    (place,) = await json_of("cursor", "show", "--config", config)
    assert (place["bridge"], place["sink"], place["mark"], place["backlog"]) == ("test", "events", 20, 0)
    out, _ = await command("cursor", "show", "--config", config)
    assert "20 of 20" in out

    out, _ = await command("cursor", "set", "events", "--to", "15", "--dry-run", "--config", config)
    assert out == "would be moved from 20 to 15: 5 events will be published again\n"
    out, _ = await command("cursor", "set", "events", "--to", "15", "--config", config)
    assert out == "moved from 20 to 15: 5 events will be published again\n"
    with bridge:
        assert [int(message.body) for message in await messages.take(5)] == list(range(16, 21))
        assert bridge.stop() == 0

    await execute(bridge_database, EMIT, 21, 30)
    _, said = await command("cursor", "set", "events", "--to", "now", "--config", config, expect=2)
    assert "10 events would never be published to the sink 'events'; add --skip if that is meant" in said
    out, _ = await command("cursor", "set", "events", "--to", "now", "--skip", "--config", config)
    assert "moved from 20 to 30: 10 events are skipped" in out
    with bridge:
        bridge.wait_for("bridge.leading")
        await execute(bridge_database, EMIT, 31, 32)
        assert [int(message.body) for message in await messages.take(2)] == [31, 32]
        assert bridge.stop() == 0
    out, _ = await command("cursor", "set", "events", "--to", "1h", "--config", config)
    assert "moved from 32 to 0: 32 events will be published again" in out


async def test_a_position_is_not_touched_under_a_running_bridge_nor_under_a_wrong_name(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    bridge, config = await ran(bridge_database, messages, tmp_path, 3)
    with bridge:
        bridge.wait_for("bridge.leading")
        for arguments in (("set", "events", "--to", "0"), ("forget", "events")):
            _, said = await command("cursor", *arguments, "--config", config, expect=2)
            assert "the bridge 'test' is running, and would go on from where it is. Stop every process" in said
        assert bridge.stop() == 0
    _, said = await command("cursor", "forget", "evnts", "--config", config, expect=2)
    assert "the bridge 'test' has no position of the sink 'evnts'; it has 'events'" in said
    _, said = await command("cursor", "set", "events", "--to", "whenever", "--config", config, expect=2)
    assert "is not a time" in said


async def test_the_position_of_a_sink_that_is_gone_is_found_by_check_and_forgotten(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    _, config = await ran(bridge_database, messages, tmp_path, 3)
    await execute(
        bridge_database,
        "insert into bridge.cursor (name, sink, mark, horizon, system_identifier, patterns) "
        "values ('test', 'gone', 1, '3', 1, '{#}')",
    )
    out, _ = await command("check", "--config", config, expect=69)
    assert (
        "there is a position of the sink 'gone', to which no route of the settings leads, with 2 events"
        in unwrapped(out)
    )
    _, said = await command("cursor", "forget", "gone", "--config", config, expect=2)
    assert "2 events were not published to the sink 'gone', and nobody would" in said
    out, _ = await command("cursor", "forget", "gone", "--skip", "--config", config)
    assert out == "forgotten; 2 of its events were not published\n"
    out, _ = await command("check", "--config", config)
    assert "positions          1, of 'test'" in out


async def test_commands_on_an_empty_log_say_so(bridge_database: str, messages: Messages, tmp_path: Path) -> None:
    config = str(Daemon(tmp_path, settings(bridge_database, messages)).config)
    out, _ = await command("check", "--config", config)
    assert "none yet: this bridge has not run on this database" in out
    assert await json_of("cursor", "show", "--config", config) == []
    await command("status", "--config", config, expect=1)
    with Daemon(tmp_path, settings(bridge_database, messages)) as bridge:
        bridge.wait_for("bridge.leading")
        (one,) = (await json_of("status", "--config", config))["bridges"]
        assert one["sinks"][0]["oldest_unsent_seconds"] is None
        assert bridge.stop() == 0


async def test_a_bridge_that_is_forgotten_leaves_no_bell(
    bridge_database: str, messages: Messages, tmp_path: Path
) -> None:
    """A row that says asleep would make every emit() send a NOTIFY that nobody hears."""
    bridge, config = await ran(bridge_database, messages, tmp_path, 3)
    with bridge:
        bridge.wait_for("bridge.leading")
        await rows_become(bridge_database, "select asleep from bridge.bell", [(True,)])
        bridge.kill()
    await command("cursor", "forget", "events", "--config", config)
    assert await execute(bridge_database, "select * from bridge.bell") == []
    assert await execute(bridge_database, "select bridge.somebody_sleeps()") == [(False,)]
