"""One delivery: claim, run the handler, finish with the reply, and settle; or retry; or dead-letter.

What became of an event is in the inbox before the broker is told, and the broker's answer changes nothing of it: an
event that comes again because its delivery could not be settled is settled then, and no handler runs for that. The
inbox's count of attempts decides when to give up, since a broker's counts deliveries that never ran, too.
"""

import asyncio
import contextlib
import math
import random
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import structlog
from tenacity import wait_random_exponential

from bridge.brokers.contract import Delivery, Failure
from bridge.errors import PgbridgeError, PrivilegeError, RefusedError, TopologyError
from bridge.event import Event, Malformed
from bridge.process.outage import Outage
from bridge.settings import WorkerSettings
from workers.effects import Effect, current_effects
from workers.handler import Reject, Result, Retry, Run
from workers.inbox import Claim, ClaimLostError, Inbox, NotNow, ReplyError
from workers.metrics import ATTEMPT_SECONDS, DELIVERIES, OUTCOMES
from workers.shared_lock import SharedLock

log = structlog.get_logger()

OUTAGE_BACKOFF: Final = wait_random_exponential(multiplier=0.1, max=10.0)
"""Seconds between two attempts to reach a server that is gone; drawn at random, since all workers lose it together."""

BUSY_DELAY: Final = 1.0
"""Seconds until an event that another process has in hand is looked at again."""

REFUSED_DELAY: Final = 60.0
"""Seconds until a dead letter that the broker refused is offered to it again."""

_LONGEST_TRACE: Final = 16_000
"""Characters of a traceback that travel with a dead letter; the end is kept, where the error is."""


@dataclass(frozen=True, slots=True)
class _Settle:
    """What to tell the broker, and then the log."""

    outcome: Literal["handled", "repeated", "busy", "early", "retried", "dead_lettered", "given_back"]
    delay: float = 0.0
    """Seconds, for what comes again."""
    failure: Failure | None = None
    duration: float | None = None
    """Seconds that the attempt took, where there was one."""
    attempt: int | None = None


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
        self.database = Outage("database", OUTAGE_BACKOFF, worker=worker)
        self._refusal: str | None = None
        self._refused_at = -math.inf
        self._in_hand: set[str] = set()
        self._handlers = SharedLock()
        self._count = {outcome: DELIVERIES.labels(worker, outcome).inc for outcome in OUTCOMES}
        self._seconds = ATTEMPT_SECONDS.labels(worker)

    @property
    def problems(self) -> tuple[str, ...]:
        """For `/health`: the outage of the database, and that the broker takes no dead letters."""
        # After twice the delay a letter that was refused has been offered again, if not by us by another process.
        refusal = self._refusal if time.monotonic() < self._refused_at + 2 * REFUSED_DELAY else None
        return tuple(filter(None, (self.database.problem, refusal)))

    async def handle(self, delivery: Delivery) -> None:
        """Handles one delivery to its end, and settles it. Cancelling it gives the delivery back, without counting an
        attempt, once the handler has ended.

        Raises what the broker raises that does not take the outcome. The delivery is in hand then until its queue is
        closed; it comes again, and the inbox knows what was done.
        """
        try:
            await self._settle(delivery, await self._become(delivery))
        except PgbridgeError as error:
            self._count["unsettled"]()
            log.warning("event.unsettled", worker=self._worker, reason=str(error), **_names(delivery.event))
            raise

    def crashed(self, error: BaseException) -> None:
        """A task of `handle` ended in a mistake of ours. Its delivery comes again, to this process or to another."""
        self._count["crashed"]()
        log.error("event.crashed", worker=self._worker, exc_info=error)

    async def _become(self, delivery: Delivery) -> _Settle:
        """What becomes of the delivery."""
        event = delivery.event
        if isinstance(event, Malformed):
            return _Settle("dead_lettered", failure=Failure("malformed", str(event)))
        if event.inbox_id in self._in_hand:
            return _Settle("busy", BUSY_DELAY)
        self._in_hand.add(event.inbox_id)
        try:
            return await self._run_once(event)
        except ClaimLostError:
            log.warning("event.claim_lost", worker=self._worker, **_names(event))
            return _Settle("busy", BUSY_DELAY)
        except asyncio.CancelledError:
            return _Settle("given_back")
        finally:
            self._in_hand.discard(event.inbox_id)

    async def _run_once(self, event: Event) -> _Settle:
        async with self._handlers.shared():
            claim = await self.database.outlast(self._inbox.claim, event.inbox_id, event.replay)
            if isinstance(claim, Claim):
                return await self._claimed(event, claim)
        if claim.state == "alone":
            # Its last attempt died with its process. If it kills this one too, nothing else shall die with it.
            async with self._handlers.exclusive():
                claim = await self.database.outlast(self._inbox.claim_alone, event.inbox_id, event.replay)
                if isinstance(claim, Claim):
                    return await self._claimed(event, claim)
        match claim:
            case NotNow("finished"):
                return _Settle("repeated")
            case NotNow("failed", failure=failure):
                return _Settle("dead_lettered", failure=failure)
            case NotNow("early", seconds):
                return _Settle("early", seconds)
        return _Settle("busy", BUSY_DELAY)

    async def _claimed(self, event: Event, claim: Claim) -> _Settle:
        """Runs an event that is ours, and records what became of it."""
        started = time.perf_counter()
        try:
            failed = await self._attempt(event, claim)
        except asyncio.CancelledError:
            await self._unclaim(event, claim)
            raise
        except _OutageError:
            await self.database.outlast(self._inbox.release, claim, counted=claim.attempt - 1)
            return _Settle("given_back")
        duration = time.perf_counter() - started
        self._seconds.observe(duration)
        if failed is None:
            return _Settle("handled", duration=duration, attempt=claim.attempt)
        failure = replace(failed.failure, attempts=min(claim.attempt, self._settings.max_attempts))
        if failure.code == "rejected" or claim.attempt >= self._settings.max_attempts:
            await self.database.outlast(self._inbox.fail, claim, failure)
            return _Settle("dead_lettered", failure=failure, duration=duration, attempt=claim.attempt)
        delay = failed.after if failed.after is not None else backoff(self._settings, claim.attempt)
        await self.database.outlast(self._inbox.release, claim, counted=claim.attempt, delay=delay)
        return _Settle("retried", delay, failure, duration, claim.attempt)

    async def _unclaim(self, event: Event, claim: Claim) -> None:
        # One try only: the end of our session, which is near, frees the claim as well.
        try:
            await self._inbox.release(claim, counted=claim.attempt - 1)
        except PgbridgeError as error:
            log.warning("event.unreleased", worker=self._worker, **_names(event), reason=str(error))

    async def _attempt(self, event: Event, claim: Claim) -> _Failed | None:
        """Runs the handler and its reply. None when the event is finished."""
        if claim.attempt > self._settings.max_attempts:
            reason = f"{claim.attempt - 1} attempts were begun and none ended: the worker's process died in each"
            return _Failed(Failure("attempts_exhausted", reason))
        effects = _Effects(self._inbox, claim, self.database)
        current_effects.set(effects)
        try:
            result = await self.run_handler(self._run, event, self._settings.timeout)
        except ClaimLostError:
            raise
        except Reject as error:
            return _Failed(_failure("rejected", str(error) or "the handler gave no reason"))
        except Retry as error:
            reason = str(error) or "the handler asked for another attempt"
            return _Failed(_failure("attempts_exhausted", reason), error.after)
        except TimedOutError as error:
            if effects.gave_up_in_outage:
                raise _OutageError from error
            reason = f"the handler ran longer than workers.{self._worker}.timeout, {self._settings.timeout:g} s"
            return _Failed(_failure("timeout", reason, error.__cause__))
        except Exception as error:  # noqa: BLE001 - whatever an author's code raises is an outcome, with its trace
            return _Failed(_failure("error", f"{type(error).__name__}: {error}", error))
        try:
            await self.database.outlast(self._inbox.finish, claim, result)
        except ReplyError as error:
            return _Failed(_failure("error", str(error), error))
        return None

    @staticmethod
    async def run_handler(run: Run, event: Event, limit: float | None) -> Result:
        """Returns or raises what the handler does; TimedOutError, whatever it does after `limit` seconds.

        An attempt is over when its handler has ended, and not when it was told to: no two may run side by side. It runs
        in a task of its own, since what it does with tasks may leave its task looking cancelled (Python 3.11).
        """
        running = asyncio.ensure_future(run(event))
        try:
            in_time, _ = await asyncio.wait([running], timeout=limit)
        finally:
            await _end(running)
        try:
            result = running.result()
        except asyncio.CancelledError as error:
            if in_time:
                raise RuntimeError("the handler was cancelled from within") from error
            raise TimedOutError(limit) from error
        except Exception as error:
            if in_time:
                raise
            raise TimedOutError(limit) from error
        if not in_time:
            raise TimedOutError(limit)
        return result

    async def _settle(self, delivery: Delivery, settle: _Settle) -> None:
        """Tells the broker, and says so once it has taken it."""
        match settle.outcome:
            case "handled" | "repeated":
                await delivery.ack()
            case "busy" | "early" | "retried":
                await delivery.retry(settle.delay)
            case "given_back":
                await delivery.give_back()
            case "dead_lettered" if settle.failure is not None:
                if not await self._dead_letter(delivery, settle.failure):
                    return
        self._count[settle.outcome]()
        _tell(self._worker, delivery.event, settle)

    async def _dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """Offers it to the broker, and says whether it was taken. One that is refused comes again later, and no handler
        runs for that."""
        try:
            await delivery.dead_letter(failure)
        except (PrivilegeError, TopologyError):
            raise
        except RefusedError as error:
            self._count["refused"]()
            self._refusal = f"worker {self._worker}: the broker takes no dead letter: {error}"
            self._refused_at = time.monotonic()
            log.warning("event.letter_refused", worker=self._worker, **_names(delivery.event), reason=str(error))
            await delivery.retry(REFUSED_DELAY)
            return False
        self._refusal = None
        event = delivery.event
        if isinstance(event, Event):
            await self.database.outlast(self._inbox.forget, event.inbox_id, event.replay)
        return True


class TimedOutError(TimeoutError):
    """The handler ran for longer than it may. Its cause is what ended it."""

    def __init__(self, limit: float | None) -> None:
        super().__init__(f"the handler ran longer than {limit:g} s")


class _OutageError(Exception):
    """The handler ran for longer than it may since the database was gone, which is no fault of its own."""


@dataclass(slots=True)
class _Effects:
    """The effects of one attempt. An outage of the database is waited out, as long as the handler may run."""

    inbox: Inbox
    claim: Claim
    database: Outage
    gave_up_in_outage: bool = False
    """Whether the handler's time was up while it waited for the database."""

    async def begin_effect(self, operation: str) -> Effect:
        """See `effects.EffectStore`."""
        with self._waiting():
            return await self.database.outlast(self.inbox.begin_effect, self.claim, operation)

    async def end_effect(self, effect: Effect) -> None:
        """See `effects.EffectStore`."""
        with self._waiting():
            await self.database.outlast(self.inbox.end_effect, self.claim, effect)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except asyncio.CancelledError:
            self.gave_up_in_outage = self.database.lasts
            raise


async def _end(task: asyncio.Future[Result]) -> None:
    """Cancels it, and returns once it has ended, however long it takes over that."""
    task.cancel()
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if not task.cancelled():
        task.exception()  # else asyncio would complain that nobody has looked at it
    if cancelled:
        raise asyncio.CancelledError


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


def _tell(worker: str, event: Event | Malformed, settle: _Settle) -> None:
    fields: dict[str, object] = {"worker": worker, **_names(event)}
    if settle.attempt is not None:
        fields["attempt"] = settle.attempt
    if settle.duration is not None:
        fields["duration_ms"] = round(settle.duration * 1000, 1)
    match settle.outcome:
        case "handled":
            log.info("event.handled", **fields)
        case "retried" if settle.failure is not None:
            code = settle.failure.code
            log.warning(
                "event.retried",
                **fields,
                seconds=round(settle.delay, 3),
                code="retry" if code == "attempts_exhausted" else code,
                reason=settle.failure.reason,
            )
        case "dead_lettered" if settle.failure is not None:
            log.error("event.dead_lettered", **fields, code=settle.failure.code, reason=settle.failure.reason)
        case "given_back":
            log.info("event.given_back", **fields)
        case outcome:
            log.debug(f"event.{outcome}", **fields)


def _names(event: Event | Malformed) -> dict[str, str]:
    if isinstance(event, Malformed):
        return {}
    # By the second the inbox knows an event of another program.
    other = {} if event.inbox_id == event.id else {"inbox_id": event.inbox_id}
    return {"event_id": event.id, "topic": event.topic, **other}


def _failure(code: str, reason: str, error: BaseException | None = None) -> Failure:
    trace = "" if error is None else "".join(traceback.format_exception(error))[-_LONGEST_TRACE:]
    return Failure(code, " ".join(reason.split())[:500], trace)
