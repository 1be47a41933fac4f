"""What a sender asks of the database: claims of what is due, and what came of them. Its SQL is in
``0018_webhooks.sql``."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, LiteralString, NamedTuple

import psycopg
from psycopg.rows import TupleRow

from bridge.postgres.connection import connect, database_errors
from bridge.postgres.pooler import require_own_session
from bridge.process.batching import Batcher
from bridge.settings import PostgresSettings
from workers.pool import Pool
from workers.result import storable

_FUNCTIONS: Final = (
    "bridge.webhook_claim(int, bigint, double precision, bigint[])",
    "bridge.webhook_next()",
    "bridge.webhook_record(bigint[], int[], int[], double precision[], text[], text[], double precision[],"
    " double precision[])",
    "bridge.webhook_backlog()",
    "bridge.webhook_prune(timestamptz, int)",
)
"""All that is called."""

_RECORD: Final = (
    "select delivery, state, endpoint, opened, disabled from bridge.webhook_record(%s::bigint[], %s::int[], %s::int[],"
    " %s::double precision[], %s::text[], %s::text[], %s::double precision[], %s::double precision[])"
)

_CONNECTIONS: Final = 3
"""To claim, to record, and for what is seldom."""

_LIMIT: Final = 30.0
"""Seconds that one statement may take."""

_TOGETHER: Final = 100
"""Most outcomes in one query."""

_LONGEST_ERROR: Final = 1000
"""Characters of an error that are kept."""


class Claimed(NamedTuple):
    """A delivery that is ours to send; `delivery` and `attempt` are the claim."""

    delivery: int
    attempt: int
    event_id: str
    endpoint: int
    url: str
    secrets: Sequence[str]
    """The newest first."""
    body: bytes


class Outcome(NamedTuple):
    """What came of one attempt."""

    delivery: int
    attempt: int
    status: int | None
    """None where no answer came; `error` says why."""
    duration: float
    """Seconds."""
    error: str = ""
    answer: bytes = b""
    retry_after: float | None = None
    """Seconds."""


class Recorded(NamedTuple):
    """What the outcome did."""

    state: Literal["done", "due", "failed", "skipped", "repeated", "late"]
    """See the function webhook_record()."""
    opened: float | None = None
    """For how many seconds it opened the circuit breaker of its endpoint, if it did."""
    disabled: str | None = None
    """Why it disabled its endpoint, if it did."""


class Deliveries:
    """One process's side of the deliveries."""

    def __init__(self, settings: PostgresSettings, worker: str, *, lease: float, schedule: Sequence[float]) -> None:
        """`lease`: seconds after which a claim without an outcome is lost; longer than a request may take.
        `schedule`: seconds from each failed attempt to the next."""
        self._settings = settings
        self._application_name = f"pgbridge-worker deliver {worker}"
        self._lease = lease
        self._schedule = list(schedule)
        self._pool = Pool(settings, self._application_name, size=_CONNECTIONS, limit=_LIMIT)
        self._outcomes = Batcher(self._record_together, _TOGETHER)

    async def open(self) -> None:
        """Connects, and checks that all that is called may be. Raises what `connect` and `Pool.require` raise,
        and RefusedError behind a pooler in transaction mode, where prepared statements get lost."""
        # The pool would not say why it gets no connection.
        connection = await connect(self._settings, self._application_name)
        async with connection:
            await require_own_session(connection, self._settings, self._application_name)
        await self._pool.open()
        await self._pool.require(_FUNCTIONS)

    async def close(self) -> None:
        """Ends the sessions."""
        await self._pool.close()

    async def claim(self, room: int, bytes_room: int, in_hand: Sequence[int]) -> Sequence[Claimed]:
        """At most so many deliveries, of about so many bytes; none of those that the process has `in_hand`, whatever
        became of their leases. Raises as `Pool.rows`."""
        rows = await self._pool.rows(
            "select delivery, attempt, event::text, endpoint, url, secrets, body"
            " from bridge.webhook_claim(%s, %s, %s, %s::bigint[])",
            *(room, bytes_room, self._lease, list(in_hand)),
        )
        return [Claimed._make((*claim, body.encode())) for *claim, body in rows]

    async def next_due(self) -> float | None:
        """Seconds until something is due that may be sent; None where nothing waits. Raises as `Pool.rows`."""
        seconds: float | None = await self._pool.value("select bridge.webhook_next()")
        return seconds

    async def record(self, outcome: Outcome) -> Recorded:
        """Puts it on record; asked again with the same outcome, it says "repeated". Raises as `Pool.rows`."""
        return await self._outcomes.ask(outcome)

    async def _record_together(self, outcomes: Sequence[Outcome]) -> Sequence[Recorded]:
        with database_errors(self._pool.key):
            try:
                rows = await self._record(outcomes, "utf-8")
            except psycopg.errors.UntranslatableCharacter:
                # The database has another encoding, which lacks a character that some endpoint answered.
                rows = await self._record(outcomes, "ascii")
        became: dict[Any, Recorded] = {delivery: Recorded(state, *rest) for delivery, state, _, *rest in rows}
        return [became[outcome.delivery] for outcome in outcomes]

    async def _record(self, outcomes: Sequence[Outcome], encoding: str) -> Sequence[TupleRow]:
        def kept(text: str) -> str:
            return storable(text).encode(encoding, "backslashreplace").decode(encoding)

        query: LiteralString = _RECORD
        return await self._pool.statement(
            query,
            [outcome.delivery for outcome in outcomes],
            [outcome.attempt for outcome in outcomes],
            [outcome.status for outcome in outcomes],
            [outcome.duration for outcome in outcomes],
            [kept(outcome.error[:_LONGEST_ERROR]) for outcome in outcomes],
            [kept(outcome.answer.decode(errors="replace")) for outcome in outcomes],
            [outcome.retry_after for outcome in outcomes],
            self._schedule,
        )

    async def backlog(self) -> tuple[int, int]:
        """How many deliveries are due now or later, and how many circuit breakers are not closed. Raises as
        `Pool.rows`."""
        [(due, open_breakers)] = await self._pool.rows("select due, open_breakers from bridge.webhook_backlog()")
        return due, open_breakers

    async def prune(self, keep: timedelta, chunk: int = 1000) -> int:
        """Deletes what was finished longer than `keep` ago, in chunks; returns how many deliveries that were. Raises as
        `Pool.rows`."""
        before = datetime.now(UTC) - keep
        total = 0
        while True:
            [(deliveries, messages)] = await self._pool.rows(
                "select deliveries, messages from bridge.webhook_prune(%s, %s)", before, chunk
            )
            total += int(deliveries)
            if max(deliveries, messages) < chunk:
                return total
