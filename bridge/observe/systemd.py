"""systemd's notification protocol (sd_notify(3)): a datagram to the socket that the service manager names."""

import asyncio
import os
import socket


def notify(state: str) -> None:
    """Sends ``READY=1``, ``STOPPING=1``, ``STATUS=...``, ``WATCHDOG=1``; does nothing outside of systemd.

    Raises OSError when the socket is named but cannot be written.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect(address)
        sender.send(state.encode())


def watchdog_interval() -> float | None:
    """Seconds between two ``WATCHDOG=1``: half of what systemd allows; None without a watchdog."""
    microseconds = os.environ.get("WATCHDOG_USEC")
    return int(microseconds) / 2_000_000 if microseconds else None


async def watchdog_for_ever() -> None:
    """Tells systemd's watchdog that the event loop turns, until it is cancelled; without a watchdog it only waits."""
    interval = watchdog_interval()
    while True:
        if interval is not None:
            notify("WATCHDOG=1")
        await asyncio.sleep(interval or 3600.0)
