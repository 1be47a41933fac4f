"""The daemon: builds the parts from the settings, starts them, keeps them running, and stops them.

The first start fails fast, with a message that says what is wrong: where the database cannot be used, or none of the
sinks. Later losses are waited out, and a sink that is down holds up no other. A session is the time in which one
connection to PostgreSQL lives: stand by, lead, relay. Only the sinks, what plain pg_notify said, and the knowledge of
outages outlive it.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog
from tenacity import wait_exponential_jitter

from bridge.brokers.contract import Sink
from bridge.brokers.registry import broker_of
from bridge.errors import PgbridgeError, SettingsError
from bridge.event import Event
from bridge.lane import sink_outage
from bridge.postgres.prune import prune_for_ever
from bridge.postgres.sample import sample_for_ever
from bridge.postgres.schema import check_version
from bridge.process import metrics
from bridge.process.exposition import Labelled
from bridge.process.health import Health, serving
from bridge.process.outage import Outage
from bridge.process.systemd import notify, watchdog_for_ever
from bridge.process.tasks import background, one_error, raise_if_cancelled, stop_on_signals, unless_stopped
from bridge.process.traces import recording
from bridge.relay import Limits, Relay, tell_dead_letters
from bridge.routes import Routes
from bridge.settings import ChannelsSettings, Settings, SinkSettings
from bridge.sources import Source
from bridge.sources.channels import Channels, Intake
from bridge.sources.doorbell import Doorbell
from bridge.sources.listener import Listener
from bridge.sources.log import PageBytes, Reader
from bridge.sources.outbox import Calls, Outbox, Problem
from bridge.sources.pauses import Pauses
from bridge.sources.scheduled import Schedule
from bridge.unrouted import bury_unrouted, no_route

if TYPE_CHECKING:
    from bridge.process.spans import Spans

log = structlog.get_logger()

_SINKS_LOOK: Final = 5.0
"""Seconds between two looks at the sinks' connections while standing by."""
_BACKOFF: Final = wait_exponential_jitter(multiplier=0.1, max=5.0, jitter=0.5)
"""Seconds between two attempts to reach PostgreSQL."""


class Daemon:
    """One bridge."""

    def __init__(self, settings: Settings, spans: "Spans | None" = None) -> None:
        """`spans`: what is recorded of events that belong to sampled traces; None for nothing."""
        self._settings = settings
        self._limits = Limits(**settings.relay.model_dump())
        self._routes = Routes([(route.topic, route.sink) for route in settings.routes])
        self._sinks = {name: _make_sink(sink, spans) for name, sink in settings.sinks.items()}
        self._sink_outages = {
            name: sink_outage(name, retry_initial=self._limits.retry_initial, retry_max=self._limits.retry_max)
            for name in self._sinks
        }
        self._page_bytes = PageBytes(settings.outbox_or_default.page_bytes)
        self._pauses = Pauses()
        self._postgres = Outage("postgres", _BACKOFF)
        self._beside = {what: Outage(what, _BACKOFF) for what in ("channels", "prune")}
        """Of what runs beside the relay and does not end it."""
        self._started = False
        self._relaying = asyncio.Event()
        self._role = "starting"
        metrics.begin(self._sinks)
        metrics.DATABASE_UP.set_function(self._database_up)
        for name, sink in self._sinks.items():
            metrics.SINK_UP.labels(name).set_function(partial(_sink_up, sink))

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until `stop` is set. Raises PgbridgeError when the first start fails."""
        served = Labelled(metrics.REGISTRY, bridge=self._settings.name)
        with one_error(), serving("observe.listen", self._settings.observe.listen, self.health, served):
            async with background(watchdog_for_ever()):
                try:
                    await self._open_sinks()
                    await self._carry(stop)
                finally:
                    await self._close_sinks()

    def health(self) -> Health:
        """What `/health` and `/readyz` say. Other threads may ask."""
        paused = self._pauses.now
        # Whoever pauses a sink, often does so because its broker is about to go.
        problems = [self._sink_problem(name) for name in self._sinks if name not in paused]
        problems.append(self._postgres.problem if self._started else "the start is not done")
        problems += [outage.problem for outage in self._beside.values()]
        said = tuple(f"sink {name}: paused {pause.words}" for name, pause in paused.items())
        return Health(self._settings.name, self._role, tuple(filter(None, problems)), said, self._unready())

    def _unready(self) -> str | None:
        """Leads or stands by it must, and have something to publish to. One sink of several may be down."""
        if self._role not in ("leading", "standby"):
            return self._postgres.problem or f"it neither leads nor stands by: {self._role}"
        if any(sink.is_open or name in self._pauses.now for name, sink in self._sinks.items()):
            return None
        return "no sink is connected"

    # Starting

    async def _open_sinks(self) -> None:
        """Opens those that can be. Raises PgbridgeError where none can, unless there are channels to listen to: they
        forget what is sent while nobody listens. Raises SettingsError where one of them never can."""
        first_error = None
        for name, sink in self._sinks.items():
            try:
                await sink.open()
            except SettingsError:
                raise
            except PgbridgeError as error:
                first_error = first_error or error
                self._sink_outages[name].lost(error)
        is_any_open = any(sink.is_open for sink in self._sinks.values())
        if first_error is not None and not is_any_open and self._settings.channels is None:
            raise first_error

    def _is_up(self, role: str) -> None:
        """A session can do its work, in this role."""
        self._be(role)
        self._postgres.restored()
        if not self._started:
            self._started = True
            notify("READY=1")
            log.info("bridge.started", name=self._settings.name, sinks=sorted(self._sinks))

    # Running

    async def _carry(self, stop: asyncio.Event) -> None:
        channels = self._settings.channels
        if channels is None or self._settings.reads_outbox:
            await self._carry_log(stop)
        else:
            await self._carry_channels(stop, channels)

    async def _carry_log(self, stop: asyncio.Event) -> None:
        """The outbox; with `channels`, what plain pg_notify says is first written into it."""
        settings = self._settings
        intake = None
        if settings.channels is not None:
            intake = Intake(settings.name, settings.postgres, settings.channels, self._beside["channels"])
        await self._keep_session(stop, partial(self._log_session, stop, intake))
        if intake is not None:
            await intake.drain()

    async def _carry_channels(self, stop: asyncio.Event, channels: ChannelsSettings) -> None:
        """Plain pg_notify from memory; the database needs nothing of ours, and its outages do not stop publishing."""
        settings = self._settings
        heard = Channels(settings.name, settings.postgres, channels, self._routes, self._bury_unheard)
        heard_all = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for sink, source in heard.sources.items():
                tasks.create_task(self._relay(sink, source, heard_all))
            await self._keep_session(stop, partial(heard.session, self._is_up))
            await heard.drain(settings.relay.shutdown_limit)
            heard_all.set()

    def _bury_unheard(self, event: Event) -> None:
        """A notification that no route takes, with no table to keep it in: a log line is what remains."""
        if self._settings.unrouted != "drop":
            tell_dead_letters([no_route(event)])

    async def _keep_session(self, stop: asyncio.Event, session: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs sessions, each after the loss of the one before, until `stop` is set.

        Once started it comes back from everything, a refused login too: what is wrong then is wrong on the server.
        """
        while not stop.is_set():
            try:
                with one_error():
                    await unless_stopped(stop, session(), obeys=self._relaying)
            except PgbridgeError as error:
                if not self._started:
                    raise
                self._be("waiting for PostgreSQL")
                self._postgres.lost(error)
                await self._postgres.wait(stop)
        self._be("stopping")
        if self._postgres.lasts:
            log.warning("bridge.stopped_in_outage", hint="what was in flight is published again at the next start")

    async def _log_session(self, stop: asyncio.Event, intake: Intake | None) -> None:
        """One connection's life: stand by, lead, relay."""
        settings = self._settings
        calls = Calls(settings.name, Doorbell(settings.outbox_or_default.poll_interval))
        application_name = f"pgbridge {settings.name} bell"
        listener = Listener(
            settings.postgres,
            Calls.CHANNELS,
            calls.heard,
            heartbeat=settings.outbox_or_default.heartbeat,
            application_name=application_name,
        )
        hears = asyncio.Event()
        session = None
        try:
            await listener.open()
            async with background(listener.run(hears.set)):
                # Behind a pooler that LISTEN finds out, the lock of the lead would stay with the pool.
                await hears.wait()
                listener.sender = session = await Outbox.connect(
                    settings.name, settings.postgres, settings.outbox_or_default
                )
                await check_version(session)
                outbox = Outbox(
                    settings.name,
                    session,
                    settings.outbox_or_default,
                    calls.doorbell,
                    self._page_bytes,
                    self._pauses,
                )
                schedule = Schedule(session, settings.outbox_or_default.poll_interval)
                calls.when_paused, calls.when_scheduled = outbox.look_soon, schedule.wake
                await self._stand_by(outbox, calls.left)
                await self._lead(outbox, schedule, stop, intake)
        finally:
            self._relaying.clear()
            await listener.close()
            if session is not None:
                await session.close()

    async def _stand_by(self, outbox: Outbox, left: asyncio.Event) -> None:
        async with background(self._keep_sinks_open()):
            await outbox.standby(readers(self._settings, self._routes), left, partial(self._is_up, "standby"))

    async def _keep_sinks_open(self) -> None:
        """While standing by, when no relay does."""
        while True:
            await asyncio.sleep(_SINKS_LOOK)
            for name, sink in self._sinks.items():
                try:
                    if not sink.is_open:
                        await sink.open()
                except PgbridgeError as error:
                    self._sink_outages[name].lost(error)
                else:
                    self._sink_outages[name].restored()
                raise_if_cancelled()

    async def _lead(self, outbox: Outbox, schedule: Schedule, stop: asyncio.Event, intake: Intake | None) -> None:
        log.info("bridge.leading", name=self._settings.name)
        self._be("leading")
        self._relaying.set()
        beside: list[Coroutine[Any, Any, None]] = [
            outbox.keep(self._problems),
            schedule.move_for_ever(),
            prune_for_ever(self._settings, self._beside["prune"]),
            sample_for_ever(self._settings),
        ]
        relays: list[Coroutine[Any, Any, None]] = []
        for source in outbox.sources:
            if source.reader.sink:
                relays.append(self._relay(source.reader.sink, source, stop, careful=source.begins_held > 0))
            else:
                beside.append(bury_unrouted(source))
        if intake is not None:
            beside.append(intake.run())
        async with background(*beside), asyncio.TaskGroup() as tasks:
            for relay in relays:
                tasks.create_task(relay)
            await stop.wait()
        await outbox.leave()

    async def _relay(self, sink: str, source: Source, stop: asyncio.Event, *, careful: bool = False) -> None:
        relay = Relay(
            source,
            sink,
            self._sinks[sink],
            limits=self._limits,
            outage=self._sink_outages[sink],
            pipelined=self._settings.sinks[sink].pipelined,
            careful=careful,
        )
        await relay.run(stop)

    def _problems(self) -> Mapping[str, Problem]:
        """Why which sinks are behind."""
        found = {}
        for name, outage in self._sink_outages.items():
            if (words := outage.reason) is not None:
                found[name] = Problem(words, outage.seconds)
        return found

    # Stopping

    async def _close_sinks(self) -> None:
        for sink in self._sinks.values():
            await sink.close()
        if self._started:
            log.info("bridge.stopped", name=self._settings.name)

    # What others see

    def _be(self, role: str) -> None:
        if role != self._role:
            self._role = role
            metrics.LEADING.set(role == "leading")
            notify(f"STATUS={role}")

    def _sink_problem(self, name: str) -> str | None:
        if self._sinks[name].is_open or self._sink_outages[name].lasts:
            return self._sink_outages[name].problem
        return f"sink {name}: is not connected"

    def _database_up(self) -> float:
        return float(self._started and not self._postgres.lasts)


def _make_sink(settings: SinkSettings, spans: "Spans | None") -> Sink:
    sink = broker_of(settings).sink(settings)
    if spans is None:
        return sink
    from bridge.brokers.traced import TracedSink

    return TracedSink(sink, settings, spans)


def _sink_up(sink: Sink) -> float:
    return float(sink.is_open)


def readers(settings: Settings, routes: Routes) -> list[Reader]:
    """Who reads the log: each sink that a route leads to, and one reader for what no route takes, where that is kept
    and can be."""
    found = [Reader(sink, routes.patterns_of(sink), settings.sinks[sink].start) for sink in routes.sinks]
    if settings.unrouted != "drop" and not routes.take_all:
        found.append(Reader("", routes.patterns))
    return found


async def run_until_signalled(settings: Settings, load: Callable[[], object]) -> None:
    """Runs a daemon until SIGTERM or SIGINT, or SIGHUP where `load` finds nothing wrong with the settings.

    Raises PgbridgeError when the start fails.
    """
    with recording(settings, "pgbridge") as spans:
        await Daemon(settings, spans).run(stop_on_signals("bridge", load))
