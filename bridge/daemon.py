"""The daemon: builds the parts from the settings, runs them, and brings them back after an outage, for ever.

The first start fails fast, with a message that says what to mend; later losses are waited out. A session is the time
in which one connection to PostgreSQL lives: stand by, lead, relay. Nothing in memory outlives it but the sinks.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from psycopg import Notify
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential_jitter

from bridge.errors import DatabaseUnavailableError, about
from bridge.observe.metrics import LEADING
from bridge.observe.systemd import notify
from bridge.operate.migrate import check_version
from bridge.relay import Limits, Relay
from bridge.routes import Routes
from bridge.settings import Settings
from bridge.sinks.registry import build_sink
from bridge.sources import Source
from bridge.sources.channels import ChannelSource, Intake
from bridge.sources.doorbell import Doorbell
from bridge.sources.listener import Listener
from bridge.sources.outbox import OutboxSource
from bridge.supervise import background, one_error, unless_stopped

log = structlog.get_logger()

_BELL = "bridge_bell"
_LEAD = "bridge_lead"
_BACKOFF = wait_exponential_jitter(multiplier=0.1, max=5.0, jitter=0.5)


class Daemon:
    """One bridge."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sinks = {name: build_sink(sink) for name, sink in settings.sinks.items()}
        self._routes = Routes([(route.topic, route.sink) for route in settings.routes])
        self._started = False
        self._failures = 0
        self._lost_at: float | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until `stop` is set. Raises PgbridgeError when the first start fails."""
        try:
            for name, sink in self._sinks.items():
                with about(f"sinks.{name}"):
                    await sink.open()
            with one_error():
                await (self._carry_log(stop) if self._settings.reads_outbox else self._carry_channels(stop))
        finally:
            for sink in self._sinks.values():
                await sink.close()
            if self._started:
                log.info("bridge.stopped", name=self._settings.name)

    async def _carry_log(self, stop: asyncio.Event) -> None:
        """The outbox; with `channels`, what plain pg_notify says is first written into it."""
        settings = self._settings
        intake = Intake(settings.name, settings.postgres, settings.channels) if settings.channels else None
        await self._keep(lambda: self._log_session(stop, intake))
        if intake is not None:
            await intake.drain()

    async def _carry_channels(self, stop: asyncio.Event) -> None:
        """Plain pg_notify from memory; the database needs nothing of ours, and its outages do not stop publishing."""
        channels = self._settings.channels
        if channels is None:
            raise AssertionError("settings without channels read the outbox")
        source = ChannelSource(self._settings.name, self._settings.postgres, channels)
        async with background(self._keep(lambda: source.session(self._say_up))):
            await self._relay(source, stop)

    async def _keep(self, session: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs sessions, each after the loss of the one before; returns when one ends by itself."""
        async for attempt in AsyncRetrying(
            wait=self._backoff,
            retry=retry_if_exception_type(DatabaseUnavailableError),
            stop=lambda _: not self._started,
            before_sleep=self._say_lost,
            reraise=True,
        ):
            with attempt, about("postgres.dsn"), one_error():
                await session()

    async def _log_session(self, stop: asyncio.Event, intake: Intake | None) -> None:
        """One connection's life: stand by, lead, relay."""
        settings = self._settings
        outbox = settings.outbox_or_default
        doorbell = Doorbell(outbox.poll_interval)
        left = asyncio.Event()

        def heard(notification: Notify) -> None:
            if notification.channel == _BELL:
                doorbell.ring()
            elif notification.payload == settings.name:
                left.set()

        listener = Listener(settings.postgres, [_BELL, _LEAD], heard, application_name=f"pgbridge {settings.name} bell")
        session = await OutboxSource.connect(settings.name, settings.postgres)
        try:
            await check_version(session)
            source = OutboxSource(settings.name, session, outbox, doorbell)
            await listener.open()
            async with background(listener.run(self._say_up)):
                if not await unless_stopped(stop, source.standby(left)):
                    return
                log.info("bridge.leading", name=settings.name)
                LEADING.set(1)
                async with background(source.pulse(), *([intake.session()] if intake else [])):
                    await self._relay(source, stop)
                await source.leave()
        finally:
            LEADING.set(0)
            await listener.close()
            await session.close()

    async def _relay(self, source: Source, stop: asyncio.Event) -> None:
        wanted = self._settings.relay
        relay = Relay(
            source,
            self._sinks,
            self._routes,
            drop_unrouted=self._settings.unrouted == "drop",
            limits=Limits(
                pages_in_flight=wanted.pages_in_flight,
                bytes_in_flight=wanted.bytes_in_flight,
                retry_initial=wanted.retry_initial,
                retry_max=wanted.retry_max,
                shutdown_limit=wanted.shutdown_limit,
            ),
        )
        await relay.run(stop)

    def _backoff(self, state: RetryCallState) -> float:
        """Seconds until the next session; counted anew after each one that worked."""
        self._failures += 1
        state.attempt_number = self._failures
        return _BACKOFF(state)

    def _say_lost(self, state: RetryCallState) -> None:
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            log.warning("postgres.lost", reason=str(state.outcome.exception() if state.outcome else ""))

    def _say_up(self) -> None:
        if not self._started:
            self._started = True
            notify("READY=1")
            log.info("bridge.started", name=self._settings.name, sinks=sorted(self._sinks))
        elif self._lost_at is not None:
            log.info("postgres.restored", outage_seconds=round(time.monotonic() - self._lost_at, 3))
        self._lost_at = None
        self._failures = 0


async def run_until_signalled(settings: Settings) -> None:
    """Runs a daemon until SIGTERM or SIGINT; a second signal leaves at once, which loses nothing.

    Raises PgbridgeError when the start fails.
    """
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
    await Daemon(settings).run(stop)
