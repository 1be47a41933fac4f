"""How a daemon is asked to stop."""

import asyncio
import os
import signal

import structlog

from bridge.observe.systemd import notify

log = structlog.get_logger()


def stop_on_signals() -> asyncio.Event:
    """Set by SIGTERM or SIGINT; a second signal ends the process at once, which loses nothing."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def asked(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("bridge.stopped_at_once", signal=number.name)
            # What is in flight was not settled, so the next start publishes it again.
            os._exit(128 + number)
        log.info("bridge.stopping", signal=number.name)
        notify("STOPPING=1")
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked, number)
    return stop
