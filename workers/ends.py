"""The end of what a worker ran: its result and its reply, in one transaction.

Ends that are ready together share a transaction, with a reply each in a savepoint of its own, so that one that raises
undoes no other. What is slow must not hold up others: replies that take long run alone, each on a connection of its
own, and a transaction that is shared has little time; whatever did not end well in it is tried again alone.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

import psycopg
import structlog
from psycopg import sql

from bridge.process.batching import Batcher
from bridge.settings import PostgresSettings
from workers.claim import Claim, ClaimLostError
from workers.line import Line
from workers.pool import Pool
from workers.result import ReplyError

log = structlog.get_logger()

TOGETHER: Final = 50
"""Most ends in one transaction: PostgreSQL keeps up to 64 savepoints of one in shared memory, and slows down beyond."""

_TOGETHER_LIMIT: Final = 1.0
"""Seconds that a shared transaction may take: for so long one that waits, as for a lock, can hold up others, once."""

_FAST: Final = 0.005
"""Seconds: replies that take longer in the mean run alone."""

_WEIGHT: Final = 0.2
"""Of the newest time in the mean."""

_CONFLICTS: Final = 5
"""Tries of a transaction that conflicts with another one."""

_TOGETHER: Final = (
    "with ends as materialized (select event, state from bridge.inbox_end("
    "$1, $2, $3, $4, $5::text[]::jsonb[], $6, $7))"
    " select event, state, extract(epoch from clock_timestamp() - statement_timestamp()) from ends"
)

State = Literal["finished", "lost", "repeated", "busy", "alone"]
"""See the function inbox_end()."""


class Ends:
    """Finishes the events of one worker process."""

    def __init__(
        self,
        worker: str,
        settings: PostgresSettings,
        pool: Pool,
        application_name: str,
        *,
        reply: str | None,
        reply_timeout: float,
    ) -> None:
        """`pool` is for those that end alone; `reply` the SQL function that takes results, as two names, and
        `reply_timeout` the seconds that one call of it may take, the limit of the pool's statements."""
        self._worker = worker
        self._pool = pool
        self._reply = reply
        self._reply_timeout = reply_timeout
        self._reply_names = (None, None) if reply is None else tuple(reply.split(".", 1))
        self._alone = _alone(reply)
        self._shared = Line(settings, application_name, limit=min(_TOGETHER_LIMIT, reply_timeout))
        self._batcher = Batcher(self._end_together, TOGETHER)
        self._seconds = 0.0
        """How long a reply takes, in the mean."""

    async def open(self) -> None:
        """See `Line.open`."""
        await self._shared.open()

    async def close(self) -> None:
        """See `Line.close`."""
        await self._shared.close()

    async def end(
        self, claim: Claim, outcome: str | None, traceparent: str | None = None
    ) -> Literal["finished", "repeated"]:
        """Records a result, JSON, and hands it to the reply. Says whether it had been done before.

        Events that the reply emits belong to the trace of `traceparent`. Such a reply runs alone: those that share a
        transaction share its settings.

        Raises ReplyError when PostgreSQL or the reply refuses the result, and nothing of it was stored;
        ClaimLostError; DatabaseUnavailableError (RefusedError on a standby), after which the same call may be made
        again: had the transaction been committed after all, it raises ClaimLostError, and the next claim says
        "finished".
        """
        state: State = "alone"
        if self._seconds < _FAST and traceparent is None:
            state = await self._batcher.ask((claim, outcome))
        if state == "alone":
            state = await self._end_alone(claim, outcome, traceparent)
        match state:
            case "finished" | "repeated":
                return state
            case _:
                raise ClaimLostError

    async def _end_together(self, ends: Sequence[tuple[Claim, str | None]]) -> Sequence[State]:
        # In one order in every process, so that no two wait for each other.
        in_order = sorted(ends, key=lambda end: end[0].event_id)
        try:
            rows = await self._shared.statement(
                _TOGETHER,
                self._worker,
                [claim.event_id for claim, _ in in_order],
                [claim.token for claim, _ in in_order],
                [claim.attempt for claim, _ in in_order],
                [outcome for _, outcome in in_order],
                *self._reply_names,
            )
        except psycopg.errors.QueryCanceled:
            # One slow reply in a shared transaction is one too many.
            self._seconds = _TOGETHER_LIMIT
        except psycopg.Error as error:
            # One of them cannot be read as JSON, or the commit was refused; which one, each will hear alone.
            log.debug("inbox.ends_apart", worker=self._worker, events=len(ends), reason=said(error))
        else:
            self._took(float(rows[0][2] or 0.0) / len(ends))
            states: dict[Any, Any] = {event: state for event, state, _ in rows}
            return [states[claim.event_id] for claim, _ in ends]
        return ["alone"] * len(ends)

    async def _end_alone(self, claim: Claim, outcome: str | None, traceparent: str | None) -> State:
        conflicts = 0
        while True:
            try:
                [(state, seconds)] = await self._pool.statement(self._alone, *claim.fence, outcome, traceparent)
            except (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected) as error:
                conflicts += 1
                if conflicts == _CONFLICTS:
                    raise self._refused(error) from error
            except psycopg.Error as error:
                raise self._refused(error) from error
            else:
                self._took(seconds)
                ended: State = state
                return ended

    def _took(self, seconds: float) -> None:
        self._seconds += _WEIGHT * (seconds - self._seconds)

    def _refused(self, error: psycopg.Error) -> ReplyError:
        where = self._reply or "the inbox"
        if isinstance(error, psycopg.errors.QueryCanceled):
            limit = f"workers.{self._worker}.reply_timeout, {self._reply_timeout:g} s"
            return ReplyError(f"{where} ran longer than {limit}, or was cancelled: {said(error)}")
        return ReplyError(f"{where} refuses the result: {said(error)}")


def said(error: psycopg.Error) -> str:
    """PostgreSQL's message in one line, with the SQLSTATE."""
    return f"{' '.join((error.diag.message_primary or str(error)).split())} (SQLSTATE {error.sqlstate})"


def _alone(reply: str | None) -> sql.Composed:
    """Finishes one event and calls the reply in one statement, so in one transaction and one round trip: CASE calls the
    reply only after the inbox has said that the event is ours to finish, and its trace is set for this statement."""
    call: sql.Composable = sql.SQL("null::bigint")
    if reply is not None:
        call = sql.SQL("(select count(*) from (select {}(ended.event, ended.outcome)) as reply)").format(
            sql.Identifier(*reply.split(".", 1))
        )
    return sql.SQL(
        "with given as materialized (select"
        " %s::text as worker, %s::uuid as event, %s::bigint as token, %s::int as attempt, %s::jsonb as outcome,"
        " %s::text as trace),"
        " ended as materialized (select event, outcome, trace, case"
        " when token is null then bridge.inbox_finish_unclaimed(worker, event, outcome)"
        " when bridge.inbox_finish(worker, event, token, attempt, outcome) then 'finished'"
        " else 'lost' end as state from given),"
        " replied as materialized (select state, case when state = 'finished'"
        " and (trace is null or pg_catalog.set_config('bridge.traceparent', trace, true) = trace) then {} end"
        " from ended)"
        " select state, extract(epoch from clock_timestamp() - statement_timestamp())::float8 from replied"
    ).format(call)
