"""The ledger that makes a worker's database effects exactly-once; its SQL is in ``0005_inbox.sql``.

Claims carry the token of the process' session (``session.py``) and die with it, so after a crash another process takes
over at once. A claim is made only while the token's lock is held, and finishing one checks that it is still ours.
Claims, and ends without a reply, that are asked for at the same time share a query: a query each was half of what a
worker cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, LiteralString, Protocol

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from bridge.errors import DatabaseUnavailableError, PrivilegeError, SchemaError
from bridge.postgres.connection import connection_parameters, database_errors, translated
from bridge.process.batching import Batcher
from bridge.settings import PostgresSettings
from workers.effects import Effect
from workers.handler import Result
from workers.session import ClaimSession


class ClaimLostError(Exception):
    """Another process took the event over, because our session with PostgreSQL had ended."""


class ReplyError(Exception):
    """The reply function, or the conversion of the result, raised. The message is PostgreSQL's."""


class Database(Protocol):
    """What a claim needs of the inbox."""

    worker: str

    async def value(self, query: LiteralString, *parameters: object) -> Any:
        """The first column of a query's one row."""


@dataclass(frozen=True, slots=True)
class Claim:
    """An event that is ours to handle; the `EffectStore` of its effects."""

    inbox: Database
    event_id: str
    token: int
    attempt: int
    """Which run of the handler this is, from 1."""

    @property
    def fence(self) -> tuple[str, str, int, int]:
        return (self.inbox.worker, self.event_id, self.token, self.attempt)

    async def begin_effect(self, operation: str) -> Effect:
        """See `effects.EffectStore`. Raises ClaimLostError, DatabaseUnavailableError."""
        entry = await self.inbox.value("select bridge.inbox_effect_begin(%s, %s, %s, %s, %s)", *self.fence, operation)
        if entry is None:
            raise ClaimLostError
        return Effect(
            operation, entry["idempotency_key"], datetime.fromisoformat(entry["started_at"]), entry.get("result")
        )

    async def end_effect(self, effect: Effect) -> None:
        """See `effects.EffectStore`. Raises ClaimLostError, DatabaseUnavailableError."""
        if not await self.inbox.value(
            "select bridge.inbox_effect_end(%s, %s, %s, %s, %s, %s)",
            *self.fence,
            effect.operation,
            Jsonb(effect.result),
        ):
            raise ClaimLostError


_SERIALIZATION_ATTEMPTS: Final = 5
"""Tries of a transaction that conflicts with another one."""
_TOGETHER: Final = 100
"""Most events in one query."""
_UNAVAILABLE_CLASSES: Final = ("08", "53", "57P", "58")
"""Classes of SQLSTATEs about the server and not about the reply: connection, resources, shutdown, system."""


class Inbox:
    """One worker process's side of the ledger. `reply` is the SQL function that takes results, as two names."""

    def __init__(self, worker: str, settings: PostgresSettings, *, concurrency: int, reply: str | None = None) -> None:
        self.worker = worker
        application_name = f"pgbridge-worker {worker}"
        self._key = settings.key("dsn")
        self._connect_timeout = settings.connect_timeout
        self._finishing = _finishing(reply)
        self._reply_name = reply
        self._pool = AsyncConnectionPool(
            kwargs={**connection_parameters(settings, application_name), "autocommit": True},
            min_size=1,
            max_size=concurrency,
            timeout=settings.connect_timeout,
            open=False,
        )
        self._session = ClaimSession(settings, application_name)
        self._in_hand: set[str] = set()
        self._claims = Batcher(self._claim_together, _TOGETHER)
        self._ends = Batcher(self._finish_together, _TOGETHER)

    async def open(self) -> None:
        """Connects, and checks that the schema and the reply function are there and may be used.

        Raises what `bridge.postgres.connection.connect` raises, SchemaError, and RefusedError behind a pooler.
        """
        await self._session.renew(instead_of=self._session.token)
        await self._pool.open()
        await self.value("select bridge.inbox_prune(%s, '-infinity')", self.worker)
        if self._reply_name is not None:
            await self._check_reply(self._reply_name)

    async def close(self) -> None:
        """Ends the sessions; claims that are still open become free for other processes."""
        await self._pool.close()
        await self._session.close()

    async def claim(self, event_id: str) -> Claim | Literal["finished", "busy"]:
        """Claims an event. Raises DatabaseUnavailableError, or another PgbridgeError when PostgreSQL refuses."""
        if event_id in self._in_hand:
            return "busy"
        self._in_hand.add(event_id)
        claim: Claim | Literal["finished", "busy"] = "busy"
        try:
            claim = await self._claims.ask(event_id)
        finally:
            if not isinstance(claim, Claim):
                self._in_hand.discard(event_id)
        return claim

    async def _claim_together(self, events: Sequence[str]) -> Sequence[Claim | Literal["finished", "busy"]]:
        while True:
            token = self._session.token
            rows = await self._rows(
                "select event::text, state, attempt from bridge.inbox_claim(%s, %s::uuid[], %s)",
                self.worker,
                # In one order in every process, so that no two wait for each other.
                sorted(events),
                token,
            )
            if rows[0][1] != "unheld":
                break
            # Our session ended unnoticed, and its claims with it.
            await self._session.renew(instead_of=token)
        claims: dict[str, Claim | Literal["finished", "busy"]] = {}
        for event_id, state, attempt in rows:
            claimed = Claim(self, event_id, token, attempt) if state == "claimed" else None
            claims[event_id] = claimed or ("finished" if state == "finished" else "busy")
        return [claims[event_id] for event_id in events]

    async def finish(self, claim: Claim, result: Result) -> None:
        """Records the result and hands it to the reply function, in one transaction.

        Raises ReplyError when the reply function refuses (the claim stays ours: release it), ClaimLostError, and
        DatabaseUnavailableError (RefusedError on a standby), after which the same call may be made again: had the
        transaction been committed after all, it raises ClaimLostError, and the next claim says "finished".
        """
        outcome = None if result is None else Jsonb(result)
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
            except PoolTimeout as error:
                raise self._no_connection() from error
            except psycopg.Error as error:
                if _is_the_servers(error):
                    raise translated(error, self._key) from error
                if alone:
                    raise self._refused(error) from error
                # Of those that went together it may be another one's result that was refused.
                alone = True
        self._in_hand.discard(claim.event_id)
        if not ours:
            raise ClaimLostError

    async def release(self, claim: Claim, *, counted: int) -> None:
        """Gives the claim up with `counted` attempts on record; one that was lost is gone already.

        Raises DatabaseUnavailableError, or another PgbridgeError when PostgreSQL refuses.
        """
        await self.value("select bridge.inbox_release(%s, %s, %s, %s, %s)", *claim.fence, counted)
        self._in_hand.discard(claim.event_id)

    async def prune(self, keep: timedelta, chunk: int = 1000) -> int:
        """Deletes what was finished longer than `keep` ago, in chunks; returns how many events that were."""
        before = datetime.now(UTC) - keep
        total = 0
        while True:
            deleted: int = await self.value("select bridge.inbox_prune(%s, %s, %s)", self.worker, before, chunk)
            total += deleted
            if deleted < chunk:
                return total

    async def value(self, query: LiteralString, *parameters: object) -> Any:
        """The first column of a query's one row. Raises DatabaseUnavailableError and other PgbridgeErrors."""
        [row] = await self._rows(query, *parameters)
        return row[0]

    async def _rows(self, query: LiteralString, *parameters: object) -> list[TupleRow]:
        try:
            with database_errors(self._key):
                async with self._pool.connection() as connection:
                    return await (await connection.execute(query, parameters, prepare=True)).fetchall()
        except PoolTimeout as error:
            raise self._no_connection() from error

    async def _finish_alone(self, claim: Claim, outcome: Jsonb | None) -> bool:
        """With the reply, if there is one. Whether the claim was still ours."""
        parameters = [*claim.fence, outcome, *([] if self._reply_name is None else [claim.event_id, outcome])]
        async with self._pool.connection() as connection:
            row = await (await connection.execute(self._finishing, parameters, prepare=True)).fetchone()
        return row is not None and bool(row[0])

    async def _finish_together(self, ends: Sequence[tuple[Claim, Jsonb | None]]) -> Sequence[bool]:
        ends_by_id = sorted(ends, key=lambda end: end[0].event_id)
        columns = (
            [claim.event_id for claim, _ in ends_by_id],
            [claim.token for claim, _ in ends_by_id],
            [claim.attempt for claim, _ in ends_by_id],
            [outcome for _, outcome in ends_by_id],
        )
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_FINISH_TOGETHER, (self.worker, *columns), prepare=True)
            finished = {event for (event,) in await cursor.fetchall()}
        return [claim.event_id in finished for claim, _ in ends]

    def _no_connection(self) -> DatabaseUnavailableError:
        return DatabaseUnavailableError(
            f"{self._key}: PostgreSQL gave no connection within {self._connect_timeout:g} s"
        )

    def _refused(self, error: psycopg.Error) -> ReplyError:
        said = " ".join((error.diag.message_primary or str(error)).split())
        where = self._reply_name or "the inbox"
        return ReplyError(f"{where} refuses the result: {said} (SQLSTATE {error.sqlstate})")

    async def _check_reply(self, reply: str) -> None:
        schema, name = reply.split(".", 1)
        allowed = await self.value(
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


def _is_the_servers(error: psycopg.Error) -> bool:
    """Whether it is about the server or the connection, and not about the result."""
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
        return True
    operational = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return operational and (error.sqlstate is None or error.sqlstate.startswith(_UNAVAILABLE_CLASSES))


_FINISH_TOGETHER: Final = (
    "select event::text from bridge.inbox_finish_all(%s, %s::uuid[], %s::bigint[], %s::int[], %s::jsonb[]) as event"
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
