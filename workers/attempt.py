"""One delivery: claim, run the handler, finish with the reply, and settle; or retry; or dead-letter.

The inbox's count of attempts decides when to give up, since a broker's counts deliveries that never ran, too.
"""

import asyncio
import json
import random
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import structlog
from tenacity import wait_random_exponential

from bridge.brokers.contract import Delivery, Failure
from bridge.errors import PgbridgeError
from bridge.event import Event, Malformed
from bridge.process.metrics import WORKER_EVENTS
from bridge.process.outage import Outage
from bridge.process.tasks import is_cancelled
from bridge.settings import WorkerSettings
from workers.effects import current_effects
from workers.handler import Reject, Result, Retry, Run
from workers.inbox import Claim, ClaimLostError, Inbox, ReplyError

log = structlog.get_logger()

OUTAGE_BACKOFF: Final = wait_random_exponential(multiplier=0.1, max=10.0)
"""Seconds between two attempts to reach a server that is gone; drawn at random, since all workers lose it together."""

BUSY_DELAY: Final = 1.0
"""Seconds until an event that another process has in hand is looked at again."""

_LONGEST_TRACE: Final = 16_000
"""Characters of a traceback that travel with a dead letter; the end is kept, where the error is."""


@dataclass(frozen=True, slots=True)
class _Failed:
    failure: Failure
    after: float | None = None
    """Seconds, when the handler asked for a delay."""


class Attempts:
    """Handles the deliveries of one worker; shared by its concurrent tasks."""

    def __init__(self, worker: str, settings: WorkerSettings, run: Run, inbox: Inbox) -> None:
        self._worker = worker
        self._settings = settings
        self._run = run
        self._inbox = inbox
        self._database = Outage("database", OUTAGE_BACKOFF, worker=worker)

    @property
    def problem(self) -> str | None:
        """For `/health`: the outage of the database, if there is one."""
        return self._database.problem

    async def handle(self, delivery: Delivery) -> None:
        """Handles one delivery to its end. Cancelling it gives the delivery back, without counting an attempt.

        A broker that is gone, or says no, cannot take the outcome: the delivery comes again, and the inbox knows what
        was done.
        """
        try:
            await self._handle(delivery)
        except PgbridgeError as error:
            log.warning("event.unsettled", worker=self._worker, reason=str(error), **_names(delivery.event))

    async def _handle(self, delivery: Delivery) -> None:
        event = delivery.event
        if isinstance(event, Malformed):
            await self._dead_letter(delivery, Failure("malformed", str(event)), attempt=delivery.attempt)
            return
        try:
            claim = await self._database.outlast(self._inbox.claim, event.inbox_id)
        except asyncio.CancelledError:
            await delivery.give_back()
            return
        if claim == "finished":
            log.debug("event.repeated", worker=self._worker, **_names(event))
            await delivery.ack()
        elif claim == "busy":
            log.debug("event.busy", worker=self._worker, **_names(event))
            await delivery.retry(BUSY_DELAY)
        else:
            await self._claimed(delivery, event, claim)

    async def _claimed(self, delivery: Delivery, event: Event, claim: Claim) -> None:
        started = time.perf_counter()
        try:
            failed = await self._attempt(event, claim)
        except ClaimLostError:
            log.warning("event.claim_lost", worker=self._worker, **_names(event), attempt=claim.attempt)
            await delivery.retry(BUSY_DELAY)
            return
        except asyncio.CancelledError:
            await self._give_back(delivery, event, claim)
            return
        known = {"attempt": claim.attempt, "duration_ms": round((time.perf_counter() - started) * 1000, 1)}
        if failed is None:
            await delivery.ack()
            WORKER_EVENTS.labels(self._worker, "handled").inc()
            log.info("event.handled", worker=self._worker, **_names(event), **known)
        elif failed.failure.code == "rejected" or claim.attempt >= self._settings.max_attempts:
            await self._database.outlast(self._inbox.release, claim, counted=0)
            await self._dead_letter(delivery, failed.failure, **known)
        else:
            await self._retry(delivery, event, claim, failed, **known)

    async def _attempt(self, event: Event, claim: Claim) -> _Failed | None:
        """Runs the handler and its reply. None when the event is finished."""
        if claim.attempt > self._settings.max_attempts:
            reason = f"{claim.attempt - 1} attempts were begun and none ended: the worker's process died in each"
            return _Failed(Failure("attempts_exhausted", reason))
        current_effects.set(claim)
        deadline = asyncio.timeout(self._settings.timeout)
        try:
            async with deadline:
                result = _checked(await self._run(event))
        except ClaimLostError:
            raise
        except Reject as error:
            return _Failed(_failure("rejected", str(error) or "the handler gave no reason"))
        except Retry as error:
            reason = str(error) or "the handler asked for another attempt"
            return _Failed(_failure("attempts_exhausted", reason), error.after)
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            return _Failed(_failure("error", "the handler was cancelled from within", error))
        except Exception as error:  # noqa: BLE001 - whatever an author's code raises is an outcome, with its trace
            if isinstance(error, TimeoutError) and deadline.expired():
                reason = f"the handler ran longer than workers.{self._worker}.timeout, {self._settings.timeout:g} s"
                return _Failed(_failure("timeout", reason, error))
            return _Failed(_failure("error", f"{type(error).__name__}: {error}", error))
        try:
            await self._database.outlast(self._inbox.finish, claim, result)
        except ReplyError as error:
            return _Failed(_failure("error", str(error), error))
        return None

    async def _retry(self, delivery: Delivery, event: Event, claim: Claim, failed: _Failed, **known: object) -> None:
        delay = failed.after if failed.after is not None else backoff(self._settings, claim.attempt)
        await self._database.outlast(self._inbox.release, claim, counted=claim.attempt)
        await delivery.retry(delay)
        WORKER_EVENTS.labels(self._worker, "retried").inc()
        code = failed.failure.code
        log.warning(
            "event.retried",
            worker=self._worker,
            **_names(event),
            **known,
            seconds=round(delay, 3),
            code="retry" if code == "attempts_exhausted" else code,
            reason=failed.failure.reason,
        )

    async def _give_back(self, delivery: Delivery, event: Event, claim: Claim) -> None:
        # One try only: the end of our session, which is near, frees the claim as well.
        try:
            await self._inbox.release(claim, counted=claim.attempt - 1)
        except PgbridgeError as error:
            log.warning("event.unreleased", worker=self._worker, **_names(event), reason=str(error))
        await delivery.give_back()
        log.info("event.given_back", worker=self._worker, **_names(event), attempt=claim.attempt)

    async def _dead_letter(self, delivery: Delivery, failure: Failure, **known: object) -> None:
        await delivery.dead_letter(failure)
        WORKER_EVENTS.labels(self._worker, "dead_lettered").inc()
        log.error(
            "event.dead_lettered",
            worker=self._worker,
            **_names(delivery.event),
            **known,
            code=failure.code,
            reason=failure.reason,
        )


def retry_delays(settings: WorkerSettings) -> list[float]:
    """The ladder of delays between attempts, in seconds: doubling from `retry_initial` up to `retry_max`."""
    delays: list[float] = []
    for rung in range(settings.max_attempts - 1):
        delay = min(settings.retry_initial * 2**rung, settings.retry_max)
        if delays and delay <= delays[-1]:
            break
        delays.append(delay)
    return delays


def backoff(settings: WorkerSettings, attempt: int) -> float:
    """Seconds before the next attempt. Jitter lies below the rung, so that rounding up to a rung keeps the ladder."""
    delays = retry_delays(settings)
    rung = min(attempt, len(delays)) - 1
    lower = delays[rung - 1] if rung else 0.0
    return random.uniform(max(lower, delays[rung] * 0.75), delays[rung])  # noqa: S311 - spreads load, guards nothing


def _names(event: Event | Malformed) -> dict[str, str]:
    return {} if isinstance(event, Malformed) else {"event_id": event.id, "topic": event.topic}


def _checked(result: object) -> Result:
    if result is None:
        return None
    if not isinstance(result, Mapping):
        raise TypeError(f"the handler returned a {type(result).__name__}; a dict or None is wanted")
    json.dumps(dict(result), allow_nan=False)
    return result


def _failure(code: str, reason: str, error: BaseException | None = None) -> Failure:
    trace = "" if error is None else "".join(traceback.format_exception(error))[-_LONGEST_TRACE:]
    return Failure(code, " ".join(reason.split())[:500], trace)
