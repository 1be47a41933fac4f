"""How a dead letter says why it was given up: headers beside those of the message, the same on every broker.

A queue writes them with `letter_headers` when it moves a message to its worker's dead letters; `letter_of` reads them
when the dead letters are shown. Both know only names and texts: how a broker holds headers is that broker's matter.
"""

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Final, TypeVar

from bridge.brokers.contract import Failure, Letter, Order
from bridge.event import Event, Malformed

PREFIX: Final = "x-pgbridge-"
"""Begins the name of every header that a queue writes. Such headers are not part of the event."""

ATTEMPTS: Final = f"{PREFIX}attempts"
"""How often the handler ran before the event was given up; of what never ran, how often it was delivered."""

MAX_REASON: Final = 300
"""Characters. With the other headers, but not the trace, it fits into the room that sinks keep free for a letter."""

MAX_TRACE: Final = 8000
"""Characters; the end is kept, since it names the error."""

_LONGEST_COUNT: Final = 10
"""Digits from which a number of attempts is none that we wrote."""


def letter_headers(worker: str, failure: Failure, attempts: int) -> dict[str, str]:
    """Code, reason, attempts, time and worker of a failure, and its trace where there is one.

    `attempts` are the deliveries that the broker has counted, for a failure that does not know its own attempts.
    """
    headers = {
        f"{PREFIX}code": failure.code,
        f"{PREFIX}reason": failure.reason[:MAX_REASON],
        ATTEMPTS: str(failure.attempts or attempts),
        f"{PREFIX}failed-at": datetime.now(UTC).isoformat(),
        f"{PREFIX}worker": worker,
    }
    if failure.trace:
        headers[f"{PREFIX}trace"] = failure.trace[-MAX_TRACE:]
    return headers


def letter_of(
    worker: str,
    sink: str,
    event: Event | Malformed,
    message_id: str,
    marks: Mapping[str, str],
    payload: bytes,
    content_type: str | None,
) -> Letter:
    """The letter that a message and its ``x-pgbridge-...`` headers make; `message_id` names a message without event."""
    known = event if isinstance(event, Event) else None
    attempts = marks.get(ATTEMPTS, "0")
    return Letter(
        id=f"{worker}:{known.id if known else message_id}",
        box=worker,
        event_id=known.id if known else None,
        topic=known.topic if known else None,
        key=known.key if known else None,
        sink=sink,
        code=marks.get(f"{PREFIX}code", "unknown"),
        reason=marks.get(f"{PREFIX}reason", ""),
        attempts=int(attempts) if attempts.isdecimal() and len(attempts) < _LONGEST_COUNT else 0,
        failed_at=_time(marks.get(f"{PREFIX}failed-at")),
        payload=payload,
        content_type=known.content_type if known else content_type,
        created_at=known.time if known else None,
        headers=known.headers if known else {},
        trace=marks.get(f"{PREFIX}trace", ""),
        inbox_id=known.inbox_id if known else None,
    )


M = TypeVar("M")


async def in_order(found: AsyncIterator[tuple[M, Letter]], order: Order | None) -> AsyncIterator[tuple[M, Letter]]:
    """Messages with their letters as they are found; where there is an `order`, all of them first, and then in that."""
    if order is None:
        async for each in found:
            yield each
    else:
        for each in sorted([each async for each in found], key=lambda each: order(each[1])):
            yield each


def _time(text: str | None) -> datetime | None:
    try:
        at = datetime.fromisoformat(text) if text else None
    except ValueError:
        return None
    return at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at
