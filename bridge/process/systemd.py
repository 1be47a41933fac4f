"""What a service tells systemd of itself: that it is ready, stopping, alive (sd_notify(3))."""

import asyncio
import os
import socket
import threading
import time
from functools import cache
from typing import Final

import structlog

log = structlog.get_logger()


def notify(state: str) -> None:
    """Sends ``READY=1``, ``STOPPING=1``, ``STATUS=...``, ``WATCHDOG=1``; does nothing outside of systemd.

    Raises OSError when the socket is named but cannot be written.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        _socket().sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


_reloading: Final = threading.Event()


def is_reloading() -> bool:
    """Whether the process is to begin anew."""
    return _reloading.is_set()


def stopping() -> None:
    """Says that the process is about to end, unless it only begins anew. Raises as `notify`."""
    if not _reloading.is_set():
        notify("STOPPING=1")


def reloading() -> None:
    """Says that the process begins anew, and keeps `stopping` from saying that it ends. Raises as `notify`."""
    _reloading.set()
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


@cache
def _socket() -> socket.socket:
    """One for all that is said: a process that has no file descriptor left must still show that it lives."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)


def watchdog_interval() -> float | None:
    """Seconds between two ``WATCHDOG=1``: half of what systemd allows; None without a watchdog."""
    microseconds = os.environ.get("WATCHDOG_USEC")
    return int(microseconds) / 2_000_000 if microseconds else None


async def watchdog_for_ever() -> None:
    """Tells systemd's watchdog that the event loop turns, until it is cancelled; without a watchdog it only waits."""
    interval = watchdog_interval()
    while True:
        if interval is not None:
            try:
                notify("WATCHDOG=1")
            except OSError as error:
                # It is systemd that decides whether too few have come.
                log.warning("watchdog.not_told", error=str(error))
        await asyncio.sleep(interval or 3600.0)
