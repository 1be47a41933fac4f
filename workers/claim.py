"""A claim: an event that is this process's to handle, and the ledger of its outside effects."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString, Protocol

from psycopg.types.json import Jsonb

from workers.effects import Effect


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
    """An event that is ours to handle; the `Ledger` of its effects."""

    inbox: Database
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
