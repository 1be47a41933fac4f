"""What a dead letter carries beside the message: why it was given up, as headers."""

from datetime import UTC, datetime

from workers.queues import Failure

PREFIX = "x-pgbridge-"
"""Begins every header that a queue writes; they are no part of the event."""

ATTEMPTS = f"{PREFIX}attempts"

MAX_REASON = 300
"""Characters; with the other headers but the trace, less than what the NATS sink keeps free for them."""

MAX_TRACE = 8000
"""Characters; the end is kept, since it names the error."""


def letter_headers(worker: str, failure: Failure, attempts: int) -> dict[str, str]:
    """Code, reason, attempts, time and worker of a failure, and its trace where there is one."""
    headers = {
        f"{PREFIX}code": failure.code,
        f"{PREFIX}reason": failure.reason[:MAX_REASON],
        ATTEMPTS: str(attempts),
        f"{PREFIX}failed-at": datetime.now(UTC).isoformat(),
        f"{PREFIX}worker": worker,
    }
    if failure.trace:
        headers[f"{PREFIX}trace"] = failure.trace[-MAX_TRACE:]
    return headers
