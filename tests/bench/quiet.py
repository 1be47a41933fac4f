"""Whether the machine was quiet while something was measured: what other programs took of it, and what was stolen.

/proc/stat counts the time of all processors; that of the benchmark, of its servers and of all that they started is in
/proc/PID/stat. What is busy and not ours is somebody else's; what is stolen, other machines on the same host took.

Not counted as busy is what no process has done: interrupts, and the kernel's own threads, which write to the disk for
whoever asked. A server that the benchmark has not started, as PUBSUB_EMULATOR_HOST may name, counts as somebody else.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FOREIGN_AT_MOST = 0.05
"""Other programs' share of all processors' time. With nothing but us at full rate 0.00 is seen; the two ways to count,
by ticks and by processes, differ by up to 0.03, to the quiet side, since a process's time may hold interrupts."""
STEAL_AT_MOST = 0.05
"""The share that other machines on the host may take."""
COUNTING_ERROR = 10
"""Ticks (of 10 ms) below which nothing is told: /proc/stat samples, and processes are counted a moment before it."""
LOAD_AT_MOST = 1.0
"""Processes that ran or waited for a processor, on average of the last minute, before we began."""
_KERNEL_THREAD = 0x00200000
"""PF_KTHREAD among the flags of a process."""


class Reading(NamedTuple):
    """What all processors together have done since the machine started, in clock ticks."""

    total: int
    busy: int
    """In processes, whoever's."""
    ours: int
    """In our processes, those that have ended included."""
    stolen: int
    kernel: Mapping[int, int]
    """In each of the kernel's own threads, by pid. They come and go, and what they have done goes with them."""


class Disturbance(NamedTuple):
    """What was not ours while something was measured, as shares of all processors' time."""

    foreign: float
    steal: float

    def __str__(self) -> str:
        return f"other programs {self.foreign:.0%}, steal {self.steal:.0%}"


def worst(disturbances: Sequence[Disturbance]) -> Disturbance:
    """The most of each kind."""
    return Disturbance(max(one.foreign for one in disturbances), max(one.steal for one in disturbances))


Look = Callable[[], Reading]


def disturbance(before: Reading, after: Reading) -> Disturbance | None:
    """What happened between two readings; None when the machine was quiet."""
    total = after.total - before.total
    kernel = sum(max(0, ticks - before.kernel.get(pid, 0)) for pid, ticks in after.kernel.items())
    foreign = max(0, after.busy - before.busy - (after.ours - before.ours) - kernel)
    stolen = after.stolen - before.stolen
    too_much = (
        foreign > max(FOREIGN_AT_MOST * total, COUNTING_ERROR),
        stolen > max(STEAL_AT_MOST * total, COUNTING_ERROR),
    )
    return Disturbance(foreign / total, stolen / total) if any(too_much) else None


def read() -> Reading:
    """As it is now."""
    ours, kernel = _processes()
    # user nice system idle iowait irq softirq steal, see proc(5); what guests take is in user.
    fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return Reading(total=sum(fields), busy=sum(fields[:3]), ours=ours, stolen=fields[7], kernel=kernel)


def _processes() -> tuple[int, dict[int, int]]:
    """The ticks of this process and all that it started, and those of each of the kernel's threads."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    kernel: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            # The name, in parentheses, may itself hold spaces and parentheses.
            fields = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile, and is in its parent's time
        # utime, stime, and cutime, cstime of the children that ended: so nothing of ours is lost, or counted twice.
        own = sum(int(field) for field in fields[11:15])
        if int(fields[6]) & _KERNEL_THREAD:
            kernel[int(entry)] = own
        else:
            parents[int(entry)], ticks[int(entry)] = int(fields[1]), own
    ours, generation = 0, {os.getpid()}
    while generation:
        ours += sum(ticks.get(pid, 0) for pid in generation)
        generation = {pid for pid, parent in parents.items() if parent in generation}
    return ours, kernel


def at_rest(look: Look = read, seconds: float = 1.0) -> str:
    """What the machine does while we do nothing; empty when it is quiet."""
    load = os.getloadavg()[0]
    before = look()
    time.sleep(seconds)
    found = disturbance(before, look())
    if found is None and load <= LOAD_AT_MOST:
        return ""
    return f"load average {load:.2f}, {found or 'nothing else at this moment'}"
