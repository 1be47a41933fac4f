"""The outbox to NATS JetStream and to Pub/Sub's emulator, beside the clients' own best batch rates."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import nats
from nats.js.errors import NotFoundError

from tests.bench.bridge import OTHER, drain, settings_of
from tests.bench.peers import run
from tests.bench.registry import theme
from tests.bench.results import Row, at_least
from tests.bench.rounds import Measure, interleave
from tests.bench.world import Log, World
from tests.support.daemons import run_command

STREAM = "events"
PROJECT = "bench-project"
ASYNC = "nats-py publish_async"
RAW, CLIENT = "grpc.aio, raw protobuf", "google-cloud-pubsub"


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
    log = world.log(20_000 if world.quick else 200_000)
    sink = {"type": "nats", "url": world.nats.url, "stream": STREAM}

    def stream() -> None:
        asyncio.run(_delete_stream(world.nats.url))
        declare(world, log.dsn, sink)

    def ours(python: Path | None = None) -> float:
        stream()
        rate = drain(world, world.log(log.events, python=python), sink, python=python).rate
        _expect(log, asyncio.run(_stream_messages(world.nats.url)))
        return rate

    def peer() -> float:
        stream()
        rate = run.own("nats_async", world.nats.url, STREAM, log.dsn, str(log.events))
        _expect(log, asyncio.run(_stream_messages(world.nats.url)))
        return rate

    contenders: dict[str, Measure] = {"ours": ours, ASYNC: peer}
    if world.beside is not None:
        contenders[OTHER] = lambda: ours(world.beside)
    found = interleave(world.rounds, contenders)
    other = [] if world.beside is None else [found.row("nats: the other version", "events/s", OTHER)]
    return [*other, found.row("nats: the client's best", "events/s", ASYNC, at_least(0.8))]


@theme("pubsub")
def to_pubsub(world: World) -> Sequence[Row]:
    """With 500 ordering keys, and without any; every contender publishes to a new topic."""
    count, some = (5_000, 2_000) if world.quick else (200_000, 10_000)
    log = world.log(count, keys=500)
    address = world.pubsub.address

    def ours(ordering: bool) -> float:
        topic = world.unique("bench-topic")
        sink: dict[str, str | int] = {"type": "pubsub", "project": PROJECT, "topic": topic, "emulator_host": address}
        sink["ordering"] = ordering
        declare(world, log.dsn, sink)
        return drain(world, log, sink).rate

    def peer(module: str, events: int, *way: str) -> float:
        topic = world.unique("bench-topic")
        return run.own(
            module, address, PROJECT, topic, log.dsn, str(events), *way, environment={"PUBSUB_EMULATOR_HOST": address}
        )

    found = interleave(
        world.rounds,
        {
            "ours": lambda: ours(ordering=True),
            "ours, no keys": lambda: ours(ordering=False),
            RAW: lambda: peer("pubsub_raw", log.events),
            f"{CLIENT}, 500 keys": lambda: peer("pubsub_client", some, "keys"),
            f"{CLIENT}, no keys": lambda: peer("pubsub_client", log.events, "plain"),
        },
    )
    return [
        found.row("pubsub: raw gRPC's best", "events/s", RAW, at_least(0.5), ours="ours, no keys"),
        found.row("pubsub: the client, 500 keys", "events/s", f"{CLIENT}, 500 keys", at_least(5.0)),
        found.row("pubsub: the client, no keys", "events/s", f"{CLIENT}, no keys", at_least(1.0), ours="ours, no keys"),
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
