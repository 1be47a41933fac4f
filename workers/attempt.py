"""One delivery: claim, run the handler, finish with the reply, and settle; or retry; or dead-letter.

What became of an event is in the inbox before the broker is told, and the broker's answer changes nothing of it: an
event that comes again because its delivery could not be settled is settled then, and no handler runs for that. The
inbox's count of attempts decides when to give up, since a broker's counts deliveries that never ran, too.
"""

import asyncio
import math
import random
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

import structlog
from structlog.contextvars import bound_contextvars
from tenacity import wait_random_exponential

from bridge.brokers.contract import Delivery, Failure
from bridge.errors import PgbridgeError, PrivilegeError, RefusedError, TopologyError
from bridge.event import Event, Malformed, trace_fields
from bridge.process.outage import Outage
from bridge.settings import WorkerSettings
from workers.claim import Claim, ClaimLostError
from workers.claimed_effects import Effects, OutageError
from workers.effects import EffectChanged, EffectUnknown, current_effects
from workers.handler import Reject, Result, Retry, Run
from workers.inbox import Inbox
from workers.metrics import ATTEMPT_SECONDS, DELIVERIES, OUTCOMES
from workers.rate import Rate
from workers.reasons import reason_of
from workers.result import ReplyError
from workers.settle import BUSY_DELAY, Settle, names_of, not_ours, tell
from workers.shared_lock import SharedLock
from workers.threads import worker_loop

if TYPE_CHECKING:
    from workers.traced import AttemptSpan, AttemptSpans

log = structlog.get_logger()

OUTAGE_BACKOFF: Final = wait_random_exponential(multiplier=0.1, max=10.0)
"""Seconds between two attempts to reach a server that is gone; drawn at random, since all workers lose it together."""

FIRST_REFUSED_DELAY: Final = 1.0
REFUSED_DELAY: Final = 60.0
"""Least and most seconds until a dead letter that the broker refused is offered to it again: as long as it has refused
them by then. In an ordered worker its key waits for that."""

_FINAL: Final = ("rejected", "unknown_effect", "changed_effect")
"""Codes of failures after which no other attempt would help."""

_LONGEST_TRACE: Final = 16_000
"""Characters of a traceback that travel with a dead letter; the end is kept, where the error is."""


@dataclass(frozen=True, slots=True)
class _Failed:
    failure: Failure
    after: float | None = None
    """Seconds, when the handler asked for a delay."""


Pause = Callable[[float], Awaitable[bool]]
"""Waits for some seconds before another attempt. False where there will be none: the worker stops, or the connection
that brought the delivery has ended."""


class Attempts:
    """Handles the deliveries of one worker; shared by its concurrent tasks."""

    def __init__(
        self, worker: str, settings: WorkerSettings, run: Run, inbox: Inbox, spans: "AttemptSpans | None" = None
    ) -> None:
        """`spans`: what is recorded of events that belong to sampled traces; None for nothing."""
        self._worker = worker
        self._spans = spans
        self._settings = settings
        self._run = run
        self._inbox = inbox
        self.database = Outage("database", OUTAGE_BACKOFF, worker=worker)
        self._rate = None if settings.rate is None else Rate(worker, settings.rate, inbox.rows, self.database)
        self._waiting: set[asyncio.Task[object] | None] = set()
        """Tasks that wait for their turn, by the rate."""
        self._refusal: str | None = None
        self._refused_since = self._refused_at = -math.inf
        """The first and the last refusal of those that go on."""
        self._in_hand: set[str] = set()
        self._handlers = SharedLock()
        self._count = {outcome: DELIVERIES.labels(worker, outcome).inc for outcome in OUTCOMES}
        self._seconds = ATTEMPT_SECONDS.labels(worker)

    @property
    def problems(self) -> tuple[str, ...]:
        """For `/health`: the outage of the database, and that the broker takes no dead letters."""
        return tuple(filter(None, (self.database.problem, self._refusal if self._is_refused else None)))

    @property
    def _is_refused(self) -> bool:
        """After twice the longest delay a letter that was refused has been offered again, if not by us by another
        process."""
        return self._refusal is not None and time.monotonic() < self._refused_at + 2 * REFUSED_DELAY

    async def handle(self, delivery: Delivery, pause: Pause) -> None:
        """Handles one delivery to its end, and settles it. Cancelling it gives the delivery back, without counting an
        attempt, once the handler has ended.

        In an ordered worker what is to be tried again stays in hand, and so holds its key: `pause` says when to go on.

        Every line that is logged meanwhile, also by the handler, names the event's trace.

        Raises what the broker raises that does not take the outcome. The delivery is in hand then until its queue is
        closed; it comes again, and the inbox knows what was done.
        """
        fields = trace_fields(delivery.event)
        with bound_contextvars(**fields) if fields else nullcontext():
            await self._handle(delivery, pause)

    async def _handle(self, delivery: Delivery, pause: Pause) -> None:
        try:
            while (delay := await self._settle(delivery, await self._become(delivery))) is not None:
                if not await pause(delay):
                    await self._settle(delivery, Settle("given_back"))
                    return
        except PgbridgeError as error:
            self._count["unsettled"]()
            log.warning("event.unsettled", worker=self._worker, reason=str(error), **names_of(delivery.event))
            raise

    def crashed(self, error: BaseException) -> None:
        """A task of `handle` ended in a mistake of ours. Its delivery comes again, to this process or to another."""
        self._count["crashed"]()
        log.error("event.crashed", worker=self._worker, exc_info=error)

    async def _become(self, delivery: Delivery) -> Settle:
        """What becomes of the delivery."""
        event = delivery.event
        if isinstance(event, Malformed):
            return Settle("dead_lettered", failure=Failure("malformed", str(event)))
        if event.inbox_id in self._in_hand:
            return Settle("busy", BUSY_DELAY)
        self._in_hand.add(event.inbox_id)
        try:
            return await self._run_once(event, is_new=delivery.attempt == 1 and event.replay is None)
        except ClaimLostError:
            log.warning("event.claim_lost", worker=self._worker, **names_of(event))
            return Settle("busy", BUSY_DELAY)
        except asyncio.CancelledError:
            return Settle("given_back")
        finally:
            self._in_hand.discard(event.inbox_id)

    async def _run_once(self, event: Event, *, is_new: bool) -> Settle:
        """`is_new`: the broker has never delivered it before. Then work without an outside effect needs no claim; what
        was begun before may have killed its process, which only claims tell. In an ordered worker nothing is known to
        be new: it tries again in hand."""
        if self._rate is not None:
            await self._turn(self._rate)
        async with self._handlers.shared():
            if is_new and not (self._settings.effects or self._settings.ordered):
                return await self._claimed(event, Claim(self._worker, event.inbox_id, None, 1))
            claim = await self.database.outlast(self._inbox.claim, event.inbox_id, event.replay, event.key)
            if isinstance(claim, Claim):
                return await self._claimed(event, claim)
        if claim.state == "alone":
            # Its last attempt died with its process. If it kills this one too, nothing else shall die with it.
            async with self._handlers.exclusive():
                claim = await self.database.outlast(self._inbox.claim_alone, event.inbox_id, event.replay, event.key)
                if isinstance(claim, Claim):
                    return await self._claimed(event, claim)
        return not_ours(claim)

    async def _turn(self, rate: Rate) -> None:
        """Before the claim: a process that dies while it waits has begun no attempt."""
        task = asyncio.current_task()
        self._waiting.add(task)
        try:
            await rate.wait()
        finally:
            self._waiting.discard(task)

    def stop_waiting(self) -> None:
        """Gives back what has not begun, since the rate did not let it."""
        for task in self._waiting:
            if task is not None:
                task.cancel()

    async def _claimed(self, event: Event, claim: Claim) -> Settle:
        """Runs an event that is ours, and records what became of it."""
        if self._spans is None or not event.is_sampled:
            return await self._carry_out(event, claim, None)
        with self._spans.attempt(event, claim.attempt) as span:
            settle = await self._carry_out(event, claim, span)
            span.became(settle)
            return settle

    async def _carry_out(self, event: Event, claim: Claim, span: "AttemptSpan | None") -> Settle:
        started = time.perf_counter()
        try:
            ended = await self._attempt(event, claim, span)
        except asyncio.CancelledError:
            await self._unclaim(event, claim)
            raise
        except OutageError:
            if claim.token is not None:
                await self.database.outlast(self._inbox.release, claim, counted=claim.attempt - 1)
            return Settle("given_back", BUSY_DELAY)
        duration = time.perf_counter() - started
        self._seconds.observe(duration)
        if ended == "repeated":
            return Settle("repeated")
        if ended == "finished":
            return Settle("handled", duration=duration, attempt=claim.attempt)
        if claim.token is None:
            # A failure counts, and only a claim counts.
            found = await self.database.outlast(self._inbox.claim, event.inbox_id, event.replay, event.key)
            if not isinstance(found, Claim):
                return not_ours(found)
            claim = found
        failure = replace(ended.failure, attempts=min(claim.attempt, self._settings.max_attempts))
        if failure.code in _FINAL or claim.attempt >= self._settings.max_attempts:
            await self.database.outlast(self._inbox.fail, claim, failure)
            return Settle("dead_lettered", failure=failure, duration=duration, attempt=claim.attempt)
        delay = ended.after if ended.after is not None else backoff(self._settings, claim.attempt)
        await self.database.outlast(self._inbox.release, claim, counted=claim.attempt, delay=delay)
        return Settle("retried", delay, failure, duration, claim.attempt)

    async def _unclaim(self, event: Event, claim: Claim) -> None:
        if claim.token is None:
            return
        # One try only: the end of our session, which is near, frees the claim as well.
        try:
            await self._inbox.release(claim, counted=claim.attempt - 1)
        except PgbridgeError as error:
            log.warning("event.unreleased", worker=self._worker, **names_of(event), reason=str(error))

    async def _attempt(
        self, event: Event, claim: Claim, span: "AttemptSpan | None"
    ) -> _Failed | Literal["finished", "repeated"]:
        """Runs the handler and its reply."""
        if claim.attempt > self._settings.max_attempts:
            reason = f"{claim.attempt - 1} attempts were begun and none ended: the worker's process died in each"
            return _Failed(Failure("attempts_exhausted", reason))
        effects = Effects(self._inbox, claim, self.database, declared=self._settings.effects)
        current_effects.set(effects)
        try:
            result = await self.run_handler(self._run, event, self._settings.timeout)
        except ClaimLostError:
            raise
        except Reject as error:
            return _Failed(_failure("rejected", str(error) or "the handler gave no reason"))
        except EffectUnknown as error:
            return _Failed(_failure("unknown_effect", str(error)))
        except EffectChanged as error:
            return _Failed(_failure("changed_effect", str(error)))
        except Retry as error:
            reason = str(error) or "the handler asked for another attempt"
            return _Failed(_failure("attempts_exhausted", reason), error.after)
        except TimedOutError as error:
            if effects.gave_up_in_outage:
                raise OutageError from error
            reason = f"the handler ran longer than workers.{self._worker}.timeout, {self._settings.timeout:g} s"
            return _Failed(_failure("timeout", reason, error.__cause__))
        except Exception as error:  # noqa: BLE001 - whatever an author's code raises is an outcome, with its trace
            return _Failed(_failure("error", reason_of(error), error))
        try:
            if span is None or self._settings.reply is None:
                return await self.database.outlast(self._inbox.finish, claim, result)
            with span.reply(self._settings.reply) as traceparent:
                return await self.database.outlast(self._inbox.finish, claim, result, traceparent)
        except ReplyError as error:
            return _Failed(_failure("error", str(error), error))

    @staticmethod
    async def run_handler(run: Run, event: Event, limit: float | None) -> Result:
        """Returns or raises what the handler does; TimedOutError, whatever it does after `limit` seconds.

        An attempt is over when its handler has ended, and not when it was told to: no two may run side by side. It runs
        in a task of its own, since what it does with tasks may leave its task looking cancelled (Python 3.11).
        """
        worker_loop.set(asyncio.get_running_loop())
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

    async def _settle(self, delivery: Delivery, settle: Settle) -> float | None:
        """Tells the broker, and says so once it has taken it. None then; else, in an ordered worker, after how many
        seconds it is to be tried again: it stays in hand."""
        delay: float | None = None
        match settle.outcome:
            case "handled" | "repeated":
                await delivery.ack()
            case "dead_lettered" if settle.failure is not None:
                offer_after = await self._dead_letter(delivery, settle.failure)
                if offer_after is not None:
                    return await self._again(delivery, offer_after)
            case "given_back" if not (self._settings.ordered and settle.delay):
                await delivery.give_back()
            case _:
                delay = await self._again(delivery, settle.delay)
        self._count[settle.outcome]()
        tell(self._worker, delivery.event, settle)
        return delay

    async def _again(self, delivery: Delivery, delay: float) -> float | None:
        """What is to be tried again holds its key in an ordered worker: its process keeps it. Else the broker does."""
        if self._settings.ordered:
            return delay
        await delivery.retry(delay)
        return None

    async def _dead_letter(self, delivery: Delivery, failure: Failure) -> float | None:
        """Offers it to the broker. None once it was taken; else after how many seconds to offer it again: no handler
        runs for that."""
        try:
            await delivery.dead_letter(failure)
        except (PrivilegeError, TopologyError):
            raise
        except RefusedError as error:
            self._count["refused"]()
            log.warning("event.letter_refused", worker=self._worker, **names_of(delivery.event), reason=str(error))
            return self._refused(f"worker {self._worker}: the broker takes no dead letter: {error}")
        self._refusal = None
        event = delivery.event
        if isinstance(event, Event):
            await self.database.outlast(self._inbox.forget, event.inbox_id, event.replay)
        return None

    def _refused(self, words: str) -> float:
        """Notes a refusal for `/health`, and says after how many seconds to offer the letter again."""
        now = time.monotonic()
        if not self._is_refused:
            self._refused_since = now
        self._refusal, self._refused_at = words, now
        return min(max(FIRST_REFUSED_DELAY, now - self._refused_since), REFUSED_DELAY)


class TimedOutError(TimeoutError):
    """The handler ran for longer than it may. Its cause is what ended it."""

    def __init__(self, limit: float | None) -> None:
        super().__init__(f"the handler ran longer than {limit:g} s")


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


def _failure(code: str, reason: str, error: BaseException | None = None) -> Failure:
    trace = "" if error is None else "".join(traceback.format_exception(error))[-_LONGEST_TRACE:]
    return Failure(code, " ".join(reason.split())[:500], trace)
