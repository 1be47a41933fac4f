"""What endpoints that hang and fail cost the others: the time in which these get theirs, and the sender's memory."""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psycopg

from tests.bench.receiver import receiving
from tests.bench.registry import theme
from tests.bench.results import Row, at_least, within
from tests.bench.rounds import take_turns
from tests.bench.world import World
from tests.support.daemons import Daemon

ALONE, BESIDE = "40 endpoints alone", "beside 5 that hang and 5 that fail"
HEALTHY, IN_TROUBLE = 40, 5
EVENTS = 200
"""With all fifty endpoints that is 10,000 deliveries."""

_SETTINGS = """
name = "bench"
[postgres]
dsn = {dsn}
[sinks.e]
type = "memory"
[workers.webhooks]
handler = "workers.webhooks:fan_out"
subscribe = ["#"]
reply = "bridge.webhook_fan_out"
[workers.webhooks.options]
allow = ["127.0.0.0/8"]
[observe]
log_format = "json"
"""
_LIMIT = 300.0
"""Seconds that one round may take."""


@theme("webhooks")
def webhooks(world: World) -> Sequence[Row]:
    """Both contenders send the same to the healthy endpoints."""
    events = EVENTS // 10 if world.quick else EVENTS

    def run(in_trouble: int) -> Delivered:
        with receiving() as base:
            return _deliver(world, base, events, in_trouble)

    contenders = {ALONE: partial(run, 0), BESIDE: partial(run, IN_TROUBLE)}
    found = take_turns(world.rounds, contenders, lambda delivered: delivered.rate)
    rates, memory = found.each(lambda delivered: delivered.rate), found.each(lambda delivered: delivered.memory)
    return [
        rates.row(f"webhooks: {BESIDE}", "deliveries/s", ALONE, at_least(0.9), ours=BESIDE),
        memory.row("webhooks: memory of the sender", "MiB", ALONE, within(1.2), ours=BESIDE),
    ]


class Delivered(NamedTuple):
    """What the healthy endpoints got."""

    rate: float
    """Deliveries a second."""
    memory: float
    """The most that the sender took, in MiB."""


def _deliver(world: World, base: str, events: int, in_trouble: int) -> Delivered:
    dsn = world.database()
    with psycopg.connect(dsn, autocommit=True) as connection:
        paths = [f"ok/{n}" for n in range(HEALTHY)]
        paths += [f"{kind}/{n}" for kind in ("hang", "fail") for n in range(in_trouble)]
        for number, path in enumerate(paths, 1):
            connection.execute("select bridge.add_endpoint(%s, '{#}')", [f"{base.format(number)}/{path}"])
        connection.execute(
            "select bridge.webhook_fan_out(gen_random_uuid(), jsonb_build_object('topic', 'shop.order.placed', "
            "'time', now(), 'body', jsonb_build_object('number', n, 'text', repeat('x', 200))::text)) "
            "from generate_series(1, %s) n",
            [events],
        )
        wanted = HEALTHY * events
        folder = world.folder / world.unique("sender")
        sender = Daemon(folder, _SETTINGS.format(dsn=json.dumps(dsn)), "deliver", "webhooks", module="workers.cli")
        with sender:
            deadline = time.monotonic() + _LIMIT
            while (done := _count(connection)) < wanted:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{done} of {wanted} deliveries after {_LIMIT:g} s: {sender.log.read_text()[-500:]}"
                    )
                time.sleep(0.1)
            mebibytes = _peak(sender)
            sender.stop()
        [(seconds,)] = connection.execute(
            "select extract(epoch from max(d.finished_at) - min(a.at))::float from bridge.webhook_delivery d "
            "join bridge.webhook_attempt a on a.delivery = d.id where d.state = 'done'"
        ).fetchall()
    return Delivered(wanted / seconds, mebibytes)


def _count(connection: psycopg.Connection[tuple[int, ...]]) -> int:
    [(done,)] = connection.execute("select count(*) from bridge.webhook_delivery where state = 'done'").fetchall()
    return done


def _peak(sender: Daemon) -> float:
    assert sender.process is not None
    status = Path(f"/proc/{sender.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
