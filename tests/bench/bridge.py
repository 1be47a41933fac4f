"""The daemon as its own process over a backlog, and what its cursor tells of its rate."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import psycopg

from tests.bench.processor import processor_time
from tests.bench.results import Interleaved, Row, Target
from tests.bench.world import TOPIC, Log, World
from tests.support.daemons import Daemon

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """The daemon at one store of its cursor."""

    mark: int
    """Everything up to this id is confirmed."""
    time: float
    """When that was stored, by the database's clock, in seconds."""
    cpu: float
    """Seconds of processor time that the daemon has used."""


def between(samples: Sequence[Sample], first: int, last: int) -> tuple[float, float]:
    """Seconds and processor seconds that an event took between two ids, as near as samples lie.

    Raises ValueError when fewer than two samples do.
    """
    part = [sample for sample in samples if first <= sample.mark <= last]
    if len(part) < 2:
        raise ValueError(f"only {len(part)} samples lie between the ids {first} and {last}")
    events = part[-1].mark - part[0].mark
    return (part[-1].time - part[0].time) / events, (part[-1].cpu - part[0].cpu) / events


@dataclass(frozen=True, slots=True)
class Drained:
    """One backlog, carried to its end."""

    events: int
    began: float
    """When the bridge took the lead, by the database's clock: process start and connecting lie before."""
    samples: list[Sample]
    peak_memory: float
    """Most resident memory, in MB (10^6 bytes)."""

    @property
    def rate(self) -> float:
        """Confirmed events a second, from the lead to the store of the last mark."""
        return self.events / (self.samples[-1].time - self.began)

    @property
    def processor_time(self) -> float:
        """Microseconds an event of the daemon, from the first store of a mark to the last. Raises ValueError."""
        return between(self.samples, self.samples[0].mark, self.samples[-1].mark)[1] * 1e6


def settings_of(name: str, dsn: str, sink: Mapping[str, str | int]) -> str:
    """bridge.toml with the defaults that are shipped, and one route for everything."""
    lines = [f'name = "{name}"', "[postgres]", f'dsn = "{dsn}"', "[sinks.events]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in sink.items()]
    return "\n".join([*lines, "[[routes]]", f'topic = "{TOPIC.partition(".")[0]}.#"', 'sink = "events"', ""])


OTHER = "the other version of the bridge"
"""The contender that `World.beside` names."""


def versions(world: World, measure: Callable[[Path | None], T]) -> dict[str, Callable[[], T]]:
    """This version of the bridge as the contender "ours", and the other one where there is one.

    `measure` takes the interpreter of the version's environment.
    """
    return {"ours" if python is None else OTHER: partial(measure, python) for python in world.pythons}


def alone(found: Interleaved[float], row: str, unit: str, target: Target | None = None, ours: str = "ours") -> Row:
    """The row of a value that only bridges have: beside the other version, or nobody where none takes part."""
    return found.row(row, unit, OTHER if OTHER in found.values else "", target, ours)


def beside_other(found: Interleaved[float], row: str, unit: str) -> list[Row]:
    """One more row, beside the other version; none where none takes part."""
    return [found.row(row, unit, OTHER)] if OTHER in found.values else []


Measured = Drained | float
"""What a bridge gives, and a peer: its rate."""


def rate(measured: Measured) -> float:
    """Events a second."""
    return measured.rate if isinstance(measured, Drained) else measured


def processor_times(found: Interleaved[Measured]) -> Interleaved[float]:
    """Microseconds an event of the contenders that are bridges; the others have no values."""
    values: dict[str, list[float]] = {name: [] for name in found.values}
    errors = dict(found.errors)
    for name, measured in found.values.items():
        try:
            values[name] += [one.processor_time for one in measured if isinstance(one, Drained)]
        except ValueError as error:
            errors[name] = str(error)
    return Interleaved(values, errors, found.not_quiet)


def daemon(
    world: World, name: str, dsn: str, sink: Mapping[str, str | int], python: Path | None = None, more: str = ""
) -> Daemon:
    """The bridge `name`, not yet started; `python` as in `Daemon`, `more` are further settings."""
    return Daemon(world.folder / name, settings_of(name, dsn, sink) + more, python=python)


def drain(
    world: World,
    log: Log,
    sink: Mapping[str, str | int],
    *,
    dsn: str | None = None,
    limit: float = 120.0,
    python: Path | None = None,
    more: str = "",
) -> Drained:
    """Runs a bridge with a new cursor over a log until all of it is confirmed (or held); `dsn` overrides where it
    connects, `more` are further settings.

    Raises TimeoutError after `limit` seconds, RuntimeError when the daemon ends.
    """
    name = world.unique("bridge")
    process = daemon(world, name, dsn or log.dsn, sink, python, more)
    with psycopg.connect(log.dsn, autocommit=True) as watcher, process:
        samples, began = watch(watcher, name, log.last, process, time.monotonic() + limit)
        assert process.process is not None
        memory = _peak_memory(process.process.pid)
        stop(process)
    return Drained(log.events, began, samples, memory)


def stop(process: Daemon) -> None:
    """Raises RuntimeError when the daemon does not end well, TimeoutExpired when it does not end."""
    code = process.stop()
    if code != 0:
        raise RuntimeError(f"the daemon ended with {code}: {_tail(process.log)}")


def watch(
    watcher: psycopg.Connection[tuple[object, ...]], name: str, last: int, process: Daemon, deadline: float
) -> tuple[list[Sample], float]:
    """The stores of the cursor `name` until its mark is at `last`, and when the lead was taken; `deadline` is of
    time.monotonic(). Raises TimeoutError, and RuntimeError when the daemon ends.
    """
    leader = watcher.execute("select to_regclass('bridge.leader') is not null").fetchone()
    query = (
        "select mark, extract(epoch from stored_at)::float8, extract(epoch from since)::float8 "
        "from bridge.cursor join bridge.leader using (name) where name = %s and sink = 'events'"
        if leader == (True,)
        else "select mark, extract(epoch from stored_at)::float8, extract(epoch from leader_since)::float8 "
        "from bridge.cursor where name = %s"
    )
    samples: list[Sample] = []
    assert process.process is not None
    while True:
        row = watcher.execute(query, (name,), prepare=True).fetchone()
        if row is not None:
            mark, stored, began = row
            assert isinstance(mark, int)
            assert isinstance(stored, float)
            if mark and (not samples or mark > samples[-1].mark):
                samples.append(Sample(mark, stored, processor_time(process.process.pid)))
            if mark >= last:
                assert isinstance(began, float)
                return samples, began
        if process.process.poll() is not None:
            raise RuntimeError(f"the daemon ended: {_tail(process.log)}")
        if time.monotonic() > deadline:
            reached = samples[-1].mark if samples else 0
            raise TimeoutError(f"id {reached} of {last} was reached in time; {_tail(process.log)}")
        time.sleep(0.02)


def _peak_memory(pid: int) -> float:
    status = Path("/proc", str(pid), "status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024 / 1e6


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:] if log.exists() else "it logged nothing"


@contextmanager
def running(
    world: World, dsn: str, sink: Mapping[str, str | int], *, python: Path | None = None, more: str = ""
) -> Iterator[Daemon]:
    """A bridge that leads, for themes that emit while it runs; `more` is added to its settings."""
    with daemon(world, world.unique("bridge"), dsn, sink, python, more) as process:
        process.wait_for("bridge.leading")
        yield process
        process.stop()


def wait_until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Raises TimeoutError when `condition` does not become true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {seconds:g} s")
        time.sleep(0.02)
