"""A process that sends webhooks: claim, sign, post, record; and it stops in order.

PostgreSQL decides what is sent when, and to whom how much at once (``0018_webhooks.sql``). A process has a task for
each delivery that it claimed, until what came of it is on record; one that dies leaves its claims to their leases.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Final, Protocol

import structlog

from bridge.errors import PgbridgeError
from bridge.process.health import Health
from bridge.process.outage import Outage
from bridge.process.systemd import notify, stopping, watchdog_for_ever
from workers.attempt import OUTAGE_BACKOFF
from workers.webhooks.client import Answer
from workers.webhooks.deliveries import Claimed, Deliveries, Outcome, Recorded
from workers.webhooks.metrics import (
    ATTEMPTS,
    CRASHED,
    DATABASE_UP,
    DUE,
    IN_FLIGHT,
    OPEN_BREAKERS,
    OUTCOMES,
    REQUEST_SECONDS,
)
from workers.webhooks.options import WebhookOptions

log = structlog.get_logger()

LEASE_BEYOND_TIMEOUT: Final = 30.0
"""Seconds that a claim lasts beyond the time of its request: for recording what came."""

POLL_INTERVAL: Final = 0.2
"""Seconds between two looks for what is due, at most."""

_SHORTEST_REST: Final = 0.01
"""Seconds, where something is due that another process has in hand."""

_MOST_BYTES: Final = 64_000_000
"""Of bodies in flight; one that is larger still goes, alone."""

_STALLED: Final = 60.0
"""Seconds without a turn of the loop, or beyond a request's time, after which `/health` says so."""

_SAMPLE_INTERVAL: Final = 15.0
"""Seconds between two looks at how much waits."""

_PRUNE_INTERVAL: Final = 3600.0
"""Seconds between two prunings."""

_RECORD_PART: Final = 0.25
"""Of the limit of a stop: kept for recording what has come, and for goodbyes."""


class Poster(Protocol):
    """Posts, as `client.WebhookClient` does. Whatever endpoint and network do is in the answer."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer: ...


class Sign(Protocol):
    """See `signature.sign`."""

    def __call__(self, secrets: Sequence[str], message_id: str, timestamp: int, body: bytes) -> str: ...


class Sender:
    """One process that sends the webhooks of a worker."""

    def __init__(
        self,
        worker: str,
        options: WebhookOptions,
        deliveries: Deliveries,
        poster: Poster,
        sign: Sign,
        *,
        shutdown_limit: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`shutdown_limit`: seconds that a stop may take. `now`: the clock that receivers compare with theirs."""
        self._worker = worker
        self._options = options
        self._deliveries = deliveries
        self._poster = poster
        self._sign = sign
        self._shutdown_limit = shutdown_limit
        self._now = now
        self._database = Outage("database", OUTAGE_BACKOFF, worker=worker)
        self._stopping = asyncio.Event()
        self._deadline = math.inf
        """When the process should be gone, by the loop's clock; never before a stop."""
        self._started = False
        self._sending: dict[asyncio.Task[None], tuple[int, float]] = {}
        """By task, its delivery and when it began, the oldest first."""
        self._bytes = 0
        self._changed = asyncio.Event()
        """Something was recorded, so there may be room again; or the process stops."""
        self._turned_at = time.monotonic()
        self._hanging: str | None = None
        self._count = {outcome: ATTEMPTS.labels(worker, outcome).inc for outcome in (*OUTCOMES.values(), CRASHED)}
        self._seconds = REQUEST_SECONDS.labels(worker)
        IN_FLIGHT.labels(worker).set_function(lambda: len(self._sending))
        DATABASE_UP.labels(worker).set_function(lambda: self._started and not self._database.lasts)

    def health(self) -> Health:
        """What `/health` and `/readyz` say. Other threads may ask."""
        role = "stopping" if self._stopping.is_set() else "sending" if self._started else "starting"
        unstarted = None if self._started else "the start is not done"
        problems = tuple(filter(None, (self._database.problem, self._stalled, self._hanging, unstarted)))
        idle = None if role == "sending" else f"the process is {role}"
        return Health(self._worker, role, problems, unready=self._database.problem or self._stalled or idle)

    @property
    def _stalled(self) -> str | None:
        seconds = time.monotonic() - self._turned_at
        if not self._started or self._stopping.is_set() or self._database.lasts or seconds < _STALLED:
            return None
        return f"webhooks {self._worker}: nothing was looked for in {seconds:.0f} s"

    async def run(self, stop: asyncio.Event) -> None:
        """Sends until `stop` is set.

        Raises PgbridgeError at the start when the database cannot be used. Once started it comes back from everything,
        as the workers do.
        """
        try:
            await self._deliveries.open()
            self._turned_at = time.monotonic()
            self._started = True
            notify("READY=1")
            log.info("webhook.started", worker=self._worker, concurrency=self._options.concurrency)
            await self._work(stop)
        finally:
            await self._close()
        log.info("webhook.stopped", worker=self._worker)

    async def _work(self, stop: asyncio.Event) -> None:
        """Sends until `stop` is set or a task fails, and then drains."""
        claiming = asyncio.create_task(self._claim())
        jobs = (stop.wait(), self._sample(), self._prune(), watchdog_for_ever())
        others = [asyncio.create_task(job) for job in jobs]
        try:
            done, _ = await asyncio.wait([claiming, *others], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stopping.set()
            self._changed.set()
            self._deadline = _clock() + self._shutdown_limit
            stopping()
            await self._drain(claiming)
            for task in others:
                task.cancel()
            await asyncio.wait(others)
        for task in done:
            task.result()

    async def _close(self) -> None:
        """After a start, a database that does not answer in time is left: the process ends anyway."""
        try:
            async with asyncio.timeout_at(None if math.isinf(self._deadline) else self._deadline):
                await self._deliveries.close()
        except TimeoutError:
            log.warning("webhook.left", worker=self._worker, seconds=self._shutdown_limit)

    async def _claim(self) -> None:
        """Claims what is due, as long as there is room, and rests while nothing is."""
        while not self._stopping.is_set():
            self._turned_at = time.monotonic()
            self._hanging = self._what_hangs()
            self._changed.clear()
            room = self._options.concurrency - len(self._sending)
            bytes_room = _MOST_BYTES - self._bytes
            if room <= 0 or bytes_room <= 0:
                await self._rest(POLL_INTERVAL)
                continue
            try:
                in_hand = [delivery for delivery, _ in self._sending.values()]
                claimed = await self._deliveries.claim(room, bytes_room, in_hand)
                seconds = 0.0 if claimed else await self._deliveries.next_due()
            except PgbridgeError as error:
                self._database.lost(error)
                await self._database.wait(self._stopping)
                continue
            self._database.restored()
            for each in claimed:
                self._start(each)
            if not claimed:
                await self._rest(POLL_INTERVAL if seconds is None else min(max(seconds, _SHORTEST_REST), POLL_INTERVAL))

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _what_hangs(self) -> str | None:
        """Requests that do not end, although they have a time-out: a mistake of ours, which takes their room."""
        if self._database.lasts or not self._sending:
            return None
        _, begun = next(iter(self._sending.values()))
        seconds = time.monotonic() - begun
        if seconds < self._options.timeout + _STALLED:
            return None
        return f"webhooks {self._worker}: a request has not ended for {seconds:.0f} s"

    def _start(self, claimed: Claimed) -> None:
        task = asyncio.create_task(self._send(claimed))
        self._sending[task] = (claimed.delivery, time.monotonic())
        self._bytes += len(claimed.body)
        task.add_done_callback(partial(self._ended, claimed))

    def _ended(self, claimed: Claimed, task: asyncio.Task[None]) -> None:
        del self._sending[task]
        self._bytes -= len(claimed.body)
        self._changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            # Nothing is on record of it, so it is sent again when its lease ends.
            self._crashed(claimed, error)

    async def _send(self, claimed: Claimed) -> None:
        outcome = await self._post(claimed)
        recorded = await self._database.outlast(self._deliveries.record, outcome)
        self._tell(claimed, outcome, recorded)

    async def _post(self, claimed: Claimed) -> Outcome:
        begun = time.monotonic()
        timestamp = int(self._now())
        try:
            headers = {
                "content-type": "application/json",
                "webhook-id": claimed.event_id,
                "webhook-timestamp": str(timestamp),
                "webhook-signature": self._sign(claimed.secrets, claimed.event_id, timestamp, claimed.body),
            }
            answer = await self._poster.post(claimed.url, claimed.body, headers)
        except Exception as error:  # noqa: BLE001 - a mistake of ours; the delivery has its schedule all the same
            self._crashed(claimed, error)
            said = f"it could not be sent, by a mistake of pgbridge's: {type(error).__name__}"
            return Outcome(claimed.delivery, claimed.attempt, None, time.monotonic() - begun, said)
        self._seconds.observe(answer.duration)
        return Outcome(
            claimed.delivery,
            claimed.attempt,
            answer.status,
            answer.duration,
            answer.error,
            answer.body,
            answer.retry_after,
        )

    def _crashed(self, claimed: Claimed, error: BaseException) -> None:
        self._count[CRASHED]()
        log.error("webhook.crashed", worker=self._worker, **_names(claimed), exc_info=error)

    def _tell(self, claimed: Claimed, outcome: Outcome, recorded: Recorded) -> None:
        """Counts it, and says what a person may want to know. No URL: a receiver may have put a secret into it."""
        self._count[OUTCOMES[recorded.state]]()
        what = {"worker": self._worker, **_names(claimed)}
        came = {"status": outcome.status, "reason": outcome.error}
        match recorded.state:
            case "failed":
                log.warning("webhook.failed", **what, **came)
            case "late":
                log.warning("webhook.late", **what, **came)
            case "due" | "skipped":
                log.info("webhook.attempt_failed", **what, **came)
            case _:
                log.debug("webhook.delivered", **what, **came)
        if recorded.opened is not None:
            log.warning("webhook.breaker_opened", **what, **came, seconds=recorded.opened)
        if recorded.disabled is not None:
            log.warning("webhook.disabled", **what, why=recorded.disabled)

    async def _drain(self, claiming: asyncio.Task[None]) -> None:
        """Lets a claim and the requests end, and what came of them be recorded. Whatever does not end in time is left
        to its lease."""
        reserve = self._shutdown_limit * _RECORD_PART
        await asyncio.wait([claiming], timeout=reserve)
        claiming.cancel()
        await asyncio.wait([claiming])
        if self._sending:
            log.info("webhook.draining", worker=self._worker, sending=len(self._sending))
            await asyncio.wait(self._sending, timeout=max(0.0, self._deadline - reserve - _clock()))
        if self._sending:
            log.warning("webhook.left_to_leases", worker=self._worker, deliveries=len(self._sending))
            for task in self._sending:
                task.cancel()
            await asyncio.wait(self._sending, timeout=reserve / 2)

    async def _sample(self) -> None:
        """Asks, for whoever looks at the metrics, how much there is to do. What is not known is not served."""
        while self._options.listen is not None:
            backlog = None if self._database.lasts else await self._backlog()
            if backlog is None:
                DUE.remove(self._worker)
                OPEN_BREAKERS.remove(self._worker)
            else:
                DUE.labels(self._worker).set(backlog[0])
                OPEN_BREAKERS.labels(self._worker).set(backlog[1])
            await asyncio.sleep(_SAMPLE_INTERVAL)
        await asyncio.Event().wait()

    async def _backlog(self) -> tuple[int, int] | None:
        try:
            return await self._deliveries.backlog()
        except PgbridgeError as error:
            log.debug("webhook.backlog_unknown", worker=self._worker, reason=str(error))
            return None

    async def _prune(self) -> None:
        while True:
            try:
                count = await self._deliveries.prune(timedelta(seconds=self._options.keep))
            except PgbridgeError as error:
                log.warning("webhook.prune_failed", worker=self._worker, reason=str(error))
            else:
                log.debug("webhook.pruned", worker=self._worker, deliveries=count)
            await asyncio.sleep(_PRUNE_INTERVAL)


def _names(claimed: Claimed) -> dict[str, object]:
    return {
        "endpoint": claimed.endpoint,
        "delivery": claimed.delivery,
        "attempt": claimed.attempt,
        "event_id": claimed.event_id,
    }


def _clock() -> float:
    return asyncio.get_running_loop().time()
