"""Outside effects: recorded before they happen, so that a second attempt knows what the first one began.

    async with effect("charge") as charge:
        if charge.result is None:
            charge.result = await pay(..., idempotency_key=charge.idempotency_key)

PostgreSQL cannot take a card's charge back, so outside effects happen at least once. The key, ``<event
id>:<operation>``, is the same at every attempt and lets the other side suppress repetitions; the result, once it
is known, spares later attempts the call.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol


@dataclass(slots=True)
class Effect:
    """One outside effect of the event in hand."""

    operation: str
    idempotency_key: str
    started_at: datetime
    """When the first attempt began it, by the database's clock: the age of the key."""
    result: Mapping[str, Any] | None = None
    """What an earlier attempt got; the handler sets it once the effect has happened. A JSON object."""


class EffectStore(Protocol):
    """Where effects are recorded: a claim in the inbox, or a test's dictionary."""

    async def begin_effect(self, operation: str) -> Effect:
        """Records that the effect is about to happen; returns what is on record."""

    async def end_effect(self, effect: Effect) -> None:
        """Records its result."""


current_effects: ContextVar[EffectStore] = ContextVar("pgbridge_effects")
"""Where the effects of the event in hand are recorded. The worker sets it around a handler; a test may set its own."""


@asynccontextmanager
async def effect(operation: str) -> AsyncIterator[Effect]:
    """Records an outside effect of the event in hand around the code that brings it about.

    When the code raises, no result is recorded, and the next attempt finds the effect begun. Only for use in a
    handler, or where `current_effects` is set; raises LookupError elsewhere.
    """
    store = current_effects.get()
    begun = await store.begin_effect(operation)
    known = begun.result
    yield begun
    if begun.result is not None and begun.result is not known:
        await store.end_effect(begun)
