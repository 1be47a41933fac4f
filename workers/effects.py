"""Outside effects: recorded before they happen, so that a second attempt knows what the first one began.

    async with effect("charge") as charge:
        if charge.result is None:
            charge.result = await pay(..., idempotency_key=charge.idempotency_key)

In a thread, as that of a handler that is no coroutine, it is ``with effect("charge") as charge``.

PostgreSQL cannot take a card's charge back, so outside effects happen at least once. The key, ``<worker>:<event
id>:<operation>``, is the same at every attempt and lets the other side suppress repetitions; the result, once it
is known, spares later attempts the call.

The other side forgets keys after a time, and repeating the call is then another effect. So an effect may have an age
from which on nobody knows what became of it, unless somebody finds out and puts that on record (``settle_effect()``).
"""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Generic, Protocol, cast, overload

from pydantic import BaseModel, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from typing_extensions import TypeVar

from workers.handler import explain
from workers.result import recorded
from workers.threads import await_in_loop

Recorded = Mapping[str, Any]
"""The result of an effect as it is on record: a JSON object."""

R = TypeVar("R", default=Recorded)
M = TypeVar("M", bound=BaseModel)

_have_json: Final[set[type[BaseModel]]] = set()
"""Models of results that were looked at before."""

_FRESH: Final = re.compile(r".*:\d+")
"""Ends of keys of effects that began again."""

_LONGEST_KEY: Final = 255
"""Characters that Stripe takes (its documentation, "Idempotent requests"); others take as many or more."""

_LAST_WORD: Final = 5.0
"""Seconds that recording a result may take in a handler whose time is up."""


class EffectUnknown(Exception):  # noqa: N818 - no error of the code: nobody knows what became of the effect
    """An effect was begun longer ago than its `max_age`, and no result is on record, so that repeating it under its key
    may bring it about twice. Its event is a dead letter, with the code ``unknown_effect``."""


class EffectChanged(Exception):  # noqa: N818
    """An effect was begun, no result is on record, and what it is given now is not what it was given then, so that
    repeating it is another effect under the same key. Its event is a dead letter, with the code ``changed_effect``."""


@dataclass(slots=True)
class Effect(Generic[R]):
    """One outside effect of the event in hand."""

    operation: str
    idempotency_key: str
    started_at: datetime
    """When the first attempt began it, by the database's clock."""
    result: R | None = None
    """What an earlier attempt got; the handler sets it once the effect has happened. A JSON object, or an instance of
    the model that was named."""
    age: timedelta = timedelta(0)
    """How long ago it was begun when this attempt asked, by the database's clock: the age of the key."""
    given: Recorded | None = None
    """What it was begun with, where anything was named."""


class EffectStore(Protocol):
    """Where effects are recorded: a claim in the inbox, or a test's dictionary."""

    async def begin_effect(self, operation: str, given: Recorded | None) -> Effect[Recorded]:
        """Records that the effect is about to happen, and what it is given; returns what is on record."""

    async def begin_effect_again(self, effect: Effect[Recorded], given: Recorded | None) -> Effect[Recorded]:
        """Gives an effect that has a result a fresh key, keeping the result with those that were refused; returns what
        is on record then."""

    async def end_effect(self, effect: Effect[Recorded]) -> None:
        """Records its result."""


current_effects: ContextVar[EffectStore] = ContextVar("pgbridge_effects")
"""Where the effects of the event in hand are recorded. The worker sets it around a handler; a test may set its own."""


class effect(Generic[R]):  # noqa: N801 - authors write it like `open`
    """Records an outside effect of the event in hand around the code that brings it about.

    When the code raises before it has set the result, the next attempt finds the effect begun. Only for use in a
    handler, or where `current_effects` is set; raises LookupError elsewhere.
    """

    @overload
    def __init__(
        self: "effect[Recorded]",
        operation: str,
        *,
        given: Mapping[str, Any] | None = None,
        max_age: timedelta | None = None,
        again: Callable[[Recorded], bool] | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: "effect[M]",
        operation: str,
        *,
        given: Mapping[str, Any] | None = None,
        result: type[M],
        max_age: timedelta | None = None,
        again: Callable[[M], bool] | None = None,
    ) -> None: ...
    def __init__(
        self,
        operation: str,
        *,
        given: Mapping[str, Any] | None = None,
        result: type[Any] | None = None,
        max_age: timedelta | None = None,
        again: Callable[[Any], bool] | None = None,
    ) -> None:
        """`given`: the parameters of the effect, a JSON object; where an attempt before began it with others, and has
        no result, it raises EffectChanged, with both. `max_age`: for how long the other side knows the key; an effect
        begun before that without a result raises EffectUnknown. `again`: whether a result on record, of an earlier
        attempt, is a refusal for good, after which the effect begins again under a fresh key,
        ``<worker>:<event id>:<operation>:2``. `result`: a model of the result, which is looked at before the effect:
        one that has no form in JSON is a TypeError.

        Raises ValueError for an operation that ends as fresh keys do, for what is given and has no form in JSON, and
        for a `max_age` that is not positive.
        """
        if not operation or _FRESH.fullmatch(operation):
            raise ValueError(f"effect({operation!r}): name an operation that does not end in a colon and a number")
        if max_age is not None and max_age <= timedelta(0):
            raise ValueError(f"effect({operation!r}): max_age must be more than nothing, and is {max_age}")
        self._operation = operation
        self._model: type[BaseModel] | None = result
        if self._model is not None:
            _require_json(self._model)
        self._given = None if given is None else recorded(given, f"effect({operation!r}): given")
        self._max_age = max_age
        self._again = again

    async def __aenter__(self) -> Effect[R]:
        self._store = current_effects.get()
        on_record = await self._store.begin_effect(self._operation, self._given)
        self._effect = self._opened(on_record)
        if self._effect.result is not None and self._again is not None and self._again(self._effect.result):
            self._effect = self._opened(await self._store.begin_effect_again(on_record, self._given))
        self._known = self._effect.result
        if self._known is None:
            self._require_repeatable(self._effect)
        return self._effect

    def _require_repeatable(self, begun: Effect[R]) -> None:
        """Raises where what may have been begun before must not happen now."""
        if len(begun.idempotency_key) > _LONGEST_KEY:
            raise ValueError(
                f"effect({self._operation!r}): its key has {len(begun.idempotency_key)} characters, and services take "
                f"{_LONGEST_KEY}; shorten the operation or the worker's name"
            )
        about = f"the effect {self._operation} was begun {_words(begun.age)} ago under the key {begun.idempotency_key}"
        if self._max_age is not None and begun.age > self._max_age:
            raise EffectUnknown(
                f"{about}, no result is on record, and the other side may have forgotten the key "
                f"(max_age: {_words(self._max_age)}). Find out what became of it, put that on record with "
                "bridge.settle_effect(), and replay the event"
            )
        if self._given is not None and begun.given is not None and self._given != begun.given:
            raise EffectChanged(
                f"{about}, no result is on record, and it was given something else: "
                f"{_differences(begun.given, self._given)}"
            )

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        effect = self._effect
        if effect.result is None or effect.result is self._known:
            return
        result = effect.result
        told = cast("Recorded", result if self._model is None else _plain(cast("BaseModel", result)))
        recording = self._store.end_effect(Effect(effect.operation, effect.idempotency_key, effect.started_at, told))
        # What has happened is put on record, whatever the code raised after it.
        async with asyncio.timeout(_LAST_WORD if kind is asyncio.CancelledError else None):
            await recording

    def __enter__(self) -> Effect[R]:
        return await_in_loop(self.__aenter__())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await_in_loop(self.__aexit__(kind))

    def _opened(self, on_record: Effect[Recorded]) -> Effect[R]:
        result: Any = on_record.result
        if result is not None and self._model is not None:
            try:
                result = self._model.model_validate(result)
            except ValidationError as error:
                what = explain(error, self._model, "result").replace("\n", "; ")
                raise ValueError(
                    f"effect({self._operation!r}): what is on record does not fit its model: {what}"
                ) from None
        return Effect(
            self._operation,
            on_record.idempotency_key,
            on_record.started_at,
            result,
            on_record.age,
            on_record.given,
        )


def _require_json(model: type[BaseModel]) -> None:
    if model in _have_json:
        return
    try:
        model.model_json_schema(mode="serialization")
    except PydanticInvalidForJsonSchema as error:
        raise TypeError(f"{model.__name__} has no form in JSON, so it cannot be an effect's result: {error}") from error
    _have_json.add(model)


def _plain(result: BaseModel) -> Recorded:
    """As JSON has it; what a field of any type holds that JSON does not, as it is."""
    try:
        return result.model_dump(mode="json")
    except ValueError:
        return result.model_dump()


def _differences(then: Recorded, now: Recorded) -> str:
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return "; ".join(f"{name} {json.dumps(then.get(name))} then, {json.dumps(now.get(name))} now" for name in names)


def _words(span: timedelta) -> str:
    return str(timedelta(seconds=round(span.total_seconds())))
