"""A process and all that it started: signals for the whole tree, and a guard that ends it with its parent.

Run as a script, this file is the guard: it waits until its standard input ends, which happens however the parent
ends, and then kills the tree. PR_SET_PDEATHSIG would not do: it fires when the thread that started the server ends,
and reaches neither the server's children nor a frozen process's backends. Only the standard library is imported, so
that the guard starts in milliseconds.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path


def processes() -> dict[int, tuple[str, int, int]]:
    """State, parent and start time (clock ticks since boot) of every process, by pid; from proc(5)."""
    found: dict[int, tuple[str, int, int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            # A process may end between the listing and the reading.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # The name, in parentheses, may itself hold spaces and parentheses.
                fields = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()
                found[int(entry)] = (fields[0], int(fields[1]), int(fields[19]))
    return found


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is none. With the pid, it is unique."""
    entry = processes().get(pid)
    return entry[2] if entry else None


def tree(root: int) -> list[int]:
    """A process and its living descendants, the root first."""
    table = processes()
    found = [root] if root in table and table[root][0] != "Z" else []
    parents = {root}
    while parents:
        parents = {pid for pid, (_, parent, _) in table.items() if parent in parents}
        found += [pid for pid in parents if table[pid][0] != "Z"]
    return found


def send(pids: list[int], signum: int) -> None:
    """Sends a signal to each process that still exists."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def freeze_tree(root: int) -> list[int]:
    """Stops a whole tree (SIGSTOP) and returns its pids. The root goes first, so that it starts nothing new."""
    stopped: set[int] = set()
    while fresh := [pid for pid in tree(root) if pid not in stopped]:
        send(fresh, signal.SIGSTOP)
        stopped.update(fresh)
    return list(stopped)


def kill_tree(root: int) -> None:
    """Kills a whole tree (SIGKILL), and returns when every process of it has ended. Raises TimeoutError after 10 s."""
    pids = freeze_tree(root)
    started = {pid: entry[2] for pid, entry in processes().items() if pid in pids}
    send(pids, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while True:
        table = processes()
        # A zombie holds no files and no ports; its parent, or init, reaps it.
        now = {pid: since for pid, (state, _, since) in table.items() if state != "Z"}
        left = [pid for pid, since in started.items() if now.get(pid) == since]
        if not left:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {left} did not end within 10 s of SIGKILL")
        time.sleep(0.005)


def main(root: int, started: int) -> None:
    """Waits for the parent's end, then kills the tree, unless its pid belongs to another process by now."""
    sys.stdin.buffer.read()
    if start_time(root) == started:
        kill_tree(root)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
