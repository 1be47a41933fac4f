"""The ledger that makes a worker's database effects exactly-once; its SQL is in ``0005_inbox.sql`` and
``0010_inbox_outcomes.sql``.

Claims carry the token of the process' session (``session.py``) and die with it, so after a crash another process takes
over at once. A claim is made only while the token's lock is held, and finishing one checks that it is still ours.
Claims, and ends without a reply, that are asked for at the same time share a query: a query each was half of what a
worker cost.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, LiteralString, TypeVar

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from bridge.brokers.contract import Failure
from bridge.errors import DatabaseUnavailableError, PrivilegeError, SchemaError
from bridge.postgres.connection import (
    Connection,
    connection_parameters,
    database_errors,
    prepare_session,
    silence_limited,
    translated,
)
from bridge.process.batching import Batcher
from bridge.settings import PostgresSettings
from workers.effects import Effect
from workers.handler import Result
from workers.session import ClaimSession

T = TypeVar("T")


class ClaimLostError(Exception):
    """Another process took the event over, because our session with PostgreSQL had ended."""


class ReplyError(Exception):
    """The reply function, or the conversion of the result, raised. The message is PostgreSQL's."""


@dataclass(frozen=True, slots=True)
class Claim:
    """An event that is ours to handle."""

    worker: str
    event_id: str
    token: int
    attempt: int
    """Which run of the handler this is, from 1."""

    @property
    def fence(self) -> tuple[str, str, int, int]:
        """What says in SQL whose claim it is."""
        return (self.worker, self.event_id, self.token, self.attempt)


@dataclass(frozen=True, slots=True)
class NotNow:
    """An event that is not ours to handle: how it stands."""

    state: Literal["finished", "failed", "busy", "early", "alone"]
    """See the function inbox_claim()."""
    seconds: float = 0.0
    """Until it may run, where it is early."""
    failure: Failure | None = None
    """With which it was given up, where that is so."""


_FUNCTIONS: Final = (
    "bridge.inbox_claim(text, uuid[], text[], bigint, bigint[], double precision[], boolean)",
    "bridge.inbox_finish(text, uuid, bigint, int, jsonb)",
    "bridge.inbox_finish_all(text, uuid[], bigint[], int[], jsonb[])",
    "bridge.inbox_release(text, uuid, bigint, int, int, double precision)",
    "bridge.inbox_fail(text, uuid, bigint, int, jsonb)",
    "bridge.inbox_forget(text, uuid, text)",
    "bridge.inbox_effect_begin(text, uuid, bigint, int, text)",
    "bridge.inbox_effect_end(text, uuid, bigint, int, text, jsonb)",
    "bridge.inbox_prune(text, timestamptz, int)",
)
"""All that is called."""
_SERIALIZATION_ATTEMPTS: Final = 5
"""Tries of a transaction that conflicts with another one."""
_TOGETHER: Final = 100
"""Most events in one query."""
_LONGEST_MARK: Final = 100
"""Characters of a replay's mark that tell it from others; ours have 36."""
_CLAIMING: Final = 2
"""Connections beside those on which replies run, so that slow ones keep no claim from being made."""
_ANSWER_GRACE: Final = 10.0
"""Seconds of silence, beyond the time that a statement may take, after which its connection counts as dead."""


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
    ) -> None:
        """`reply_timeout` in seconds; `backoff` are the seconds before each attempt after the first, for one whose
        last attempt died with its process."""
        self.worker = worker
        application_name = f"pgbridge-worker {worker}"
        self._key = settings.key("dsn")
        self._connect_timeout = settings.connect_timeout
        self._finishing = _finishing(reply)
        self._reply_name = reply
        self._reply_timeout = reply_timeout
        self._backoff = list(backoff) or [1.0]
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            connection_class=Connection,
            configure=self._configure,
            kwargs={**connection_parameters(settings, application_name), "autocommit": True},
            min_size=1,
            max_size=concurrency + _CLAIMING,
            timeout=settings.connect_timeout,
            open=False,
        )
        self._session = ClaimSession(settings, application_name)
        self._claims = Batcher(self._claim_together, _TOGETHER)
        self._ends = Batcher(self._finish_together, _TOGETHER)

    async def _configure(self, connection: Connection) -> None:
        await prepare_session(connection, self._key)
        await connection.execute("select set_config('statement_timeout', %s, false)", [f"{self._reply_timeout:g}s"])

    async def open(self) -> None:
        """Connects, and checks that the schema and the reply function are there and may be used.

        Raises what `bridge.postgres.connection.connect` raises, SchemaError, and RefusedError behind a pooler.
        """
        await self._session.renew(instead_of=self._session.token)
        await self._pool.open()
        await self._check_privileges()
        if self._reply_name is not None:
            await self._check_reply(self._reply_name)

    async def close(self) -> None:
        """Ends the sessions; claims that are still open become free for other processes."""
        await self._pool.close()
        await self._session.close()

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

    async def claim(self, event_id: str, replay: str | None = None) -> Claim | NotNow:
        """Claims an event, which this process must not have in hand. `replay` is the mark of the one that brought it.

        Raises DatabaseUnavailableError, or another PgbridgeError when PostgreSQL refuses.
        """
        return await self._claims.ask((event_id, _mark(replay)))

    async def claim_alone(self, event_id: str, replay: str | None = None) -> Claim | NotNow:
        """The same for an event that `claim` said is to run alone, once nothing else runs."""
        [claim] = await self._claim_together([(event_id, _mark(replay))], alone=True)
        return claim

    async def _claim_together(
        self, events: Sequence[tuple[str, str | None]], *, alone: bool = False
    ) -> Sequence[Claim | NotNow]:
        # In one order in every process, so that no two wait for each other.
        in_order = sorted(events, key=lambda event: event[0])
        while True:
            token = self._session.token
            rows = await self._rows(
                "select event::text, state, attempt, seconds, failure"
                " from bridge.inbox_claim(%s, %s::uuid[], %s::text[], %s, %s::bigint[], %s::double precision[], %s)",
                self.worker,
                [event_id for event_id, _ in in_order],
                [replay for _, replay in in_order],
                token,
                list(self._session.former),
                self._backoff,
                alone,
            )
            if rows[0][1] != "unheld":
                break
            # Our session ended unnoticed, and its claims with it.
            await self._session.renew(instead_of=token)
        claims = {event_id: self._standing(event_id, token, *how) for event_id, *how in rows}
        return [claims[event_id] for event_id, _ in events]

    def _standing(
        self, event_id: str, token: int, state: Any, attempt: int, seconds: float | None, failure: dict[str, str] | None
    ) -> Claim | NotNow:
        if state == "claimed":
            return Claim(self.worker, event_id, token, attempt)
        return NotNow(state, seconds or 0.0, None if failure is None else Failure(**failure, attempts=attempt))

    async def finish(self, claim: Claim, result: Result) -> None:
        """Records the result and hands it to the reply function, in one transaction.

        Raises ReplyError when the result is no JSON object or the reply function refuses (the claim stays ours: release
        it), ClaimLostError, and
        DatabaseUnavailableError (RefusedError on a standby), after which the same call may be made again: had the
        transaction been committed after all, it raises ClaimLostError, and the next claim says "finished".
        """
        # Before it shares a query with others, which would share its failure.
        outcome = outcome_text(result)
        alone = self._reply_name is not None
        conflicts = 0
        while True:
            try:
                ours = await (self._finish_alone(claim, outcome) if alone else self._ends.ask((claim, outcome)))
                break
            except (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected) as error:
                conflicts += 1
                if conflicts == _SERIALIZATION_ATTEMPTS:
                    raise self._refused(error) from error
            except psycopg.Error as error:
                if alone:
                    raise self._refused(error) from error
                # Of those that went together it may be another one's result that was refused.
                alone = True
        if not ours:
            raise ClaimLostError

    async def release(self, claim: Claim, *, counted: int, delay: float = 0.0) -> None:
        """Gives the claim up with `counted` attempts on record, for `delay` seconds; one that was lost is gone already.

        Raises DatabaseUnavailableError, or another PgbridgeError when PostgreSQL refuses.
        """
        await self._value("select bridge.inbox_release(%s, %s, %s, %s, %s, %s)", *claim.fence, counted, delay)

    async def fail(self, claim: Claim, failure: Failure) -> None:
        """Gives the event up: until `forget` it never runs again, and every claim says so.

        Raises ClaimLostError, also where an earlier call was committed and its answer lost, and as `release`.
        """
        told = {"code": failure.code, "reason": failure.reason, "trace": failure.trace}
        text = json.dumps({name: _storable(value) for name, value in told.items()})
        if not await self._value("select bridge.inbox_fail(%s, %s, %s, %s, %s::jsonb)", *claim.fence, text):
            raise ClaimLostError

    async def forget(self, event_id: str, replay: str | None = None) -> None:
        """The dead letter of an event that was given up is with the broker: from now on only a new replay starts it
        afresh. `replay` as for the `claim` that led to it. Raises as `release`."""
        await self._value("select bridge.inbox_forget(%s, %s, %s)", self.worker, event_id, _mark(replay))

    async def begin_effect(self, claim: Claim, operation: str) -> Effect:
        """See `effects.EffectStore`. Raises ClaimLostError, and as `release`."""
        entry = await self._value("select bridge.inbox_effect_begin(%s, %s, %s, %s, %s)", *claim.fence, operation)
        if entry is None:
            raise ClaimLostError
        return Effect(
            operation, entry["idempotency_key"], datetime.fromisoformat(entry["started_at"]), entry.get("result")
        )

    async def end_effect(self, claim: Claim, effect: Effect) -> None:
        """See `effects.EffectStore`. Raises ClaimLostError, ValueError for a result that jsonb cannot hold, and as
        `release`."""
        query = "select bridge.inbox_effect_end(%s, %s, %s, %s, %s, %s::jsonb)"
        try:
            [(ours,)] = await self._statement(query, *claim.fence, effect.operation, json_text(effect.result))
        except psycopg.DataError as error:
            raise ValueError(f"effect {effect.operation}: PostgreSQL refuses its result: {_said(error)}") from error
        except psycopg.Error as error:
            raise translated(error, self._key) from error
        if not ours:
            raise ClaimLostError

    async def prune(self, keep: timedelta, chunk: int = 1000) -> int:
        """Deletes what ended longer than `keep` ago, in chunks; returns how many events that were."""
        before = datetime.now(UTC) - keep
        total = 0
        while True:
            deleted: int = await self._value("select bridge.inbox_prune(%s, %s, %s)", self.worker, before, chunk)
            total += deleted
            if deleted < chunk:
                return total

    async def _value(self, query: LiteralString, *parameters: object) -> Any:
        [row] = await self._rows(query, *parameters)
        return row[0]

    async def _rows(self, query: LiteralString, *parameters: object) -> list[TupleRow]:
        with database_errors(self._key):
            return await self._statement(query, *parameters)

    async def _statement(self, query: LiteralString | sql.Composed, *parameters: object) -> list[TupleRow]:
        """Raises psycopg's error where PostgreSQL refuses the statement, and DatabaseUnavailableError where it is the
        connection that is at fault, or the server takes no writes."""
        try:
            async with self._pool.connection() as connection:
                try:
                    with silence_limited(connection, self._key, self._reply_timeout + _ANSWER_GRACE):
                        return await (await connection.execute(query, parameters, prepare=True)).fetchall()
                except psycopg.Error as error:
                    if connection.closed or _ended_session(error):
                        raise translated(error, self._key) from error
                    raise
        except PoolTimeout as error:
            raise DatabaseUnavailableError(
                f"{self._key}: PostgreSQL gave no connection within {self._connect_timeout:g} s"
            ) from error

    async def _finish_alone(self, claim: Claim, outcome: str | None) -> bool:
        """With the reply, if there is one. Whether the claim was still ours."""
        reply = [] if self._reply_name is None else [claim.event_id, outcome]
        [(ours,)] = await self._statement(self._finishing, *claim.fence, outcome, *reply)
        return bool(ours)

    async def _finish_together(self, ends: Sequence[tuple[Claim, str | None]]) -> Sequence[bool]:
        ends_by_id = sorted(ends, key=lambda end: end[0].event_id)
        finished = await self._statement(
            _FINISH_TOGETHER,
            self.worker,
            [claim.event_id for claim, _ in ends_by_id],
            [claim.token for claim, _ in ends_by_id],
            [claim.attempt for claim, _ in ends_by_id],
            [outcome for _, outcome in ends_by_id],
        )
        ours = {event for (event,) in finished}
        return [claim.event_id in ours for claim, _ in ends]

    def _refused(self, error: psycopg.Error) -> ReplyError:
        where = self._reply_name or "the inbox"
        if isinstance(error, psycopg.errors.QueryCanceled):
            limit = f"workers.{self.worker}.reply_timeout, {self._reply_timeout:g} s"
            return ReplyError(f"{where} ran longer than {limit}, or was cancelled: {_said(error)}")
        return ReplyError(f"{where} refuses the result: {_said(error)}")

    async def _check_privileges(self) -> None:
        """All at the start, since most of these functions are first called when something goes wrong."""
        missing = [
            function
            for (function,) in await self._rows(
                "select f from unnest(%s::text[]) as f where not has_function_privilege(f, 'execute')", list(_FUNCTIONS)
            )
        ]
        if missing:
            [(user,)] = await self._rows("select current_user")
            raise PrivilegeError(
                f"{self._key}: the role {user!r} may not call {', '.join(missing)}. Run: grant bridge_worker to {user}"
            )

    async def _check_reply(self, reply: str) -> None:
        schema, name = reply.split(".", 1)
        allowed = await self._value(
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


def outcome_text(result: object) -> str | None:
    """What a handler returned, as JSON. Raises ReplyError where it has no such form."""
    if result is None:
        return None
    if not isinstance(result, Mapping):
        raise ReplyError(f"the handler returned a {type(result).__name__}; a dict or None is wanted")
    try:
        return json_text(result)
    except (TypeError, ValueError, RecursionError) as error:
        raise ReplyError(f"the handler's result has no form in JSON: {error}") from error


def json_text(value: Mapping[str, Any] | None) -> str:
    """A result as JSON. Raises TypeError for what JSON does not have, ValueError for NaN, infinities and cycles."""
    return json.dumps(value, allow_nan=False, default=_plain)


def _plain(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


def _mark(replay: str | None) -> str | None:
    """As a column of text can hold it; anyone may have written it."""
    return None if replay is None else _storable(replay[:_LONGEST_MARK])


def _storable(text: str) -> str:
    """As text and jsonb can hold it, which have neither NUL nor half a surrogate pair."""
    return text.encode(errors="replace").decode().replace("\0", "\ufffd")


def _said(error: psycopg.Error) -> str:
    return f"{' '.join((error.diag.message_primary or str(error)).split())} (SQLSTATE {error.sqlstate})"


def _ended_session(error: psycopg.Error) -> bool:
    """Whether the server ended the session with it, though the end may not have been read yet; or takes no writes."""
    fatal = error.diag.severity_nonlocalized in ("FATAL", "PANIC")
    return fatal or isinstance(error, psycopg.errors.ReadOnlySqlTransaction)


_FINISH_TOGETHER: Final = (
    "select event::text"
    " from bridge.inbox_finish_all(%s, %s::uuid[], %s::bigint[], %s::int[], %s::text[]::jsonb[]) as event"
)


def _finishing(reply: str | None) -> sql.Composed:
    """Finishes a claim and calls the reply in one statement, so in one transaction and one round trip.

    CASE calls the reply only after `inbox_finish` has said that the claim is ours.
    """
    finish = sql.SQL("bridge.inbox_finish(%s::text, %s::uuid, %s::bigint, %s::int, %s::jsonb)")
    if reply is None:
        return sql.SQL("select {}").format(finish)
    called = sql.SQL("select {}(%s::uuid, %s::jsonb)").format(sql.Identifier(*reply.split(".", 1)))
    return sql.SQL("select case when {} then (select count(*) >= 0 from ({}) as reply) end").format(finish, called)
