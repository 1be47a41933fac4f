"""Plays faults in a random order, each followed by a probe that tells when events arrive again."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psycopg

from tests.faults.kinds import KINDS, Kind
from tests.faults.load import probe
from tests.faults.report import Report, Row
from tests.faults.world import World, running
from tests.support.servers import PostgresServer, RabbitMQServer

_OVERLAP = 0.3
"""How often the next fault does not wait until the last one is recovered from."""
_RECOVERY_LIMIT = 120.0


def deck(faults: int, seed: int) -> list[Kind]:
    """So many faults, of each kind as its weight says (at least one, as far as they go), shuffled."""
    cards = [kind for kind in KINDS for _ in range(max(1, round(kind.weight * faults / 100)))]
    shuffler = random.Random(seed)
    shuffler.shuffle(cards)
    while len(cards) < faults:
        cards.append(shuffler.choice(KINDS))
    if len(cards) > faults:
        # Of what is there more than once, so that no kind is left out.
        for card in [card for card in cards if Counter(cards)[card] > 1]:
            if len(cards) == faults or Counter(cards)[card] == 1:
                continue
            cards.remove(card)
    return cards[:faults]


async def play(
    postgres: PostgresServer,
    rabbitmq: RabbitMQServer,
    folder: Path,
    cards: Sequence[Kind],
    seed: int,
    seconds: float | None = None,
    say: bool = False,
) -> Report:
    """All of it; `seconds` ends the faults early. The servers run already, and still run afterwards."""
    recoveries: dict[str, list[float]] = {kind.name: [] for kind in KINDS}
    began = time.monotonic()
    async with running(postgres, rabbitmq, folder, seed) as (world, end_load):
        first = await probe(world.dsn, world.ledger, 0)
        assert not await world.audit.seen({first}, 60), "no event arrived before the first fault"
        going: set[asyncio.Task[None]] = set()
        for number, kind in enumerate(cards, 1):
            if seconds is not None and time.monotonic() - began > seconds:
                break
            await asyncio.sleep(world.random.uniform(0, 1.0))
            while kind.target in world.busy:
                await asyncio.sleep(0.05)
            world.busy.add(kind.target)
            task = asyncio.create_task(_inflict(world, kind, number, recoveries, say))
            going.add(task)
            if world.random.random() >= _OVERLAP:
                await asyncio.wait(going)
            for ended in [task for task in going if task.done()]:
                going.discard(ended)
                ended.result()
        await asyncio.gather(*going)
        end_load()
        await _settled(world)
        report = await asyncio.to_thread(_count, world, recoveries)
    report.seed, report.seconds = seed, round(time.monotonic() - began, 1)
    return report


async def _inflict(world: World, kind: Kind, number: int, recoveries: dict[str, list[float]], say: bool) -> None:
    began = time.monotonic()
    probing = asyncio.create_task(_recovered(world, kind, number))
    try:
        await kind.do(world)
    finally:
        world.busy.discard(kind.target)
    await probing
    took = time.monotonic() - began
    recoveries[kind.name].append(took)
    if say:
        print(f"{number:4}  {kind.name:<34} {took:6.2f} s   {len(world.ledger.committed)} committed", flush=True)


async def _recovered(world: World, kind: Kind, number: int) -> None:
    """Until an event that was committed after the fault arrives; for a worker, until its reply has run."""
    await asyncio.sleep(0.05)
    event_id = await probe(world.dsn, world.ledger, number)
    missing = await world.audit.seen({event_id}, _RECOVERY_LIMIT)
    assert not missing, f"after {kind.name}, no event arrived within {_RECOVERY_LIMIT:g} s"
    if kind.target == "worker":
        await _replied(world, {event_id}, _RECOVERY_LIMIT)


async def _replied(world: World, event_ids: set[str], limit: float) -> None:
    """Waits for replies; what is missing afterwards is counted, not raised."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        # Another fault may have taken the database away: then ask again.
        with contextlib.suppress(psycopg.OperationalError):
            if event_ids <= set(await asyncio.to_thread(world.replies)):
                return
        await asyncio.sleep(0.2)


async def _settled(world: World) -> None:
    await asyncio.sleep(1.6)  # the longest that a writer holds a transaction open
    events = set(world.ledger.committed)
    await world.audit.seen(events, _RECOVERY_LIMIT)
    await _replied(world, events, _RECOVERY_LIMIT)


def _count(world: World, recoveries: dict[str, list[float]]) -> Report:
    events = set(world.ledger.committed)
    replies = Counter(world.replies())
    return Report(
        faults=sum(len(times) for times in recoveries.values()),
        committed=len(events),
        rolled_back=world.ledger.rolled_back,
        commits_looked_up=world.ledger.unknown,
        lost=len(events - world.audit.first_at.keys()),
        unknown_to_writers=len(world.audit.first_at.keys() - events),
        dead_letters=world.dead_letters(),
        duplicates=sum(world.audit.duplicates.values()),
        replies=sum(replies.values()),
        events_without_one_reply=sum(replies[event] != 1 for event in events),
        order_violations=world.audit.order_violations,
        rows=[Row.of(name, times) for name, times in recoveries.items() if times],
    )
