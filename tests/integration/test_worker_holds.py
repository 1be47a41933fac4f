"""`on_dead_letter = "hold"`: a dead letter holds its key; on every broker, with real processes and commands."""

import asyncio
import json
import signal
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bridge.brokers.contract import CONFIRMED, Failure, Sink
from bridge.brokers.registry import broker_of
from bridge.commands.dead_letters import Choice, find
from bridge.errors import BrokerUnavailableError, PgbridgeError
from bridge.event import Event
from bridge.settings import PostgresSettings, load
from tests.support.daemons import Daemon, run_command
from tests.support.events import make_event
from tests.support.messages import execute
from tests.support.proxy import Proxy
from tests.support.scripted_queue import ScriptedQueue
from tests.support.servers import RabbitMQServer
from tests.support.shop import Replies
from tests.support.until import until
from tests.support.working import echo, figure, working
from workers.claim import Claim
from workers.handler import Reject, Result
from workers.inbox import Inbox

SETTINGS = """
name = "shop"
[postgres]
dsn = {dsn}
{sink}
[workers.{name}]
handler = "tests.support.worker_handlers:book"
subscribe = ["shop.order.placed"]
ordered = true
on_dead_letter = "hold"
reply = "shop.rendered"
{more}
[workers.{name}.options]
refused = {refused}
[observe]
log_format = "json"
"""


class Ledger:
    """A worker that books what comes, its broker, and an operator's commands for it."""

    def __init__(
        self, name: str, sink: Sink, replies: Replies, folder: Path, worker_settings: str, operator_settings: str
    ) -> None:
        self.name = name
        self.ids: dict[str, str] = {}
        """Of what was published, by its payload."""
        self._sink = sink
        self._replies = replies
        self._folder = folder
        self.text = worker_settings
        """The settings of processes."""
        self.operator = Daemon(folder / "operator", operator_settings).config
        """The settings file of the operator."""
        self._settings = load(self.operator, environ={})
        self.processes: list[Daemon] = []

    async def start(self) -> Daemon:
        process = Daemon(
            self._folder / f"process-{len(self.processes)}", self.text, "run", self.name, module="workers.cli"
        )
        self.processes.append(process)
        process.start()
        await asyncio.to_thread(process.wait_for, "worker.started")
        return process

    async def publish(self, *names: str) -> None:
        """Events with these payloads; the first character is the key."""
        events = [make_event(topic="shop.order.placed", key=name[0], payload=name) for name in names]
        self.ids |= {name: event.id for name, event in zip(names, events, strict=True)}
        assert list(await self._sink.publish(events)) == [CONFIRMED] * len(events)

    def refuse(self, *names: str) -> None:
        whole = self._folder / "new.json"
        whole.write_text(json.dumps(names))
        whole.replace(self._folder / "refused.json")

    async def command(self, *arguments: str, module: str = "bridge.cli", expect: int = 0) -> tuple[str, str]:
        done = await asyncio.to_thread(
            run_command, *arguments, "--config", str(self.operator), module=module, timeout=120.0
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout, done.stderr

    async def held(self) -> list[dict[str, Any]]:
        out, _ = await self.command("held", self.name, "--json", module="workers.cli")
        found: list[dict[str, Any]] = json.loads(out)
        return found

    async def release(self, *arguments: str, expect: int = 0) -> str:
        _, said = await self.command("release", self.name, *arguments, module="workers.cli", expect=expect)
        return said

    async def letters(self, *names: str) -> list[str]:
        """The codes of these dead letters, once there are no others."""
        codes: dict[str | None, str] = {}

        async def are_there() -> bool:
            codes.clear()
            found = await find(self._settings, Choice(workers=(self.name,)), fail)
            codes.update({letter.event_id: letter.code for letter in found})
            return sorted(map(str, codes)) == sorted(self.ids[name] for name in names)

        await until(are_there, f"the dead letters are {names}", limit=60)
        return [codes[self.ids[name]] for name in names]

    async def replay(self, *names: str) -> None:
        """Those that are named, or all."""
        chosen = [f"{self.name}:{self.ids[name]}" for name in names] or ["--worker", self.name]
        await self.command("dead", "replay", *chosen)

    async def booked(self, *names: str) -> None:
        """Waits for the replies to these, which are all that there are; each key's in this order."""

        async def are_there() -> bool:
            return len(await asyncio.to_thread(self._replies)) >= len(names)

        await until(are_there, f"there are replies to {names}", limit=60)
        assert by_key(await asyncio.to_thread(self._replies)) == by_key(list(names))


def fail(box: str, error: PgbridgeError) -> None:
    raise error


def by_key(names: list[str]) -> dict[str, list[str]]:
    return {key: [name for name in names if name[0] == key] for key in sorted({name[0] for name in names})}


@pytest.fixture
async def ledger(
    shop: PostgresSettings,
    bridge_database: str,
    place: tuple[str, str],
    unique: str,
    replies: Replies,
    tmp_path: Path,
) -> AsyncIterator[Ledger]:
    sink_table, more = place
    refused = json.dumps(str(tmp_path / "refused.json"))

    def text(dsn: str) -> str:
        return SETTINGS.format(dsn=json.dumps(dsn), sink=sink_table, name=unique, more=more, refused=refused)

    own, operators = text(shop.dsn.get_secret_value()), text(bridge_database)
    config = Daemon(tmp_path / "topology", own).config
    done = await asyncio.to_thread(run_command, "topology", "--apply", "--config", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    settings = load(config, environ={}).sinks["e"]
    sink = broker_of(settings).sink(settings)
    await sink.open()
    ledger = Ledger(unique, sink, replies, tmp_path, own, operators)
    ledger.refuse()
    try:
        yield ledger
    finally:
        for process in ledger.processes:
            await asyncio.to_thread(process.stop)
        await sink.close()


async def test_what_is_behind_a_dead_letter_of_its_key_waits_for_its_replay(
    ledger: Ledger, bridge_database: str
) -> None:
    ledger.refuse("a2")
    first, _ = await ledger.start(), await ledger.start()
    await ledger.publish("a1", "b1", "a2", "a3", "b2", "a4", "b3", "a5", "b4", "b5")
    others = ["b1", "b2", "b3", "b4", "b5"]
    await ledger.booked("a1", *others)
    assert await ledger.letters("a2", "a3", "a4", "a5") == ["rejected", "held", "held", "held"]
    [key] = await ledger.held()
    assert (key["key"], key["first_event"], key["events"]) == ("a", ledger.ids["a2"], 4)

    # A replay that is not the first goes aside again; while the cause is not mended, so do they all.
    await ledger.replay("a4")
    assert await ledger.letters("a2", "a3", "a4", "a5") == ["rejected", "held", "held", "held"]
    await ledger.replay()
    assert await ledger.letters("a2", "a3", "a4", "a5") == ["rejected", "held", "held", "held"]

    ledger.refuse()
    await ledger.replay("a2")
    await ledger.booked("a1", "a2", *others)
    # Another process goes on where one has left.
    first.signal(signal.SIGTERM)
    await asyncio.to_thread(first.wait)
    await ledger.publish("a6")
    assert await ledger.letters("a3", "a4", "a5", "a6") == ["held"] * 4
    await ledger.replay("a4", "a3")
    await ledger.booked("a1", "a2", "a3", "a4", *others)
    await ledger.replay()
    await ledger.booked("a1", "a2", "a3", "a4", "a5", "a6", *others)
    assert await ledger.held() == []
    await ledger.publish("a7")
    await ledger.booked("a1", "a2", "a3", "a4", "a5", "a6", "a7", *others)
    await ledger.letters()
    assert await execute(bridge_database, "select count(*) from bridge.held") == [(0,)]


async def test_many_letters_of_many_keys_are_replayed_in_the_order_of_each(ledger: Ledger) -> None:
    """More than a broker gives at a time, and after a look, which may change how they lie there."""
    names = [f"{key}{n}" for n in range(1, 31) for key in "abcdefgh"]
    ledger.refuse(*(f"{key}1" for key in "abcdefgh"))
    await ledger.start()
    await ledger.publish(*names)

    await asyncio.to_thread(ledger.processes[0].wait_for, "event.dead_lettered", 60.0, count=len(names))
    assert [key["events"] for key in await ledger.held()] == [30] * 8
    await ledger.letters(*names)
    ledger.refuse()
    await ledger.replay()
    await ledger.booked(*names)
    assert await ledger.held() == []


async def test_after_a_death_between_failure_and_letter_nothing_passes(ledger: Ledger, shop: PostgresSettings) -> None:
    await ledger.publish("a1", "a2", "b1")
    dying = Inbox(ledger.name, shop, concurrency=1, holds=True)
    await dying.open()
    claim = await dying.claim(ledger.ids["a1"], None, "a")
    assert isinstance(claim, Claim)
    await dying.fail(claim, Failure("rejected", "no"))
    await dying.close()
    await ledger.start()
    await ledger.booked("b1")
    assert await ledger.letters("a1", "a2") == ["rejected", "held"]


@pytest.mark.parametrize("place", ["rabbitmq"], indirect=True)
async def test_a_process_that_is_killed_before_the_broker_has_its_letter_lets_nothing_pass(
    ledger: Ledger, rabbitmq: RabbitMQServer, bridge_database: str
) -> None:
    ledger.refuse("a1")
    async with Proxy(rabbitmq.host, rabbitmq.port) as proxy:
        direct = ledger.text
        ledger.text = direct.replace(f":{rabbitmq.port}", f":{proxy.port}")
        assert ledger.text != direct
        process = await ledger.start()
        ledger.text = direct
        # What comes to the process passes, and nothing that it says.
        proxy.delay_to_server = 300
        await ledger.publish("a1", "a2", "b1")

        async def is_stored() -> bool:
            return await execute(bridge_database, "select key from bridge.held") == [("a",)]

        await until(is_stored, "the failure is stored")
        await asyncio.to_thread(process.kill)
        proxy.cut()
    await ledger.letters()
    await ledger.start()
    await ledger.booked("b1")
    assert await ledger.letters("a1", "a2") == ["rejected", "held"]


@pytest.mark.parametrize("place", ["rabbitmq"], indirect=True)
async def test_keys_and_single_events_are_released(ledger: Ledger, bridge_database: str) -> None:
    ledger.refuse("a1", "b1")
    await ledger.start()
    await ledger.publish("a1", "a2", "a3")
    await asyncio.to_thread(ledger.processes[0].wait_for, "event.dead_lettered", count=3)
    await ledger.publish("b1", "b2")
    await asyncio.to_thread(ledger.processes[0].wait_for, "event.dead_lettered", count=5)
    assert [key["events"] for key in await ledger.held()] == [3, 2]
    out, _ = await ledger.command("held", ledger.name, module="workers.cli")
    assert [line.split()[-1] for line in out.splitlines()] == ["key", "a", "b"]
    assert ledger.ids["a1"] in out

    assert f"the event {ledger.ids['b1']} does not hold the key 'a'" in await ledger.release(
        "a", "--event", ledger.ids["b1"], expect=2
    )
    discarded = f"{ledger.name}:{ledger.ids['a1']}"
    await ledger.command("dead", "discard", discarded, "--why", "no such account")
    assert "1 released." in await ledger.release("a", "--event", ledger.ids["a1"])
    await ledger.replay("a2", "a3")
    await ledger.booked("a2", "a3")

    assert "2 released." in await ledger.release("b")
    assert await ledger.held() == []
    assert "the key 'b' is not held; `pgbridge-worker held" in await ledger.release("b", expect=2)
    await ledger.publish("b3")
    await ledger.booked("a2", "a3", "b3")
    ledger.refuse()
    await ledger.replay()
    await ledger.booked("a2", "a3", "b3", "b1", "b2")
    out, _ = await ledger.command("held", ledger.name, module="workers.cli")
    assert out == "No key is held.\n"
    audits = await execute(
        bridge_database, "select letter from bridge.dead_letter_audit where action = 'released' order by id"
    )
    assert audits == [(f"{ledger.name}:{ledger.ids[name]}",) for name in ("a1", "b1", "b2")]


@pytest.mark.parametrize("place", ["rabbitmq"], indirect=True)
async def test_commands_say_what_is_wrong(ledger: Ledger) -> None:
    for command in (["held", "nobody"], ["release", "nobody", "a"]):
        _, said = await ledger.command(*command, module="workers.cli", expect=2)
        assert f"there is no worker 'nobody' in the settings; known: {ledger.name}" in said
    _, said = await ledger.command("release", ledger.name, "a", "--event", "a1", module="workers.cli", expect=2)
    assert "'a1' is not a valid UUID" in said
    text = ledger.operator.read_text().replace('on_dead_letter = "hold"', "")
    ledger.operator.write_text(text)
    for command in (["held", ledger.name], ["release", ledger.name, "a"]):
        _, said = await ledger.command(*command, module="workers.cli", expect=2)
        assert f'holds no keys: workers.{ledger.name}.on_dead_letter is "pass"' in said


async def test_a_letter_that_the_broker_has_not_taken_yet_holds_its_key(shop: PostgresSettings) -> None:
    async def reject(event: Event) -> Result:
        if event.json() == "a1":
            raise Reject("no")
        return {"of": event.json()}

    queue = ScriptedQueue(redelivers=True, failures={"dead_letter": [BrokerUnavailableError("gone")]})
    async with working(reject, shop, queue, ordered=True, on_dead_letter="hold") as queue:
        first = make_event(payload="a1", key="a")
        queue.add(first)
        await until(lambda: queue.opened == 2, "the connection is a new one")
        queue.add(make_event(payload="a2", key="a"))
        queue.add(make_event(payload="b1", key="b"))
        found = await queue.outcomes(3)
    became = {
        delivery.event.json(): detail.code if isinstance(detail, Failure) else verb
        for delivery, verb, detail in queue.settled
        if isinstance(delivery.event, Event)
    }
    assert became == {"a1": "rejected", "a2": "held", "b1": "ack"}
    assert len(found) == 3


async def test_held_keys_are_counted_for_whoever_looks_and_are_no_fault(shop: PostgresSettings) -> None:
    other = Inbox("invoices", shop, concurrency=1, holds=True)
    await other.open()
    try:
        for key in ("a", "b"):
            claim = await other.claim(str(uuid.uuid4()), None, key)
            assert isinstance(claim, Claim)
            await other.fail(claim, Failure("rejected", "no"))
        async with working(echo, shop, ordered=True, on_dead_letter="hold", listen="127.0.0.1:1"):
            await until(lambda: figure("held_keys", "invoices") == 2, "they are counted")
    finally:
        await other.close()


@pytest.mark.parametrize("place", ["rabbitmq"], indirect=True)
async def test_what_a_worker_left_held_is_listed_and_released_after_it_has_ceased_to_hold(ledger: Ledger) -> None:
    ledger.refuse("a1")
    await ledger.start()
    await ledger.publish("a1", "a2")
    await asyncio.to_thread(ledger.processes[0].wait_for, "event.dead_lettered", count=2)
    ledger.operator.write_text(ledger.operator.read_text().replace('on_dead_letter = "hold"', ""))
    assert [(key["key"], key["events"]) for key in await ledger.held()] == [("a", 2)]
    assert "2 released." in await ledger.release("a")
    assert "holds no keys" in await ledger.release("a", expect=2)
