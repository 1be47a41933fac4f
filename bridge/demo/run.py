"""`pgbridge demo`: builds the world, places the orders, shows the flow, and counts what was lost."""

import asyncio
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg
from rich.console import Console

from bridge.demo.brokers import Arrivals
from bridge.demo.figures import FiguresReader
from bridge.demo.orders import Checkout, Kills
from bridge.demo.screen import Screen, State
from bridge.demo.services import Service
from bridge.demo.verdict import Verdict, count
from bridge.demo.world import World
from bridge.errors import UsageError
from bridge.process.tasks import background, one_error

STALL_LIMIT: Final = 90.0
"""Seconds without any progress after which what has not arrived counts as lost. Longer than any redelivery takes."""
QUIET: Final = 1.0
"""Seconds for which everything must have arrived before the demo ends: a plain notification may still follow."""

WORKS_AN_ORDER: Final = 3
"""An invoice, a payment, a webhook."""

_REFRESH: Final = 0.25
_INTERRUPTED: Final = 128 + signal.SIGINT


def run(broker: str, orders: int, rate: float, kill: bool, as_json: bool, folder: Path | None) -> int:
    """Runs the demo and returns the exit code: 0 when nothing was lost, 1 when something was, 130 after Ctrl-C.

    `broker` is ``embedded``, ``rabbitmq`` or ``pubsub``, `rate` in orders a second. With `folder`, which must be new or
    empty, everything is kept in it; otherwise it is a temporary one. With `as_json` standard output gets one line,
    and progress goes to standard error. Raises PgbridgeError, MissingProgramError among them.
    """
    console = Console(stderr=as_json)
    # A terminal's width is for the table; in a pipe nothing is folded.
    if not console.is_terminal:
        console.width = 10_000
    state = State(broker, orders)
    screen = Screen(console, state)
    # Ended by others as by Ctrl-C, so that everything that was started is ended in order. A shell that starts us in the
    # background has SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with _folder(folder) as place:
            world = World(place, broker)
            state.broker = world.broker.title
            screen.say(f"Starting PostgreSQL, {state.broker}, the bridge and its workers in {place} ...")
            with world:
                verdict = asyncio.run(_flow(world, orders, rate, kill, screen, state))
    except KeyboardInterrupt:
        screen.say("Interrupted; everything that was started is stopped.")
        return _INTERRUPTED
    for line in verdict.lines():
        screen.say(line)
    if folder is not None:
        screen.say(f"Kept in {folder}: bridge.toml, invoices/, a log of each process, and the servers' data.")
    if as_json:
        print(json.dumps({**verdict.as_json(), "broker": broker}), flush=True)
    return 0 if verdict.good else 1


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """A folder that others may enter, since as root PostgreSQL runs as another user."""
    if keep is None:
        place = Path(tempfile.mkdtemp(prefix="pgbridge-demo-"))
        place.chmod(0o755)
        try:
            yield place
        finally:
            shutil.rmtree(place)
        return
    if keep.exists() and any(keep.iterdir()):
        raise UsageError(f"--keep {keep}: the folder is not empty; name a new one")
    if not keep.exists():
        keep.mkdir(parents=True)
        keep.chmod(0o755)
    yield keep.resolve()


async def _flow(world: World, orders: int, rate: float, kill: bool, screen: Screen, state: State) -> Verdict:
    arrivals, reader = Arrivals(), FiguresReader(world.dsn())
    checkout = Checkout(world.dsn("shop_checkout"), orders, rate)
    kills = Kills(world, checkout)
    try:
        with one_error():
            async with world.broker.audited(arrivals):
                processes = (world.stripe, world.console, *world.services)
                async with background(*(service.run() for service in processes)):
                    for service in processes:
                        await service.ready()
                    screen.say(f"The console, until the demo ends: {world.console_url}")
                    with screen.shown():
                        state.started = time.monotonic()
                        async with background(_show(screen, state, world, arrivals, reader, kills)):
                            async with asyncio.TaskGroup() as work:
                                work.create_task(checkout.run())
                                if kill:
                                    work.create_task(kills.run())
                            seconds = await _until_quiet(state, reader, arrivals)
                faults = [] if seconds is not None else [f"nothing moved for {STALL_LIMIT:g} s"]
                ended = (world.console, *world.services)
                faults += [fault for service in ended if (fault := await asyncio.to_thread(_stop, service))]
                return await count(
                    reader,
                    arrivals,
                    world.partner.received,
                    await asyncio.to_thread(world.charges),
                    broker=world.broker.title,
                    wanted=orders,
                    refused=_refused(world),
                    seconds=state.seconds if seconds is None else seconds,
                    kills=tuple(kills.happened),
                    faults=tuple(faults),
                )
    finally:
        await reader.close()


async def _show(
    screen: Screen, state: State, world: World, arrivals: Arrivals, reader: FiguresReader, kills: Kills
) -> None:
    try:
        while True:
            state.figures = await reader.read()
            state.messages, state.duplicates = arrivals.messages, arrivals.duplicates
            state.refused = _refused(world)
            state.kills = tuple(kills.happened)
            state.processes = {service.name: (service.running, service.starts) for service in world.services[::-1]}
            crashes = kills.happened.count("database")
            state.processes["database"] = (world.postgres.running, 1 + crashes)
            screen.refresh()
            await asyncio.sleep(_REFRESH)
    finally:
        screen.refresh(last=True)


async def _until_quiet(state: State, reader: FiguresReader, arrivals: Arrivals) -> float | None:
    """Waits until all has arrived: the seconds that took; None when nothing moved for STALL_LIMIT seconds."""
    seen: object = None
    moved_at = time.monotonic()
    while True:
        figures = state.figures
        now = (figures, state.messages, state.refused)
        if now != seen:
            seen, moved_at = now, time.monotonic()
        still = time.monotonic() - moved_at
        worked = figures.invoices + figures.payments + figures.deliveries
        handled = worked + state.refused >= WORKS_AN_ORDER * figures.orders and figures.orders >= state.orders
        if still >= QUIET and handled and await _all_arrived(reader, arrivals, figures.unpublished):
            return moved_at - state.started
        if still >= STALL_LIMIT:
            return None
        await asyncio.sleep(_REFRESH)


async def _all_arrived(reader: FiguresReader, arrivals: Arrivals, unpublished: int) -> bool:
    try:
        return len(await reader.event_ids() - arrivals.counts.keys()) <= unpublished
    except psycopg.OperationalError:
        return False


def _refused(world: World) -> int:
    return sum(worker.text().count('"action": "event.dead_lettered"') for worker in world.workers)


def _stop(service: Service) -> str | None:
    """Ends a service as systemd does; what is wrong with how it ended."""
    code = service.stop()
    return (
        None if code == 0 else f"the process {service.name} ended with code {code} when asked to stop; {service.tail()}"
    )
