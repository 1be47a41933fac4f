"""For tests of handlers: an event, a run as a worker would run it, and the effects that are remembered.

    from workers.testing import MemoryLedger, make_event, run

    def test_an_order_is_charged_once() -> None:
        ledger = MemoryLedger()
        event = make_event("shop.order.placed", {"order": 7})
        assert run(charge, event, ledger=ledger) == {"paid": True}
        assert run(charge, event, ledger=ledger) == {"paid": True}
        assert ledger.results(event) == {"charge": {"id": "ch_1"}}

No broker, no database, and no plugin of pytest is needed.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from bridge.event import Event
from bridge.process import tasks
from workers.attempt import Attempts
from workers.effects import Effect, Recorded, current_effects
from workers.handler import Handler, Options, Run
from workers.result import outcome_text, recorded


def make_event(
    topic: str,
    payload: object,
    *,
    key: str | None = None,
    headers: Mapping[str, str] | None = None,
    id: str | None = None,
    source: str = "/test/test",
    time: datetime | None = None,
    content_type: str = "application/json",
    sequence: int = 0,
) -> Event:
    """An event as the bridge delivers it, under an id of its own and recorded now, unless these are given.

    `payload` is bytes as they are, or any other value, which is written as JSON. Raises TypeError and ValueError for
    what JSON does not have.
    """
    return Event(
        id=str(uuid4()) if id is None else id,
        topic=topic,
        payload=payload if isinstance(payload, bytes) else json.dumps(payload, allow_nan=False).encode(),
        key=key,
        source=source,
        time=datetime.now(UTC) if time is None else time,
        content_type=content_type,
        headers={} if headers is None else headers,
        sequence=sequence,
    )


@dataclass(slots=True)
class MemoryLedger:
    """What an inbox keeps of outside effects, for any number of events: a run that is given the ledger of an earlier
    one finds the results that are known."""

    worker: str = "test"
    """The worker's name, with which idempotency keys begin."""
    effects: dict[str, Effect[Recorded]] = field(default_factory=dict)
    """By idempotency key, ``<worker>:<event's inbox_id>:<operation>``, what was begun, in this order; `result` is None
    for what was not ended. An effect that began again has the key ``<worker>:<event's inbox_id>:<operation>:2``, and
    those before stay."""
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    """The clock by which effects age."""

    def of(self, event: Event) -> "EventEffects":
        """The effects of one event. An `EffectStore`, as `workers.effects.current_effects` takes it."""
        return EventEffects(self, event)

    def results(self, event: Event) -> dict[str, Mapping[str, Any] | None]:
        """By operation, what the effects of an event gave; None for one that was begun and not ended. Of one that began
        again, it is what the last one gave."""
        begun = f"{self.worker}:{event.inbox_id}:"
        return {effect.operation: effect.result for key, effect in self.effects.items() if key.startswith(begun)}

    def key(self, event: Event, operation: str) -> str:
        """The idempotency key of an effect, as the inbox makes it."""
        return f"{self.worker}:{event.inbox_id}:{operation}"


@dataclass(frozen=True, slots=True)
class EventEffects:
    """The `EffectStore` of one event in a MemoryLedger."""

    ledger: MemoryLedger
    event: Event

    async def begin_effect(self, operation: str, given: Recorded | None = None) -> Effect[Recorded]:
        """See `workers.effects.EffectStore`."""
        first = self.ledger.key(self.event, operation)
        [*_, key] = [first, *self._again(first)]
        return self._begin(operation, key, given)

    async def begin_effect_again(self, effect: Effect[Recorded], given: Recorded | None = None) -> Effect[Recorded]:
        """See `workers.effects.EffectStore`."""
        first = self.ledger.key(self.event, effect.operation)
        return self._begin(effect.operation, f"{first}:{2 + len(self._again(first))}", given)

    async def end_effect(self, effect: Effect[Recorded]) -> None:
        """See `workers.effects.EffectStore`. Raises ValueError where the result would not come back as it is."""
        self.ledger.effects[effect.idempotency_key].result = recorded(effect.result or {})

    def _again(self, first: str) -> list[str]:
        """The keys of what began again, in this order."""
        return [key for key in self.ledger.effects if key.rpartition(":")[0] == first]

    def _begin(self, operation: str, key: str, given: Recorded | None) -> Effect[Recorded]:
        now = self.ledger.now()
        known = self.ledger.effects.setdefault(key, Effect(operation, key, now))
        known.given = given if known.given is None else known.given
        # What is on record must not change with what the handler holds.
        result = None if known.result is None else recorded(known.result)
        return Effect(operation, key, known.started_at, result, now - known.started_at, known.given)


def run(
    handler: Handler,
    event: Event,
    *,
    ledger: MemoryLedger | None = None,
    options: Mapping[str, Any] | Options | None = None,
    timeout: float | None = None,
) -> dict[str, Any] | None:
    """Runs a handler on an event as a worker does, and returns its result as the reply function would get it.

    `ledger` remembers the handler's effects; left out, they are forgotten with the run. `options` is the table
    ``[workers.<name>.options]``, or an instance of the handler's own model. `timeout` is in seconds, as
    ``workers.<name>.timeout``; left out, there is no limit.

    Raises what the handler raises, Reject and Retry too; SettingsError for wrong options;
    `workers.inbox.ReplyError` for a result that has no form in JSON; and TimeoutError once a handler has ended that
    ran for too long.

    Each call has an event loop of its own. In a coroutine, await `arun`.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return tasks.run(arun(handler, event, ledger=ledger, options=options, timeout=timeout))
    raise RuntimeError("run() is for tests that are no coroutines; in a coroutine write `await arun(...)`")


async def arun(
    handler: Handler,
    event: Event,
    *,
    ledger: MemoryLedger | None = None,
    options: Mapping[str, Any] | Options | None = None,
    timeout: float | None = None,  # noqa: ASYNC109 - it is the worker's, which waits for the handler's end
) -> dict[str, Any] | None:
    """The same as `run`, for tests that are coroutines."""
    ledger = MemoryLedger() if ledger is None else ledger
    if not isinstance(handler, Handler):
        raise TypeError(f"{handler!r} is no handler; mark it with @handler")
    bound = handler.configured({} if options is None else options, ledger.worker)
    return await attempt(bound, event, ledger, timeout)


async def attempt(bound: Run, event: Event, ledger: MemoryLedger, limit: float | None) -> dict[str, Any] | None:
    """One run of a handler whose options are bound. `limit` is in seconds; returns and raises as `arun`."""
    token = current_effects.set(ledger.of(event))
    try:
        result = await Attempts.run_handler(bound, event, limit)
    finally:
        current_effects.reset(token)
    text = outcome_text(result)
    return None if text is None else json.loads(text)
