"""A worker process: it takes deliveries, handles them with bounded concurrency, reconnects, and stops in order.

The start fails fast; a delivery goes to `attempt.Attempts`; a stop takes no more deliveries, lets running handlers
finish up to `shutdown_limit`, gives the others back, and closes queue and inbox.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Final

import structlog

from bridge.brokers.contract import Delivery, Queue, Subscription
from bridge.brokers.registry import broker_of
from bridge.errors import PgbridgeError, SettingsError, UsageError
from bridge.process.health import Health, notify, watchdog_for_ever
from bridge.process.outage import Outage
from bridge.settings import Settings, WorkerSettings
from workers.attempt import OUTAGE_BACKOFF, Attempts, retry_delays
from workers.handler import Run, load_handler
from workers.inbox import Inbox

log = structlog.get_logger()

PRUNE_INTERVAL: Final = 3600.0
"""Seconds between two prunings of the inbox."""

LEASE: Final = 30.0
"""Seconds after which a crashed worker's deliveries go to another one; a living one's queue extends them."""

_GIVE_BACK_LIMIT: Final = 5.0
"""Seconds that cancelled handlers have for giving their deliveries back."""

_REMEMBERED: Final = timedelta(days=30)
"""How long finished events are remembered at least."""


class Worker:
    """One process of one worker. `make_queue` builds an unopened queue, anew after every loss of the broker."""

    def __init__(
        self,
        name: str,
        settings: WorkerSettings,
        run: Run,
        make_queue: Callable[[], Queue],
        inbox: Inbox,
        *,
        keep_finished: timedelta = timedelta(days=30),
    ) -> None:
        """`keep_finished`: how long the inbox remembers; longer than any event may be delivered again."""
        self._name = name
        self._settings = settings
        self._make_queue = make_queue
        self._inbox = inbox
        self._keep_finished = keep_finished
        self._attempts = Attempts(name, settings, run, inbox)
        self._broker = Outage("queue", OUTAGE_BACKOFF, worker=name)
        self._stopping = asyncio.Event()
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._running: set[asyncio.Task[None]] = set()
        self._queue: Queue | None = None
        self._started = False

    def health(self) -> Health:
        """What `/health` says. Other threads may ask."""
        problems = (self._broker.problem, self._attempts.problem, None if self._started else "the start is not done")
        role = "stopping" if self._stopping.is_set() else "working" if self._started else "starting"
        return Health(self._name, role, tuple(filter(None, problems)))

    async def run(self, stop: asyncio.Event) -> None:
        """Works until `stop` is set.

        Raises PgbridgeError at the start when database or broker cannot be used. Once started it comes back from
        everything, as the bridge does, a refused login too: what is wrong then is wrong on the server.
        """
        try:
            await self._start()
            await self._work(stop)
        finally:
            await self._shut_down()
        log.info("worker.stopped", worker=self._name)

    async def _start(self) -> None:
        await self._inbox.open()
        self._queue = await self._open()
        self._started = True
        notify("READY=1")
        log.info("worker.started", worker=self._name, concurrency=self._settings.concurrency)

    async def _work(self, stop: asyncio.Event) -> None:
        """Consumes until `stop` is set or a task fails, and then drains."""
        consumer = asyncio.create_task(self._consume())
        others = [asyncio.create_task(job) for job in (stop.wait(), self._prune(), watchdog_for_ever())]
        try:
            done, _ = await asyncio.wait([consumer, *others], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stopping.set()
            notify("STOPPING=1")
            await self._drain(consumer)
            for task in others:
                task.cancel()
            await asyncio.wait(others)
        for task in done:
            task.result()

    async def _shut_down(self) -> None:
        try:
            await self._close()
        finally:
            await self._inbox.close()

    async def _open(self) -> Queue:
        queue = self._make_queue()
        try:
            await queue.open()
        except BaseException:
            await queue.close()
            raise
        return queue

    async def _close(self) -> None:
        if self._queue is not None:
            await self._queue.close()
            self._queue = None

    async def _consume(self) -> None:
        while not self._stopping.is_set():
            try:
                if self._queue is None:
                    self._queue = await self._open()
                    self._broker.restored()
                await self._take(self._queue.deliveries())
            except PgbridgeError as error:
                self._broker.lost(error)
                await self._close()
                # A broker that opens the queue and ends it at once must not be asked without a pause.
                await self._broker.wait(self._stopping)
            else:
                if not self._stopping.is_set():
                    raise RuntimeError("the queue ended its deliveries although nobody had stopped it")

    async def _take(self, deliveries: AsyncIterator[Delivery]) -> None:
        """Starts a task for every delivery. A slot comes first, so that none waits in hand for one."""
        while True:
            await self._slots.acquire()
            try:
                delivery = await anext(deliveries)
            except StopAsyncIteration:
                self._slots.release()
                return
            except BaseException:
                self._slots.release()
                raise
            if self._stopping.is_set():
                self._slots.release()
                await delivery.give_back()
                continue
            task = asyncio.create_task(self._attempts.handle(delivery))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._slots.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            # A mistake of ours. The delivery is unsettled and comes again, to this process or to another.
            log.error("event.crashed", worker=self._name, exc_info=error)

    async def _drain(self, consumer: asyncio.Task[None]) -> None:
        if self._queue is not None:
            with contextlib.suppress(PgbridgeError):  # gone already: nothing comes any more
                await self._queue.stop()
        if self._running:
            log.info("worker.draining", worker=self._name, running=len(self._running))
            await asyncio.wait(self._running, timeout=self._settings.shutdown_limit)
        for task in self._running:
            task.cancel()
        if self._running:
            _, stuck = await asyncio.wait(self._running, timeout=_GIVE_BACK_LIMIT)
            if stuck:
                log.error("worker.stuck", worker=self._name, running=len(stuck))
        if not consumer.done():
            # It ends by itself once the queue has ended its deliveries, unless it waits for a broker.
            await asyncio.wait([consumer], timeout=0.5)
            consumer.cancel()
            await asyncio.wait([consumer])

    async def _prune(self) -> None:
        while True:
            try:
                count = await self._inbox.prune(self._keep_finished)
            except PgbridgeError as error:
                log.warning("inbox.prune_failed", worker=self._name, reason=str(error))
            else:
                log.debug("inbox.pruned", worker=self._name, events=count)
            await asyncio.sleep(PRUNE_INTERVAL)


def subscription(name: str, settings: WorkerSettings, topics: Sequence[str]) -> Subscription:
    """What a worker with these settings wants of its broker; `topics` are those of its handler."""
    prefetch = settings.prefetch or 2 * settings.concurrency
    return Subscription(
        worker=name,
        topics=settings.subscribe or list(topics),
        prefetch=prefetch,
        retry_delays=retry_delays(settings),
        max_attempts=settings.max_attempts,
        ack_wait=LEASE,
        start=settings.start,
    )


def subscriptions(settings: Settings) -> Mapping[str, tuple[str, Subscription]]:
    """By worker, the name of its sink and what it wants of that sink's broker. Raises SettingsError.

    `pgbridge topology` and `check` get it through the entry points of the group ``pgbridge.subscriptions``.
    """
    return {
        name: (settings.sink_of(name), subscription(name, worker, load_handler(worker.handler, name).topics))
        for name, worker in settings.workers.items()
    }


def build(name: str, settings: Settings) -> Worker:
    """The worker `name`, ready to run. Raises UsageError for an unknown name, SettingsError for wrong settings."""
    if name not in settings.workers:
        known = ", ".join(sorted(settings.workers)) or "none"
        raise UsageError(f"there is no worker {name!r} in the settings; known: {known}")
    own = settings.workers[name]
    handler = load_handler(own.handler, name)
    sink = settings.sinks[settings.sink_of(name)]
    run = handler.configured(own.options, name)
    if not (own.subscribe or handler.topics):
        raise SettingsError(f"workers.{name}.subscribe: the handler names no topics, so the settings must")
    broker = broker_of(sink)
    wanted = subscription(name, own, handler.topics)
    kept = timedelta(seconds=2 * settings.outbox.retention) if settings.outbox else _REMEMBERED
    return Worker(
        name,
        own,
        run,
        partial(broker.queue, sink, wanted),
        Inbox(name, settings.postgres, concurrency=own.concurrency, reply=own.reply),
        keep_finished=max(kept, _REMEMBERED),
    )
