"""A worker process: it takes deliveries, handles them with bounded concurrency, reconnects, and stops in order.

The start fails fast; a delivery goes to `attempt.Attempts`; a stop takes no more deliveries, lets running handlers
finish, gives the others back, and closes queue and inbox, all within `shutdown_limit`.

No delivery is ever left behind: each has a task until it is settled, and one that could not be settled ends the
connection to the broker, which then delivers again whatever was in hand.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
from prometheus_client import Gauge

from bridge.brokers.contract import Delivery, Queue
from bridge.errors import BrokerUnavailableError, PgbridgeError
from bridge.process.health import Health
from bridge.process.outage import Outage
from bridge.process.systemd import notify, stopping, watchdog_for_ever
from bridge.process.tasks import in_own_task
from bridge.settings import WorkerSettings
from workers.attempt import OUTAGE_BACKOFF, Attempts
from workers.handler import Run
from workers.inbox import Inbox
from workers.metrics import BROKER_UP, DATABASE_UP, HELD_KEYS, IN_HAND, PAUSED, QUEUE_DEPTH
from workers.pausing import Pausing
from workers.sampling import LAST_LIMIT, LEAST_LEFT, Sampling
from workers.session import HEARTBEAT

if TYPE_CHECKING:
    from workers.traced import AttemptSpans

log = structlog.get_logger()

LOOK_INTERVAL: Final = 10.0
"""Seconds between two looks for deliveries that nobody works on."""

SAMPLE_INTERVAL: Final = 15.0
"""Seconds between two looks at how much waits on the broker, and how many keys are held."""

PRUNE_INTERVAL: Final = 3600.0
"""Seconds between two prunings of the inbox."""

_GIVE_BACK_PART: Final = 0.25
"""Of `shutdown_limit`: kept for giving back what still runs, and for goodbyes."""


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
        spans: "AttemptSpans | None" = None,
    ) -> None:
        """`keep_finished`: how long the inbox remembers; longer than any event may be delivered again. `spans`: what is
        recorded of events that belong to sampled traces."""
        self._name = name
        self._settings = settings
        self._make_queue = make_queue
        self._inbox = inbox
        self._keep_finished = keep_finished
        self._attempts = Attempts(name, settings, run, inbox, spans)
        self._broker = Outage("queue", OUTAGE_BACKOFF, worker=name)
        self._stopping = asyncio.Event()
        self._slots = asyncio.Semaphore(settings.concurrency)
        inbox.gather_claims(self._slots.locked)
        self._running: set[asyncio.Task[None]] = set()
        self._paused: set[asyncio.Task[object] | None] = set()
        """Of those, the ones that wait for another attempt, and meanwhile have no slot."""
        self._leaving = asyncio.Event()
        """Nothing of the connection to the broker begins any more: it has ended, or the worker stops."""
        self._queue: Queue | None = None
        self._started = False
        self._waiting: object | None = None
        """What is new each time that it waits for a delivery; None while it does not."""
        self._stranded: str | None = None
        self._pausing = Pausing(name, inbox.pause)
        self._sampling: Sampling | None = None
        self._deadline = math.inf
        """When the process should be gone, by the loop's clock; never before a stop."""
        self._fruitless = 0
        """Connections to the broker, one after the other, on which nothing was settled before they ended."""
        IN_HAND.labels(name).set_function(lambda: len(self._running))
        DATABASE_UP.labels(name).set_function(lambda: not self._attempts.database.lasts)
        BROKER_UP.labels(name).set_function(lambda: self._started and not self._broker.lasts)
        PAUSED.labels(name).set_function(lambda: self._pausing.now is not None)

    def health(self) -> Health:
        """What `/health` and `/readyz` say. Other threads may ask."""
        unstarted = None if self._started else "the start is not done"
        pausing = self._pausing.now
        # Whoever pauses a worker may do so because its broker is about to go.
        problems = (None if pausing else self._broker.problem, self._stranded, *self._attempts.problems, unstarted)
        role = "stopping" if self._stopping.is_set() else "working" if self._started else "starting"
        paused = () if pausing is None else (f"worker {self._name}: paused {pausing}",)
        return Health(self._name, role, tuple(filter(None, problems)), paused, self._unready(role))

    def _unready(self, role: str) -> str | None:
        """It must consume, unless a person has paused it, and know what it has done before."""
        if role != "working":
            return f"the worker is {role}"
        if self._attempts.database.lasts:
            return self._attempts.database.problem
        if self._pausing.now is None and (self._broker.lasts or self._queue is None):
            return self._broker.problem or "the worker does not consume yet"
        return None

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
        await self._pausing.look()
        if self._pausing.now is None:
            self._queue = await self._open()
        self._started = True
        notify("READY=1")
        log.info("worker.started", worker=self._name, concurrency=self._settings.concurrency)

    async def _work(self, stop: asyncio.Event) -> None:
        """Consumes until `stop` is set or a task fails, and then drains."""
        consumer = asyncio.create_task(self._consume())
        self._sampling = sampling = Sampling(self._name, self._inbox)
        jobs = (
            stop.wait(),
            self._beat(),
            self._pausing.watch(),
            self._sample(),
            sampling.store_for_ever(),
            self._prune(),
            watchdog_for_ever(),
        )
        others = [asyncio.create_task(job) for job in jobs]
        try:
            done, _ = await asyncio.wait([consumer, *others], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stopping.set()
            self._deadline = asyncio.get_running_loop().time() + self._settings.shutdown_limit
            stopping()
            await self._drain(consumer)
            for task in others:
                task.cancel()
            await asyncio.wait(others)
        for task in done:
            task.result()

    async def _shut_down(self) -> None:
        """Closes queue and inbox. After a start, what does not answer in time is left: the process ends anyway, and
        that of its connections with it."""
        try:
            async with asyncio.timeout_at(None if math.isinf(self._deadline) else self._deadline):
                try:
                    await self._close()
                    await self._store_last_sample()
                finally:
                    await self._inbox.close()
        except TimeoutError:
            log.warning("worker.left", worker=self._name, seconds=self._settings.shutdown_limit)

    async def _store_last_sample(self) -> None:
        """Where there is time for it, although the database should turn out to be silent."""
        left = self._deadline - asyncio.get_running_loop().time()
        if self._sampling is not None and not self._attempts.database.lasts and left > LEAST_LEFT:
            await self._sampling.store(LAST_LIMIT)

    async def _open(self) -> Queue:
        queue = self._make_queue()
        try:
            await queue.open()
        except BaseException:
            await queue.close()
            raise
        return queue

    async def _close(self) -> None:
        queue, self._queue = self._queue, None
        if queue is not None:
            await queue.close()

    async def _consume(self) -> None:
        while not self._stopping.is_set():
            try:
                if self._pausing.now is not None:
                    await self._close()
                    await self._rest()
                    continue
                if self._queue is None:
                    self._queue = await self._open()
                    self._broker.restored()
                if await in_own_task(self._deliver(self._queue)):
                    await self._close()
                    continue
            except PgbridgeError as error:
                self._broker.lost(error)
                await self._close()
                # A broker that opens the queue and ends it at once, or settles nothing, must not be asked without a
                # pause.
                self._broker.failures = max(self._broker.failures, self._fruitless)
                self._fruitless += 1
                await self._broker.wait(self._stopping)
            else:
                if not self._stopping.is_set():
                    raise RuntimeError("the queue ended its deliveries although nobody had stopped it")

    async def _deliver(self, queue: Queue) -> bool:
        """Works on what one connection to the broker delivers. True where it ended because the worker is paused, and
        nothing runs any more. Raises what ends it else: the loss of the connection, or the first delivery that could
        not be settled."""
        unsettled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._leaving = asyncio.Event()
        taking = asyncio.ensure_future(self._take(queue.deliveries(), unsettled))
        looking = asyncio.ensure_future(self._look(queue))
        pausing = asyncio.ensure_future(self._pausing.begun())
        try:
            await asyncio.wait([taking, unsettled, looking, pausing], return_when=asyncio.FIRST_COMPLETED)
            for ended in (unsettled, looking, taking):
                if ended.done():
                    await ended
                    return False
            taking.cancel()
            await self._come_to_rest(queue, unsettled)
            return True
        finally:
            self._leaving.set()
            for task in (taking, looking, pausing):
                task.cancel()
            await asyncio.wait([taking, looking, pausing])
            for task in (taking, looking):
                if not task.cancelled():
                    task.exception()  # else asyncio would complain where two ended in the same moment
            unsettled.cancel()

    async def _come_to_rest(self, queue: Queue, unsettled: asyncio.Future[None]) -> None:
        """Takes nothing more, and lets what runs finish, however long that takes. What waits for another attempt or for
        its turn goes back. Raises as `_deliver`."""
        await queue.stop()
        self._leaving.set()
        self._attempts.stop_waiting()
        while self._running:
            await asyncio.wait([*self._running, unsettled], return_when=asyncio.FIRST_COMPLETED)
            if unsettled.done():
                await unsettled

    async def _rest(self) -> None:
        """Until the worker is resumed, or stops."""
        log.info("worker.resting", worker=self._name)
        resumed = asyncio.ensure_future(self._pausing.ended())
        stopped = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait([resumed, stopped], return_when=asyncio.FIRST_COMPLETED)
        finally:
            resumed.cancel()
            stopped.cancel()

    async def _take(self, deliveries: AsyncIterator[Delivery], unsettled: asyncio.Future[None]) -> None:
        """Starts a task for every delivery. A slot comes first, so that none waits in hand for one."""
        while True:
            await self._slots.acquire()
            try:
                self._waiting = object()
                delivery = await anext(deliveries)
            except StopAsyncIteration:
                self._slots.release()
                return
            except BaseException:
                self._slots.release()
                raise
            finally:
                self._waiting = None
            task = asyncio.create_task(self._handle(delivery, self._leaving))
            self._running.add(task)
            task.add_done_callback(partial(self._ended, unsettled))

    async def _look(self, queue: Queue) -> None:
        """Raises BrokerUnavailableError when the queue has more in hand than runs, although it is asked for the next:
        by a mistake of ours nobody works on that, and closing the queue brings it again.

        What has just arrived is handed out in the next moment, so it takes two looks within one wait.
        """
        before: object | None = None
        while True:
            await asyncio.sleep(LOOK_INTERVAL)
            left = queue.in_hand - len(self._running)
            if left <= 0 or self._waiting is None or self._stopping.is_set():
                before = self._stranded = None
            elif self._waiting is not before:
                before, self._stranded = self._waiting, None
            else:
                self._stranded = f"worker {self._name}: nothing works on {left} deliveries in hand; they are given back"
                log.error("worker.stranded", worker=self._name, deliveries=left)
                raise BrokerUnavailableError(self._stranded)

    async def _handle(self, delivery: Delivery, leaving: asyncio.Event) -> None:
        if self._stopping.is_set():
            await delivery.give_back()
        else:
            await self._attempts.handle(delivery, partial(self._pause, leaving))

    async def _pause(self, leaving: asyncio.Event, seconds: float) -> bool:
        """See `attempt.Pause`. Meanwhile another delivery has the slot."""
        task = asyncio.current_task()
        self._paused.add(task)
        self._slots.release()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await leaving.wait()
            if leaving.is_set():
                return False
            await self._slots.acquire()
        except asyncio.CancelledError:
            return False  # it stops
        self._paused.discard(task)
        return not leaving.is_set()

    def _ended(self, unsettled: asyncio.Future[None], task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if task in self._paused:
            self._paused.discard(task)
        else:
            self._slots.release()
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._fruitless = 0
            return
        if not isinstance(error, PgbridgeError):
            self._attempts.crashed(error)
            error = BrokerUnavailableError(f"a delivery was not settled: {type(error).__name__}: {error}")
        if not unsettled.done():
            unsettled.set_exception(error)
            unsettled.exception()  # else asyncio would complain where the connection was lost in the same moment

    async def _drain(self, consumer: asyncio.Task[None]) -> None:
        """Lets what runs finish, and gives back what does not in time. What ignores that is left to the process' end:
        its claims are not released, since it still runs."""
        limit = self._settings.shutdown_limit
        if self._queue is not None:
            with contextlib.suppress(PgbridgeError, TimeoutError):  # gone already: nothing comes any more
                async with asyncio.timeout(limit * _GIVE_BACK_PART):
                    await self._queue.stop()
        self._leaving.set()
        self._attempts.stop_waiting()
        if self._running:
            log.info("worker.draining", worker=self._name, running=len(self._running))
            await self._wait_for_running(limit * _GIVE_BACK_PART)
        for task in self._running:
            task.cancel()
        if self._running:
            await self._wait_for_running(limit * _GIVE_BACK_PART / 2)
        if self._running:
            log.error("worker.stuck", worker=self._name, running=len(self._running))
        # It ends by itself once the queue has ended its deliveries, unless it waits for a broker.
        await asyncio.wait([consumer], timeout=min(0.5, limit * _GIVE_BACK_PART / 4))
        consumer.cancel()
        await asyncio.wait([consumer])

    async def _wait_for_running(self, reserve: float) -> None:
        """Until nothing runs, or `reserve` seconds before the process should be gone."""
        timeout = self._deadline - reserve - asyncio.get_running_loop().time()
        await asyncio.wait(self._running, timeout=max(0.0, timeout))

    async def _beat(self) -> None:
        """Keeps the claims, and knows whether PostgreSQL answers although nothing happens."""
        while True:
            await asyncio.sleep(HEARTBEAT)
            await self._attempts.database.outlast(self._inbox.beat)

    async def _sample(self) -> None:
        """Asks how much there is to do, for the samples and the metrics, and for the latter how much is held, which
        others find in PostgreSQL. What is not known, or not any more, is not told."""
        serves = self._settings.listen is not None
        while True:
            if serves and self._settings.holds:
                self._show(HELD_KEYS, await self._held_keys())
            self._show(QUEUE_DEPTH, await self._depth())
            await asyncio.sleep(SAMPLE_INTERVAL)

    def _show(self, gauge: Gauge, value: int | None) -> None:
        if value is None:
            gauge.remove(self._name)
        else:
            gauge.labels(self._name).set(value)

    async def _held_keys(self) -> int | None:
        if self._attempts.database.lasts:
            return None
        try:
            return await self._inbox.held_keys()
        except PgbridgeError as error:
            log.debug("inbox.held_unknown", worker=self._name, reason=str(error))
            return None

    async def _depth(self) -> int | None:
        queue = self._queue
        if queue is None or self._broker.lasts:
            return None
        try:
            async with asyncio.timeout(SAMPLE_INTERVAL):
                return await queue.depth()
        except (PgbridgeError, TimeoutError) as error:
            log.debug("queue.depth_unknown", worker=self._name, reason=str(error))
            return None

    async def _prune(self) -> None:
        while True:
            try:
                count = await self._inbox.prune(self._keep_finished)
            except PgbridgeError as error:
                log.warning("inbox.prune_failed", worker=self._name, reason=str(error))
            else:
                log.debug("inbox.pruned", worker=self._name, events=count)
            await asyncio.sleep(PRUNE_INTERVAL)
