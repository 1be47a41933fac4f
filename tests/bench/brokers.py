"""The outbox to NATS JetStream and to Pub/Sub's emulator, beside the clients' own best batch rates."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import nats
from nats.js.errors import NotFoundError

from tests.bench.bridge import (
    Drained,
    Measured,
    alone,
    beside_other,
    drain,
    processor_times,
    rate,
    settings_of,
    versions,
)
from tests.bench.peers import run
from tests.bench.registry import theme
from tests.bench.results import Row, at_least, at_most
from tests.bench.rounds import take_turns
from tests.bench.world import Log, World
from tests.support.daemons import run_command

STREAM = "events"
PROJECT = "bench-project"
ASYNC = "nats-py publish_async"
CLIENT = "google-cloud-pubsub"


def declare(world: World, dsn: str, sink: Mapping[str, str | int], *, more: str = "") -> None:
    """`pgbridge topology --apply` for a sink and what `more` adds to the settings. Raises RuntimeError."""
    config = world.folder / f"{world.unique('topology')}.toml"
    config.write_text(settings_of("bench", dsn, sink) + more)
    done = run_command("topology", "--apply", "--config", str(config))
    if done.returncode != 0:
        raise RuntimeError(f"pgbridge topology --apply ended with {done.returncode}: {done.stderr[-1500:]}")


@theme("nats")
def to_nats(world: World) -> Sequence[Row]:
    """The stream is a new one for each contender, since one that remembers ids drops what it has had."""
    events = 20_000 if world.quick else 200_000
    logs = {python: world.log(events, python=python) for python in world.pythons}
    log = logs[None]
    sink = {"type": "nats", "url": world.nats.url, "stream": STREAM}

    def stream() -> None:
        asyncio.run(_delete_stream(world.nats.url))
        declare(world, log.dsn, sink)

    def ours(python: Path | None) -> Drained:
        stream()
        drained = drain(world, logs[python], sink, python=python)
        _expect(log, asyncio.run(_stream_messages(world.nats.url)))
        return drained

    def peer() -> float:
        stream()
        reached = run.own("nats_async", world.nats.url, STREAM, log.dsn, str(log.events))
        _expect(log, asyncio.run(_stream_messages(world.nats.url)))
        return reached

    contenders: dict[str, Callable[[], Measured]] = {**versions(world, ours), ASYNC: peer}
    found = take_turns(world.rounds, contenders, rate)
    rates, times = found.each(rate), processor_times(found)
    return [
        *beside_other(rates, "nats: the other version", "events/s"),
        rates.row("nats: the client's best", "events/s", ASYNC, at_least(1.1)),
        alone(times, "nats: processor time", "us/event"),
    ]


@theme("pubsub")
def to_pubsub(world: World) -> Sequence[Row]:
    """With 500 ordering keys, and without any; every contender publishes to a new topic."""
    count, some = (20_000, 2_000) if world.quick else (200_000, 10_000)
    log = world.log(count, keys=500)
    address = world.pubsub.address

    def ours(ordering: bool) -> Drained:
        topic = world.unique("bench-topic")
        sink: dict[str, str | int] = {"type": "pubsub", "project": PROJECT, "topic": topic, "emulator_host": address}
        sink["ordering"] = ordering
        declare(world, log.dsn, sink)
        return drain(world, log, sink)

    def peer(events: int, way: str) -> float:
        topic = world.unique("bench-topic")
        words = (address, PROJECT, topic, log.dsn, str(events), way)
        return run.own("pubsub_client", *words, environment={"PUBSUB_EMULATOR_HOST": address})

    keys, plain, no_keys = f"{CLIENT}, 500 keys", f"{CLIENT}, no keys", "ours, no keys"
    contenders: dict[str, Callable[[], Measured]] = {
        "ours": lambda: ours(ordering=True),
        no_keys: lambda: ours(ordering=False),
        keys: lambda: peer(some, "keys"),
        plain: lambda: peer(log.events, "plain"),
    }
    found = take_turns(world.rounds, contenders, rate)
    rates, times = found.each(rate), processor_times(found)
    return [
        rates.row("pubsub: the client, 500 keys", "events/s", keys, at_least(5.0)),
        rates.row("pubsub: the client, no keys", "events/s", plain, at_least(1.0), ours=no_keys),
        times.row("pubsub: processor time, no keys", "us/event", target=at_most(6), ours=no_keys),
        times.row("pubsub: processor time, 500 keys", "us/event"),
    ]


def _expect(log: Log, messages: int) -> None:
    if messages != log.events:
        raise RuntimeError(f"the stream holds {messages} messages instead of {log.events}")


async def _delete_stream(url: str) -> None:
    connection = await nats.connect(url)
    try:
        await connection.jetstream().delete_stream(STREAM)
    except NotFoundError:
        pass
    finally:
        await connection.close()


async def _stream_messages(url: str) -> int:
    connection = await nats.connect(url)
    try:
        return int((await connection.jetstream().stream_info(STREAM)).state.messages)
    finally:
        await connection.close()
