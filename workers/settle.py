"""What becomes of a delivery: what the broker is told, and then the log."""

from dataclasses import dataclass
from typing import Final, Literal

import structlog

from bridge.brokers.contract import HELD, Failure
from bridge.event import Event, Malformed
from workers.claim import NotNow

log = structlog.get_logger()

BUSY_DELAY: Final = 1.0
"""Seconds until an event that another process has in hand is looked at again."""


@dataclass(frozen=True, slots=True)
class Settle:
    """What to tell the broker, and then the log."""

    outcome: Literal["handled", "repeated", "busy", "early", "retried", "dead_lettered", "given_back"]
    delay: float = 0.0
    """Seconds, for what comes again; what is given back comes again at once, unless it has to keep its place."""
    failure: Failure | None = None
    duration: float | None = None
    """Seconds that the attempt took, where there was one."""
    attempt: int | None = None


def not_ours(claim: NotNow) -> Settle:
    """What becomes of a delivery whose event is not ours to run."""
    match claim:
        case NotNow("finished"):
            return Settle("repeated")
        case NotNow("failed", failure=failure):
            return Settle("dead_lettered", failure=failure)
        case NotNow("early", seconds):
            return Settle("early", seconds)
    return Settle("busy", BUSY_DELAY)


def tell(worker: str, event: Event | Malformed, settle: Settle) -> None:
    fields: dict[str, object] = {"worker": worker, **names_of(event)}
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
            # Nothing is wrong with what waits behind a dead letter of its key, and there may be much of it.
            say = log.warning if settle.failure.code == HELD else log.error
            say("event.dead_lettered", **fields, code=settle.failure.code, reason=settle.failure.reason)
        case "given_back":
            log.info("event.given_back", **fields)
        case outcome:
            log.debug(f"event.{outcome}", **fields)


def names_of(event: Event | Malformed) -> dict[str, str]:
    if isinstance(event, Malformed):
        return {}
    # By the second the inbox knows an event of another program.
    other = {} if event.inbox_id == event.id else {"inbox_id": event.inbox_id}
    return {"event_id": event.id, "topic": event.topic, **other}
