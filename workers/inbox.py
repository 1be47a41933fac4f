"""The ledger that makes a worker's database effects exactly-once; its SQL is in ``0005_inbox.sql``,
``0010_inbox_outcomes.sql`` to ``0012_together.sql``, ``0014_holds.sql`` to ``0016_effects.sql``.

Claims carry the token of the process' session (``session.py``) and die with it, so after a crash another process takes
over at once. A claim is made only while the token's lock is held, and finishing one checks that it is still ours.
What is asked for at the same time, claims, ends and failures, shares a query: a query each was half of what a worker
cost.

The inbox of a worker that holds keys stores with a final failure that its key is held, in one transaction, so that
nothing behind it can be claimed, whatever becomes of the process before the broker has the letter.
"""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, LiteralString, NamedTuple

import structlog
from psycopg.rows import TupleRow

from bridge.brokers.contract import Failure
from bridge.errors import DatabaseUnavailableError, PrivilegeError, SchemaError
from bridge.postgres.pause import Pause
from bridge.process.batching import Batcher
from bridge.settings import PostgresSettings
from workers.claim import Claim, ClaimLostError, NotNow
from workers.effects import Effect, Recorded
from workers.ends import Ends
from workers.handler import Result
from workers.line import Line
from workers.pool import Pool
from workers.result import outcome_text, recordable, storable
from workers.session import ClaimSession

log = structlog.get_logger()

_FUNCTIONS: Final = (
    "bridge.inbox_claim(text, uuid[], text[], bigint, bigint[], double precision[], boolean)",
    "bridge.inbox_claim_holding(text, uuid[], text[], text[], bigint, bigint[], double precision[], boolean)",
    "bridge.inbox_finish(text, uuid, bigint, int, jsonb)",
    "bridge.inbox_finish_unclaimed(text, uuid, jsonb)",
    "bridge.inbox_finish_together(text, uuid[], bigint[], int[], jsonb[])",
    "bridge.inbox_end(text, uuid[], bigint[], int[], jsonb[], text, text)",
    "bridge.inbox_give_up(text, uuid[], bigint[], int[], int[], double precision[], jsonb[])",
    "bridge.inbox_give_up_holding(text, uuid[], bigint[], int[], int[], double precision[], jsonb[], text[])",
    "bridge.inbox_forget(text, uuid, text)",
    "bridge.inbox_effect_begin(text, uuid, bigint, int, text, jsonb)",
    "bridge.inbox_effect_again(text, uuid, bigint, int, text, text, jsonb)",
    "bridge.inbox_effect_end(text, uuid, bigint, int, text, jsonb)",
    "bridge.inbox_prune(text, timestamptz, int)",
    "bridge.held_keys(text)",
    "bridge.worker_pause(text)",
    "bridge.store_worker_sample(text, double precision, jsonb, jsonb, double precision)",
    "bridge.rate_take(text, int, double precision, double precision)",
)
"""All that is called."""
_TOGETHER: Final = 100
"""Most events in one query."""
_LONGEST_MARK: Final = 100
"""Characters of a replay's mark that tell it from others; ours have 36."""
_OTHERS: Final = 1
"""Connections beside those on which replies run, so that slow ones keep no claim from being given up."""


class _Wanted(NamedTuple):
    """An event that is to be claimed."""

    event_id: str
    replay: str | None
    key: str | None


class _GivenUp(NamedTuple):
    """A claim that ends without a result: for a while, or for good where there is a failure."""

    claim: Claim
    counted: int = 0
    delay: float = 0.0
    failure: str | None = None
    """As JSON."""


class Inbox:
    """One worker process's side of the ledger. `reply` is the SQL function that takes results, as two names."""

    def __init__(
        self,
        worker: str,
        settings: PostgresSettings,
        *,
        concurrency: int,
        reply: str | None = None,
        reply_timeout: float = 30.0,
        backoff: Sequence[float] = (1.0,),
        holds: bool = False,
    ) -> None:
        """`reply_timeout` in seconds; `backoff` are the seconds before each attempt after the first, for one whose
        last attempt died with its process. `holds`: what is given up for good holds its key."""
        self.worker = worker
        application_name = f"pgbridge-worker {worker}"
        self._key = settings.key("dsn")
        self._reply_name = reply
        self._backoff = list(backoff) or [1.0]
        self._holds = holds
        self._concurrency = concurrency
        self._is_full: Callable[[], bool] = lambda: False
        self._pool = Pool(settings, application_name, size=concurrency + _OTHERS, limit=reply_timeout)
        self._line = Line(settings, application_name, limit=reply_timeout)
        self._session = ClaimSession(settings, application_name)
        self._claims = Batcher(self._claim_together, _TOGETHER, enough=self._enough)
        self._given_up = Batcher(self._give_up_together, _TOGETHER)
        self._ends = Ends(worker, settings, self._pool, application_name, reply=reply, reply_timeout=reply_timeout)

    async def open(self) -> None:
        """Connects, and checks that the schema and the reply function are there and may be used.

        Raises what `bridge.postgres.connection.connect` raises, SchemaError, and RefusedError behind a pooler.
        """
        await self._session.renew(instead_of=self._session.token)
        await self._pool.open()
        await self._line.open()
        await self._ends.open()
        # All at the start, since most of these are first called when something goes wrong.
        await self._pool.require(_FUNCTIONS)
        if self._reply_name is not None:
            await self._check_reply(self._reply_name)

    async def close(self) -> None:
        """Ends the sessions; claims that are still open become free for other processes."""
        await self._ends.close()
        await self._line.close()
        await self._pool.close()
        await self._session.close()

    def gather_claims(self, is_full: Callable[[], bool]) -> None:
        """While `is_full`, which is while as much runs as may, and events wait for that anyway, a claim of few waits a
        moment for more. Without it, events that fall out of step, as a retry does, stay so, and end in queries of a few
        events each: with ten failing keys a worker's query had 12 instead of 32, for a third more processor time.

        Few is less than three quarters of what may run: half of it let two halves go on beside each other (18 events a
        query), and all of it makes every claim wait where a single handler is slow."""
        self._is_full = is_full

    def _enough(self) -> int:
        return self._concurrency * 3 // 4 if self._is_full() else 1

    async def beat(self) -> None:
        """Shows PostgreSQL that this process lives, and learns whether PostgreSQL does. To be called every
        `session.HEARTBEAT` seconds; without it, PostgreSQL frees the claims.

        Takes a new token where the session has ended. Raises what `ClaimSession.renew` raises.
        """
        token = self._session.token
        try:
            await self._session.beat()
        except DatabaseUnavailableError:
            await self._session.renew(instead_of=token)

    async def claim(self, event_id: str, replay: str | None = None, key: str | None = None) -> Claim | NotNow:
        """Claims an event, which this process must not have in hand. `replay` is the mark of the one that brought it,
        `key` the event's own. Where an inbox holds keys and another event holds this one, the answer is "failed".

        Raises DatabaseUnavailableError, or another PgbridgeError when PostgreSQL refuses.
        """
        return await self._claims.ask(self._wanted(event_id, replay, key))

    async def claim_alone(self, event_id: str, replay: str | None = None, key: str | None = None) -> Claim | NotNow:
        """The same for an event that `claim` said is to run alone, once nothing else runs."""
        [claim] = await self._claim_together([self._wanted(event_id, replay, key)], alone=True)
        return claim

    def _wanted(self, event_id: str, replay: str | None, key: str | None) -> _Wanted:
        return _Wanted(event_id, _mark(replay), storable(key) if self._holds and key else None)

    async def _claim_together(self, events: Sequence[_Wanted], *, alone: bool = False) -> Sequence[Claim | NotNow]:
        # In one order in every process, so that no two wait for each other.
        in_order = sorted(events, key=lambda event: event.event_id)
        ids = [event.event_id for event in in_order]
        replays = [event.replay for event in in_order]
        while True:
            token = self._session.token
            how = (token, list(self._session.former), self._backoff, alone)
            if self._holds:
                rows = await self._line.rows(
                    "select event, state, attempt, seconds, failure from bridge.inbox_claim_holding("
                    "$1, $2, $3, $4, $5, $6, $7, $8)",
                    *(self.worker, ids, replays, [event.key for event in in_order], *how),
                )
            else:
                rows = await self._line.rows(
                    "select event, state, attempt, seconds, failure from bridge.inbox_claim("
                    "$1, $2, $3, $4, $5, $6, $7)",
                    *(self.worker, ids, replays, *how),
                )
            if rows[0][1] != "unheld":
                break
            # Our session ended unnoticed, and its claims with it.
            await self._session.renew(instead_of=token)
        standing = {event_id: how for event_id, *how in rows}
        return [self._standing(event, token, *standing[event.event_id]) for event in events]

    def _standing(
        self,
        event: _Wanted,
        token: int,
        state: Any,
        attempt: str | None,
        seconds: str | None,
        failure: str | None,
    ) -> Claim | NotNow:
        attempts = int(attempt or 0)
        if state == "claimed":
            return Claim(self.worker, event.event_id, token, attempts, event.key)
        # Where it does not tell its attempts, as older versions did not, they are those of the claim.
        told = None if failure is None else Failure(**{"attempts": attempts, **json.loads(failure)})
        return NotNow(state, float(seconds or 0.0), told)

    async def finish(
        self, claim: Claim, result: Result, traceparent: str | None = None
    ) -> Literal["finished", "repeated"]:
        """Records the result and hands it to the reply function, in one transaction; events that it emits belong to the
        trace of `traceparent`.

        Raises ReplyError when the result is no JSON object or the reply function refuses (the claim stays ours: release
        it), and what else `Ends.end` raises.
        """
        return await self._ends.end(claim, outcome_text(result), traceparent)

    async def release(self, claim: Claim, *, counted: int, delay: float = 0.0) -> None:
        """Gives the claim up with `counted` attempts on record, for `delay` seconds; one that was lost is gone already.

        Raises DatabaseUnavailableError, or another PgbridgeError when PostgreSQL refuses.
        """
        await self._given_up.ask(_GivenUp(claim, counted, delay))

    async def fail(self, claim: Claim, failure: Failure) -> None:
        """Gives the event up: until `forget` it never runs again, and every claim says so. Where the inbox holds keys,
        it holds its own until a replay of it is finished.

        Raises ClaimLostError, also where an earlier call was committed and its answer lost, and as `release`.
        """
        told = {"code": failure.code, "reason": failure.reason, "trace": failure.trace}
        attempts = {"attempts": failure.attempts} if failure.attempts else {}
        text = json.dumps({name: storable(value) for name, value in told.items()} | attempts)
        if not await self._given_up.ask(_GivenUp(claim, failure=text)):
            raise ClaimLostError

    async def _give_up_together(self, ends: Sequence[_GivenUp]) -> Sequence[bool]:
        in_order = sorted(ends, key=lambda end: end.claim.event_id)
        columns = (
            [end.claim.event_id for end in in_order],
            [end.claim.token for end in in_order],
            [end.claim.attempt for end in in_order],
            [end.counted for end in in_order],
            [end.delay for end in in_order],
            [end.failure for end in in_order],
        )
        if self._holds:
            given_up = await self._pool.rows(
                "select bridge.inbox_give_up_holding(%s, %s::uuid[], %s::bigint[], %s::int[], %s::int[],"
                " %s::double precision[], %s::text[]::jsonb[], %s::text[])::text",
                *(self.worker, *columns, [end.claim.key for end in in_order]),
            )
        else:
            given_up = await self._pool.rows(
                "select bridge.inbox_give_up(%s, %s::uuid[], %s::bigint[], %s::int[], %s::int[],"
                " %s::double precision[], %s::text[]::jsonb[])::text",
                *(self.worker, *columns),
            )
        ours = {event for (event,) in given_up}
        return [end.claim.event_id in ours for end in ends]

    async def forget(self, event_id: str, replay: str | None = None) -> None:
        """The dead letter of an event that was given up is with the broker: from now on only a new replay starts it
        afresh. `replay` as for the `claim` that led to it. Raises as `release`."""
        await self._pool.value("select bridge.inbox_forget(%s, %s, %s)", self.worker, event_id, _mark(replay))

    async def begin_effect(self, claim: Claim, operation: str, given: Recorded | None) -> Effect[Recorded]:
        """See `effects.EffectStore`. Raises ClaimLostError, and as `release`."""
        query: LiteralString = "select bridge.inbox_effect_begin(%s, %s, %s, %s, %s, %s)"
        return _effect(operation, await self._pool.value(query, *claim.fence, operation, _text(given)))

    async def begin_effect_again(
        self, claim: Claim, effect: Effect[Recorded], given: Recorded | None
    ) -> Effect[Recorded]:
        """See `effects.EffectStore`. Raises ClaimLostError, and as `release`."""
        query: LiteralString = "select bridge.inbox_effect_again(%s, %s, %s, %s, %s, %s, %s)"
        names = (effect.operation, effect.idempotency_key)
        return _effect(effect.operation, await self._pool.value(query, *claim.fence, *names, _text(given)))

    async def end_effect(self, claim: Claim, effect: Effect[Recorded]) -> None:
        """See `effects.EffectStore`. A result that jsonb does not take is recorded as nearly as it does, and said in
        the log. Raises ClaimLostError, and as `release`."""
        text, changed = recordable(effect.result or {})
        if changed:
            log.warning("effect.result_changed", worker=self.worker, key=effect.idempotency_key, reason=changed)
        query: LiteralString = "select bridge.inbox_effect_end(%s, %s, %s, %s, %s, %s::jsonb)"
        if not await self._pool.value(query, *claim.fence, effect.operation, text):
            raise ClaimLostError

    async def rows(self, query: LiteralString, *parameters: object) -> list[TupleRow]:
        """See `Pool.rows`; for what else a worker asks of its database."""
        return await self._pool.rows(query, *parameters)

    async def held_keys(self) -> int:
        """How many keys dead letters of this worker hold. Raises as `release`."""
        count: int = await self._pool.value("select bridge.held_keys(%s)", self.worker)
        return count

    async def pause(self) -> str | None:
        """Since when, by whom and why the worker is paused; None while it is not. Raises as `release`."""
        rows = await self._pool.rows("select since, who, why from bridge.worker_pause(%s)", self.worker)
        return Pause(*rows[0]).words if rows else None

    async def store_sample(self, covered: float, counts: str, levels: str, phase: float) -> tuple[bool, float]:
        """Stores a sample of `covered` seconds for charts, two objects of numbers as JSON. False where there are as
        many names as there may be; and the seconds until the next is due, which `phase`, 0 to 1, tells apart. Raises
        as `release`."""
        query: LiteralString = (
            "select left_out, next_in from bridge.store_worker_sample(%s, %s, %s::text::jsonb, %s::text::jsonb, %s)"
        )
        [(left_out, next_in)] = await self._pool.rows(query, self.worker, covered, counts, levels, phase)
        return left_out == 0, next_in

    async def prune(self, keep: timedelta, chunk: int = 1000) -> int:
        """Deletes what ended longer than `keep` ago, in chunks; returns how many events that were."""
        before = datetime.now(UTC) - keep
        total = 0
        while True:
            deleted: int = await self._pool.value("select bridge.inbox_prune(%s, %s, %s)", self.worker, before, chunk)
            total += deleted
            if deleted < chunk:
                return total

    async def _check_reply(self, reply: str) -> None:
        schema, name = reply.split(".", 1)
        allowed = await self._pool.value(
            "select bool_or(has_schema_privilege(n.oid, 'usage') and has_function_privilege(p.oid, 'execute'))"
            "  from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace"
            " where n.nspname = %s and p.proname = %s and oidvectortypes(p.proargtypes) = 'uuid, jsonb'",
            schema,
            name,
        )
        if allowed is None:
            raise SchemaError(
                f"workers.{self.worker}.reply: there is no function {reply}(uuid, jsonb). Create it, or correct "
                "the name"
            )
        if not allowed:
            raise PrivilegeError(
                f"workers.{self.worker}.reply: this role may not call {reply}. "
                f"GRANT USAGE ON SCHEMA {schema} and GRANT EXECUTE ON FUNCTION {reply}(uuid, jsonb) to it"
            )


def _text(given: Recorded | None) -> str | None:
    return None if given is None else json.dumps(given)


def _effect(operation: str, entry: Any) -> Effect[Recorded]:
    if entry is None:
        raise ClaimLostError
    return Effect(
        operation,
        entry["idempotency_key"],
        datetime.fromisoformat(entry["started_at"]),
        entry.get("result"),
        timedelta(seconds=entry["age"]),
        entry.get("given"),
    )


def _mark(replay: str | None) -> str | None:
    """As a column of text can hold it; anyone may have written it."""
    return None if replay is None else storable(replay[:_LONGEST_MARK])
