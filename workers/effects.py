"""Outside effects: recorded before they happen, so that a second attempt knows what the first one began.

    async with effect("charge") as charge:
        if charge.result is None:
            charge.result = await pay(..., idempotency_key=charge.idempotency_key)

In a handler that is no coroutine it is ``with effect("charge") as charge``.

PostgreSQL cannot take a card's charge back, so outside effects happen at least once. The key, ``<worker>:<event
id>:<operation>``, is the same at every attempt and lets the other side suppress repetitions; the result, once it
is known, spares later attempts the call.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from workers.threads import await_in_loop


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


class effect:  # noqa: N801 - authors write it like `open`
    """Records an outside effect of the event in hand around the code that brings it about.

    When the code raises, no result is recorded, and the next attempt finds the effect begun. Only for use in a
    handler, or where `current_effects` is set; raises LookupError elsewhere.
    """

    def __init__(self, operation: str) -> None:
        self._operation = operation

    async def __aenter__(self) -> Effect:
        self._store = current_effects.get()
        self._effect = await self._store.begin_effect(self._operation)
        self._known = self._effect.result
        return self._effect

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        result = self._effect.result
        if kind is None and result is not None and result is not self._known:
            await self._store.end_effect(self._effect)

    def __enter__(self) -> Effect:
        return await_in_loop(self.__aenter__())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await_in_loop(self.__aexit__(kind))
