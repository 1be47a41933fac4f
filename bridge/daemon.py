"""The daemon: builds the parts from the settings, runs them, and brings them back after an outage, for ever.

The first start fails fast, with a message that says what to mend; later losses are waited out. A session is the time
in which one connection to PostgreSQL lives: stand by, lead, relay. Nothing in memory outlives it but the sinks.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from psycopg import Notify
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential_jitter

from bridge.brokers.registry import broker_of
from bridge.errors import PgbridgeError
from bridge.postgres.prune import prune_for_ever
from bridge.postgres.schema import check_version
from bridge.postgres.status import sample_for_ever
from bridge.process.health import Health, notify, serving, watchdog_for_ever
from bridge.process.metrics import DATABASE_UP, LEADING, SINK_UP
from bridge.process.tasks import background, one_error, stop_on_signals, unless_stopped
from bridge.relay import Limits, Relay, Routes
from bridge.settings import Settings
from bridge.sources import Source
from bridge.sources.channels import ChannelSource, Intake
from bridge.sources.doorbell import Doorbell
from bridge.sources.listener import Listener
from bridge.sources.outbox import OutboxSource

log = structlog.get_logger()

_BELL = "bridge_bell"
_LEAD = "bridge_lead"
_SINKS_LOOK = 5.0
"""Seconds between two looks at the sinks' connections while standing by."""
_BACKOFF = wait_exponential_jitter(multiplier=0.1, max=5.0, jitter=0.5)


class Daemon:
    """One bridge."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sinks = {name: broker_of(sink).sink(sink) for name, sink in settings.sinks.items()}
        self._routes = Routes([(route.topic, route.sink) for route in settings.routes])
        self._started = False
        self._failures = 0
        self._lost_at: float | None = None
        self._lost_to: type | None = None
        self._relaying = False
        self._role = "starting"
        DATABASE_UP.set_function(lambda: float(self._started and self._lost_at is None))
        for name, sink in self._sinks.items():
            SINK_UP.labels(name).set_function(lambda sink=sink: float(sink.is_open))  # type: ignore[misc]

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until `stop` is set. Raises PgbridgeError when the first start fails."""
        try:
            with one_error(), serving("observe.listen", self._settings.observe.listen, self.health):
                async with background(watchdog_for_ever()):
                    await self._open_sinks()
                    await (self._carry_log(stop) if self._settings.reads_outbox else self._carry_channels(stop))
        finally:
            for sink in self._sinks.values():
                await sink.close()
            if self._started:
                log.info("bridge.stopped", name=self._settings.name)

    def health(self) -> Health:
        """What `/health` says."""
        problems = [f"sinks.{name}: is not connected" for name, sink in self._sinks.items() if not sink.is_open]
        if not self._started:
            problems.append("the start is not done")
        elif (lost_at := self._lost_at) is not None:
            problems.append(f"postgres.dsn: lost for {time.monotonic() - lost_at:.0f} s")
        return Health(self._settings.name, self._role, tuple(problems))

    def _be(self, role: str) -> None:
        if role != self._role:
            self._role = role
            LEADING.set(role == "leading")
            notify(f"STATUS={role}")

    async def _open_sinks(self) -> None:
        for sink in self._sinks.values():
            if not sink.is_open:
                await sink.open()

    async def _keep_sinks_open(self) -> None:
        """While standing by, when no relay does; tells an outage at its begin and at its end."""
        lost_at: float | None = None
        while True:
            await asyncio.sleep(_SINKS_LOOK)
            try:
                await self._open_sinks()
            except PgbridgeError as error:
                if lost_at is None:
                    lost_at = time.monotonic()
                    log.warning("sink.unreachable", reason=str(error))
            else:
                if lost_at is not None:
                    log.info("sink.recovered", seconds=round(time.monotonic() - lost_at, 3))
                lost_at = None

    async def _carry_log(self, stop: asyncio.Event) -> None:
        """The outbox; with `channels`, what plain pg_notify says is first written into it."""
        settings = self._settings
        intake = Intake(settings.name, settings.postgres, settings.channels) if settings.channels else None
        await self._keep(stop, lambda: self._log_session(stop, intake))
        if intake is not None:
            await intake.drain()

    async def _carry_channels(self, stop: asyncio.Event) -> None:
        """Plain pg_notify from memory; the database needs nothing of ours, and its outages do not stop publishing."""
        channels = self._settings.channels
        if channels is None:
            raise AssertionError("settings without channels read the outbox")
        source = ChannelSource(self._settings.name, self._settings.postgres, channels)
        heard_all = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._relay(source, heard_all))
            await self._keep(stop, lambda: source.session(lambda: self._say_up("running")))
            await source.drain(self._settings.relay.shutdown_limit)
            heard_all.set()

    async def _keep(self, stop: asyncio.Event, session: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs sessions, each after the loss of the one before, until one ends by itself or `stop` is set.

        Once started it comes back from everything, a refused login too: what is wrong then is mended on the server.
        """

        async def pause(seconds: float) -> None:
            await unless_stopped(stop, asyncio.sleep(seconds))

        try:
            async for attempt in AsyncRetrying(
                wait=self._backoff,
                sleep=pause,
                retry=retry_if_exception_type(PgbridgeError),
                stop=lambda _: not self._started or stop.is_set(),
                before_sleep=self._say_lost,
                reraise=True,
            ):
                with attempt, one_error():
                    await unless_stopped(stop, session(), obeys=lambda: self._relaying)
        except PgbridgeError:
            if not self._started or not stop.is_set():
                raise
            self._lost_at = time.monotonic()
        self._be("stopping")
        if self._lost_at is not None:
            log.warning("bridge.stopped_in_outage", hint="what was in flight is published again at the next start")

    async def _log_session(self, stop: asyncio.Event, intake: Intake | None) -> None:
        """One connection's life: stand by, lead, relay."""
        settings = self._settings
        outbox = settings.outbox_or_default
        doorbell = Doorbell(outbox.poll_interval)
        left = asyncio.Event()
        hears = asyncio.Event()

        def heard(notification: Notify) -> None:
            if notification.channel == _BELL:
                doorbell.ring()
            elif notification.payload == settings.name:
                left.set()

        listener = Listener(settings.postgres, [_BELL, _LEAD], heard, application_name=f"pgbridge {settings.name} bell")
        session = None
        try:
            await listener.open()
            async with background(listener.run(hears.set)):
                # Behind a pooler that LISTEN finds out, the lock of the lead would stay with the pool.
                await hears.wait()
                session = await OutboxSource.connect(settings.name, settings.postgres)
                await check_version(session)
                source = OutboxSource(settings.name, session, outbox, doorbell)
                async with background(self._keep_sinks_open()):
                    await source.standby(left, lambda: self._say_up("standby"))
                log.info("bridge.leading", name=settings.name)
                self._be("leading")
                self._relaying = True
                async with background(source.keep(), *self._beside(intake)):
                    await self._relay(source, stop)
                await source.leave()
        finally:
            self._relaying = False
            await listener.close()
            if session is not None:
                await session.close()

    def _beside(self, intake: Intake | None) -> list[Coroutine[Any, Any, None]]:
        """What the leader does while it relays."""
        jobs = [prune_for_ever(self._settings)]
        if intake is not None:
            jobs.append(intake.session())
        if self._settings.observe.listen is not None:
            jobs.append(sample_for_ever(self._settings))
        return jobs

    async def _relay(self, source: Source, stop: asyncio.Event) -> None:
        relay = Relay(
            source,
            self._sinks,
            self._routes,
            drop_unrouted=self._settings.unrouted == "drop",
            limits=Limits(**self._settings.relay.model_dump()),
        )
        await relay.run(stop)

    def _backoff(self, state: RetryCallState) -> float:
        """Seconds until the next session; counted anew after each one that worked."""
        self._failures += 1
        state.attempt_number = self._failures
        return _BACKOFF(state)

    def _say_lost(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._be("waiting for PostgreSQL")
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            log.warning("postgres.lost", reason=str(error))
        elif type(error) is not self._lost_to:
            # An outage that turns into a refused login is another matter, for a person.
            log.warning("postgres.unreachable", reason=str(error))
        self._lost_to = type(error)

    def _say_up(self, role: str) -> None:
        self._be(role)
        if not self._started:
            self._started = True
            notify("READY=1")
            log.info("bridge.started", name=self._settings.name, sinks=sorted(self._sinks))
        elif self._lost_at is not None:
            log.info("postgres.restored", outage_seconds=round(time.monotonic() - self._lost_at, 3))
        self._lost_at = None
        self._failures = 0


async def run_until_signalled(settings: Settings) -> None:
    """Runs a daemon until SIGTERM or SIGINT. Raises PgbridgeError when the start fails."""
    await Daemon(settings).run(stop_on_signals())
