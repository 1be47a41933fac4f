"""Plays faults in a random order, each followed by a probe that says when events arrive again.

First those that are only slowness, by themselves: then nothing ever goes wrong that would be a reason to publish an
event twice, and what comes twice all the same is counted apart.
"""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from tests.faults.brokers import Broker
from tests.faults.kinds import KINDS, Kind
from tests.faults.load import PROBED, probe
from tests.faults.outcomes import WORKERS, Task, ended, outcomes, tasks
from tests.faults.report import Report, Row
from tests.faults.world import World, running
from tests.support.servers import PostgresServer

_OVERLAP = 0.3
"""How often the next fault does not wait until the last one is recovered from."""
_RECOVERY_LIMIT = 120.0


def deck(faults: int, seed: int, broker: str = "rabbitmq", only: str = "") -> list[Kind]:
    """So many faults, of each kind as its weight says (at least one, as far as they go), shuffled.

    `only`: of those kinds whose name has this in it.
    """
    kinds = [kind for kind in KINDS if broker in kind.brokers and only in kind.name]
    total = sum(kind.weight for kind in kinds)
    cards = [kind for kind in kinds for _ in range(max(1, round(kind.weight * faults / total)))]
    shuffler = random.Random(seed)
    shuffler.shuffle(cards)
    while len(cards) < faults:
        cards.append(shuffler.choice(kinds))
    if len(cards) > faults:
        # Of what is there more than once, so that no kind is left out.
        for card in [card for card in cards if Counter(cards)[card] > 1]:
            if len(cards) == faults or Counter(cards)[card] == 1:
                continue
            cards.remove(card)
    return cards[:faults]


@dataclass
class _Game:
    """A run in progress."""

    world: World
    ends: float
    say: bool
    recoveries: dict[str, list[float]] = field(default_factory=lambda: {kind.name: [] for kind in KINDS})
    played: int = 0
    held_up: list[str] = field(default_factory=list)
    """Faults that stopped events whose way they were not on."""


async def play(
    postgres: PostgresServer,
    broker: Broker,
    folder: Path,
    cards: Sequence[Kind],
    seed: int,
    seconds: float | None = None,
    say: bool = False,
) -> Report:
    """All of it; `seconds` ends the faults early. The servers run already, and still run afterwards."""
    began = time.monotonic()
    async with running(postgres, broker, folder, seed) as (world, end_load):
        game = _Game(world, began + (seconds or float("inf")), say)
        first = await probe(world.dsn, world.ledger, "probe")
        for audit in world.audits:
            if audit.takes(PROBED):
                assert not await audit.seen({first}, 60), "no event arrived before the first fault"
        arrived, repeats = _arrivals(world)
        await _play(game, [card for card in cards if card.is_slowness])
        await _arrived(world)
        slow_arrived, slow_repeats = _arrivals(world)
        await _play(game, [card for card in cards if not card.is_slowness])
        end_load()
        await _settled(world)
        not_well = await world.watch.wrong(_RECOVERY_LIMIT + 30.0)
        await world.stop_workers()
        report = await asyncio.to_thread(_count, game)
        report.workers = await asyncio.to_thread(outcomes, world.dsn, world.ledger, await world.letters(), world.notes)
        report.workers.left += not_well + await broker.left(stopped=True)
    report.broker, report.seed, report.seconds = broker.name, seed, round(time.monotonic() - began, 1)
    report.events_under_slowness, report.repeats_under_slowness = slow_arrived - arrived, slow_repeats - repeats
    report.wrong_ends = world.wrong_ends
    report.health, report.failing_during = dict(world.watch.seen), dict(world.watch.failing_during)
    report.health_must_fail = any(kind.shows and game.recoveries[kind.name] for kind in cards)
    return report


def _arrivals(world: World) -> tuple[int, int]:
    """Events that have arrived, once for each queue, and repeats among them."""
    return (
        sum(len(audit.first_at) for audit in world.audits),
        sum(audit.repeats.total() for audit in world.audits),
    )


async def _play(game: _Game, cards: Sequence[Kind]) -> None:
    world = game.world
    going: set[asyncio.Task[None]] = set()
    try:
        for kind in cards:
            if time.monotonic() > game.ends:
                break
            await asyncio.sleep(world.random.uniform(0, 1.0))
            while kind.target in world.busy:
                await asyncio.sleep(0.05)
            world.busy.add(kind.target)
            game.played += 1
            going.add(asyncio.create_task(_inflict(game, kind, game.played, alone=not going)))
            if kind.is_aside or world.random.random() >= _OVERLAP:
                await asyncio.wait(going)
            for ended in [task for task in going if task.done()]:
                going.discard(ended)
                ended.result()
        await asyncio.gather(*going)
    finally:
        for task in going:
            task.cancel()
        await asyncio.gather(*going, return_exceptions=True)


async def _inflict(game: _Game, kind: Kind, number: int, *, alone: bool) -> None:
    world = game.world
    if kind.is_aside:
        # The bridge may still come back from the fault before: what that one's probe showed may have been on the way
        # just before it struck.
        await _recovered(world, kind, f"probe-before-{number}")
    began = time.monotonic()
    world.watch.faults.add(kind.name)
    probing = asyncio.create_task(_recovered(world, kind, f"probe-{number}"))
    try:
        await kind.do(world)
    except BaseException:
        probing.cancel()
        raise
    finally:
        world.busy.discard(kind.target)
        world.watch.faults.discard(kind.name)
    if kind.is_aside and alone and not probing.done():
        game.held_up.append(f"{number} {kind.name}")
    arrived_at = await probing
    took = (arrived_at if kind.is_aside else time.monotonic()) - began
    game.recoveries[kind.name].append(took)
    if game.say:
        print(f"{number:4}  {kind.name:<34} {took:6.2f} s   {len(world.ledger.committed)} committed", flush=True)


async def _recovered(world: World, kind: Kind, key: str) -> float:
    """When an event that was committed after the fault has arrived; for a worker, when its reply has run."""
    await asyncio.sleep(0.05)
    event_id = await probe(world.dsn, world.ledger, key)
    missing = await world.audits[0].seen({event_id}, _RECOVERY_LIMIT)
    assert not missing, f"after {kind.name}, no event arrived within {_RECOVERY_LIMIT:g} s; {world.wrong_ends}"
    if kind.target.startswith("worker"):
        await _ended(world, {(worker, event_id) for worker in WORKERS}, _RECOVERY_LIMIT)
    return time.monotonic()


async def _ended(world: World, wanted: Set[Task], limit: float) -> None:
    """Waits until the workers are done with these, or with none of them for `limit` seconds: on Pub/Sub an event that
    fails holds up those of its key for seconds. What is missing afterwards is counted, not raised."""
    left = len(wanted) + 1
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        # Another fault may have taken the database away: then ask again.
        with contextlib.suppress(psycopg.OperationalError):
            before, left = left, len(wanted - await asyncio.to_thread(ended, world.dsn))
            if not left:
                return
            if left < before:
                deadline = time.monotonic() + limit
        await asyncio.sleep(0.3)


async def _arrived(world: World) -> None:
    """Waits for all that is committed by now; what is missing afterwards is counted, not raised."""
    async with asyncio.TaskGroup() as tasks:
        for audit in world.audits:
            tasks.create_task(audit.seen(world.ledger.ids(audit.takes), _RECOVERY_LIMIT))


async def _settled(world: World) -> None:
    await asyncio.sleep(1.6)  # the longest that a writer holds a transaction open
    await _arrived(world)
    await _ended(world, tasks(world.ledger).keys(), _RECOVERY_LIMIT)
    # What a process had in hand when it was killed, and had ended, comes again to be settled.
    await asyncio.sleep(world.broker.redelivery)
    deadline = time.monotonic() + _RECOVERY_LIMIT
    while await world.broker.left(stopped=False) and time.monotonic() < deadline:
        await asyncio.sleep(1.0)


def _count(game: _Game) -> Report:
    world, ledger = game.world, game.world.ledger
    letters = world.dead_letters()
    deadline = time.monotonic() + _RECOVERY_LIMIT / 4
    # A poisoned row may be the last of all, and no queue shows when it has become a dead letter.
    while (lost := _lost(world, letters)) and time.monotonic() < deadline:
        time.sleep(0.2)
        letters = world.dead_letters()
    poisoned = ledger.ids(lambda _: True, poison=True) - ledger.ids(lambda _: True)
    return Report(
        faults=sum(len(times) for times in game.recoveries.values()),
        committed=len(ledger.committed),
        rolled_back=ledger.rolled_back,
        commits_looked_up=ledger.unknown,
        lost=lost,
        unknown_to_writers=sum(len(audit.first_at.keys() - ledger.committed.keys()) for audit in world.audits),
        poisoned=len(poisoned),
        dead_letters=len(letters),
        wrong_dead_letters=sorted(event_id for event_id, _ in letters if event_id not in poisoned),
        duplicates=sum(audit.repeats.total() for audit in world.audits),
        out_of_order=[f"{audit.queue}: {words}" for audit in world.audits for words in audit.out_of_order],
        held_up=game.held_up,
        rows=[Row.of(name, times) for name, times in game.recoveries.items() if times],
    )


def _lost(world: World, letters: set[tuple[str, str]]) -> list[str]:
    """What is in no queue that it belongs into, and no dead letter where it may be one."""
    found = []
    for audit in world.audits:
        good = world.ledger.ids(audit.takes)
        for event_id in world.ledger.ids(audit.takes, poison=True) - audit.first_at.keys():
            if event_id in good or (event_id, audit.sink) not in letters:
                event = world.ledger.committed[event_id]
                found.append(f"{audit.queue}: {event_id} ({event.topic} {event.key[:40]} {event.number})")
    return sorted(found)
