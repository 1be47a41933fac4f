"""The ledger that makes a worker's database effects exactly-once; its SQL is in ``0005_inbox.sql``.

Claims carry the process' token (``token.py``): they die with its session, so after a crash another process takes
over at once. A claim is made only while the token's lock is held, and finishing one checks that it is still ours.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, LiteralString

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from bridge.errors import DatabaseUnavailableError, PrivilegeError, SchemaError
from bridge.postgres import connection_parameters, database_errors, translated
from bridge.settings import PostgresSettings
from workers.effects import Effect
from workers.handler import Result
from workers.token import Token

_SERIALIZATION_ATTEMPTS: Final = 5
_UNAVAILABLE_CLASSES: Final = ("08", "53", "57P", "58", "25006")
"""SQLSTATEs that speak of the server and not of the reply: connection, resources, shutdown, system, read-only."""


class ClaimLostError(Exception):
    """Another process took the event over, because our session with PostgreSQL had ended."""


class ReplyError(Exception):
    """The reply function, or the conversion of the result, raised. The message is PostgreSQL's."""


@dataclass(frozen=True, slots=True)
class Claim:
    """An event that is ours to handle, and the ledger of its outside effects."""

    inbox: "Inbox"
    event_id: str
    token: int
    attempt: int
    """Which run of the handler this is, from 1."""

    @property
    def fence(self) -> tuple[str, str, int, int]:
        return (self.inbox.worker, self.event_id, self.token, self.attempt)

    async def begin_effect(self, operation: str) -> Effect:
        """See `effects.Ledger`. Raises ClaimLostError, DatabaseUnavailableError."""
        entry = await self.inbox.value("SELECT bridge.inbox_effect_begin(%s, %s, %s, %s, %s)", *self.fence, operation)
        if entry is None:
            raise ClaimLostError
        return Effect(
            operation, entry["idempotency_key"], datetime.fromisoformat(entry["started_at"]), entry.get("result")
        )

    async def end_effect(self, effect: Effect) -> None:
        """See `effects.Ledger`. Raises ClaimLostError, DatabaseUnavailableError."""
        if not await self.inbox.value(
            "SELECT bridge.inbox_effect_end(%s, %s, %s, %s, %s, %s)",
            *self.fence,
            effect.operation,
            Jsonb(effect.result),
        ):
            raise ClaimLostError


class Inbox:
    """One worker process's side of the ledger. `reply` is the SQL function that takes results, as two names."""

    def __init__(self, worker: str, settings: PostgresSettings, *, concurrency: int, reply: str | None = None) -> None:
        self.worker = worker
        application_name = f"pgbridge-worker {worker}"
        self._finishing = _finishing(reply)
        self._reply_name = reply
        self._pool = AsyncConnectionPool(
            kwargs={**connection_parameters(settings, application_name), "autocommit": True},
            min_size=1,
            max_size=concurrency,
            timeout=settings.connect_timeout,
            open=False,
        )
        self._token = Token(settings, application_name)
        self._in_hand: set[str] = set()

    async def open(self) -> None:
        """Connects, and checks that the schema and the reply function are there and may be used.

        Raises DatabaseUnavailableError, PrivilegeError, SchemaError, RefusedError.
        """
        await self._token.take(instead_of=self._token.value)
        await self._pool.open()
        await self.value("SELECT bridge.inbox_prune(%s, '-infinity')", self.worker)
        if self._reply_name is not None:
            await self._check_reply(self._reply_name)

    async def close(self) -> None:
        """Ends the sessions; claims that are still open become free for other processes."""
        await self._pool.close()
        await self._token.close()

    async def claim(self, event_id: str) -> Claim | Literal["finished", "busy"]:
        """Claims an event. Raises DatabaseUnavailableError, or another PgbridgeError when PostgreSQL refuses."""
        if event_id in self._in_hand:
            return "busy"
        self._in_hand.add(event_id)
        claimed = False
        try:
            while True:
                token = self._token.value
                state, attempt = await self.row(
                    "SELECT state, attempt FROM bridge.inbox_claim(%s, %s, %s)", self.worker, event_id, token
                )
                if state == "unheld":
                    # Our session ended unnoticed, and its claims with it.
                    await self._token.take(instead_of=token)
                    continue
                if state != "claimed":
                    return "finished" if state == "finished" else "busy"
                claimed = True
                return Claim(self, event_id, token, attempt)
        finally:
            if not claimed:
                self._in_hand.discard(event_id)

    async def finish(self, claim: Claim, result: Result) -> None:
        """Records the result and hands it to the reply function, in one transaction.

        Raises ReplyError when the reply function refuses (the claim stays ours: release it), ClaimLostError, and
        DatabaseUnavailableError (RefusedError on a standby), after which the same call may be made again: had the
        transaction been committed after all, it raises ClaimLostError, and the next claim says "finished".
        """
        outcome = None if result is None else Jsonb(result)
        for remaining in reversed(range(_SERIALIZATION_ATTEMPTS)):
            try:
                await self._finish(claim, outcome)
            except (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected) as error:
                if not remaining:
                    raise self._refused(error) from error
            except PoolTimeout as error:
                raise DatabaseUnavailableError("PostgreSQL gave no connection in time") from error
            except (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction) as error:
                if error.sqlstate is None or error.sqlstate.startswith(_UNAVAILABLE_CLASSES):
                    raise translated(error) from error
                raise self._refused(error) from error
            except psycopg.Error as error:
                raise self._refused(error) from error
            else:
                break
        self._in_hand.discard(claim.event_id)

    async def release(self, claim: Claim, *, counted: int) -> None:
        """Gives the claim up with `counted` attempts on record; one that was lost is gone already.

        Raises DatabaseUnavailableError, or another PgbridgeError when PostgreSQL refuses.
        """
        await self.value("SELECT bridge.inbox_release(%s, %s, %s, %s, %s)", *claim.fence, counted)
        self._in_hand.discard(claim.event_id)

    async def prune(self, keep: timedelta, chunk: int = 1000) -> int:
        """Deletes what was finished longer than `keep` ago, in chunks; returns how many events that were."""
        before = datetime.now(UTC) - keep
        total = 0
        while True:
            deleted: int = await self.value("SELECT bridge.inbox_prune(%s, %s, %s)", self.worker, before, chunk)
            total += deleted
            if deleted < chunk:
                return total

    async def value(self, query: LiteralString, *parameters: object) -> Any:
        """The first column of a query's one row. Raises DatabaseUnavailableError and other PgbridgeErrors."""
        return (await self.row(query, *parameters))[0]

    async def row(self, query: LiteralString, *parameters: object) -> TupleRow:
        """A query's one row. Raises as `value` does."""
        try:
            with database_errors():
                async with self._pool.connection() as connection:
                    [row] = await (await connection.execute(query, parameters, prepare=True)).fetchall()
        except PoolTimeout as error:
            raise DatabaseUnavailableError("PostgreSQL gave no connection in time") from error
        return row

    async def _finish(self, claim: Claim, outcome: Jsonb | None) -> None:
        parameters = [*claim.fence, outcome, *([] if self._reply_name is None else [claim.event_id, outcome])]
        async with self._pool.connection() as connection:
            cursor = await connection.execute(self._finishing, parameters, prepare=True)
            row = await cursor.fetchone()
        if row is None or not row[0]:
            self._in_hand.discard(claim.event_id)
            raise ClaimLostError

    def _refused(self, error: psycopg.Error) -> ReplyError:
        said = " ".join((error.diag.message_primary or str(error)).split())
        where = self._reply_name or "the inbox"
        return ReplyError(f"{where} refuses the result: {said} (SQLSTATE {error.sqlstate})")

    async def _check_reply(self, reply: str) -> None:
        schema, name = reply.split(".", 1)
        allowed = await self.value(
            "SELECT bool_or(has_schema_privilege(n.oid, 'usage') AND has_function_privilege(p.oid, 'execute'))"
            "  FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace"
            " WHERE n.nspname = %s AND p.proname = %s AND oidvectortypes(p.proargtypes) = 'uuid, jsonb'",
            schema,
            name,
        )
        if allowed is None:
            raise SchemaError(
                f"workers.{self.worker}.reply: there is no function {reply}(uuid, jsonb). Create it, or mend the name"
            )
        if not allowed:
            raise PrivilegeError(
                f"workers.{self.worker}.reply: this role may not call {reply}. "
                f"GRANT USAGE ON SCHEMA {schema} and GRANT EXECUTE ON FUNCTION {reply}(uuid, jsonb) to it"
            )


def _finishing(reply: str | None) -> sql.Composed:
    """Finishes a claim and calls the reply in one statement, so in one transaction and one round trip.

    CASE calls the reply only after `inbox_finish` has said that the claim is ours.
    """
    finish = sql.SQL("bridge.inbox_finish(%s::text, %s::uuid, %s::bigint, %s::int, %s::jsonb)")
    if reply is None:
        return sql.SQL("SELECT {}").format(finish)
    called = sql.SQL("SELECT {}(%s::uuid, %s::jsonb)").format(sql.Identifier(*reply.split(".", 1)))
    return sql.SQL("SELECT CASE WHEN {} THEN (SELECT count(*) >= 0 FROM ({}) AS reply) END").format(finish, called)
