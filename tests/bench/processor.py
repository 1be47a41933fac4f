"""The processor time of a process, and what of it an event takes."""

from dataclasses import dataclass
from pathlib import Path


def processor_time(pid: int) -> float:
    """Seconds of processor time, user and system, that a process has used.

    Of all threads; from schedstat, whose first field is in nanoseconds, since a tick of stat is 10 ms.
    """
    threads = Path("/proc", str(pid), "task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


@dataclass(frozen=True, slots=True)
class Look:
    """A process at work."""

    finished: int
    """Events."""
    cpu: float
    """Seconds of processor time that it has used."""


def microseconds(first: Look, last: Look) -> float:
    """Processor time of each event that was finished between two looks. Raises ValueError when none was."""
    events = last.finished - first.finished
    if events <= 0:
        raise ValueError("no event was finished between the first look and the last")
    return (last.cpu - first.cpu) / events * 1e6
