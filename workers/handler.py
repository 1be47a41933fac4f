"""What an author of a worker writes: a function from an event to a result, a coroutine or one that may block."""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Concatenate, Protocol, TypeVar, cast, overload

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from bridge.errors import SettingsError
from bridge.event import Event
from bridge.settings.models import Model
from workers.payload import read_json
from workers.threads import in_thread

Result = Mapping[str, Any] | None
"""What a handler returns: a JSON object for the worker's reply function, or nothing."""

Run = Callable[[Event], Awaitable[Result]]
"""A handler with its options bound: what the runtime calls."""


class Retry(Exception):  # noqa: N818 - an author raises it as a request, not as an error
    """Try this event again later, without calling it a failure of the code.

    `after` is in seconds; None leaves the delay to the worker's backoff. It counts as an attempt.
    """

    def __init__(self, reason: str = "", *, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Reject(Exception):  # noqa: N818
    """This event can never be handled: dead-letter it at once, with this reason."""


class Options(Model):
    """Base of a handler's own settings, ``[workers.<name>.options]``. Frozen; an unknown key is an error. A field `x`
    of the type SecretStr may be given as ``x_file``, the path of a file that holds it."""


P_contra = TypeVar("P_contra", bound=BaseModel, contravariant=True)
O_contra = TypeVar("O_contra", bound=Options, contravariant=True)


class FunctionWithOptions(Protocol[O_contra]):
    """A function that takes the worker's options after the event."""

    def __call__(self, event: Event, options: O_contra, /) -> Result | Awaitable[Result]: ...


class FunctionWithPayload(Protocol[P_contra]):
    """A function that takes the event's payload, as its model reads it, after the event."""

    def __call__(self, event: Event, payload: P_contra, /) -> Result | Awaitable[Result]: ...


class FunctionWithBoth(Protocol[P_contra, O_contra]):
    """A function that takes event, payload and options."""

    def __call__(self, event: Event, payload: P_contra, options: O_contra, /) -> Result | Awaitable[Result]: ...


@dataclass(frozen=True, slots=True)
class Handler:
    """A function of an event and, where it has a model of them, of options; and the topics that it was written for.

    It is awaited like a coroutine. `workers.testing.run` calls it as a worker does.
    """

    function: Callable[Concatenate[Event, ...], Awaitable[Result]]
    topics: tuple[str, ...]
    options: type[Options] | None = None
    needs_reply: bool = False

    async def __call__(self, event: Event, *options: Options) -> Result:
        return await self.function(event, *options)

    def configured(self, options: Mapping[str, Any] | Options, worker: str) -> Run:
        """The function with its options bound: a table, or an instance of their model. Raises as `options_of`."""
        bound = self.options_of(options, worker)
        return self.function if bound is None else partial(_with_options, self.function, bound)

    def options_of(self, options: Mapping[str, Any] | Options, worker: str) -> Options | None:
        """The options as their model has them; None for a handler that takes none.

        Raises SettingsError, one line a mistake, each naming its key.
        """
        prefix = f"workers.{worker}.options"
        if self.options is None:
            if options:
                keys = "\n".join(f"{prefix}.{key}: unknown key; this handler takes no options" for key in dict(options))
                raise SettingsError(keys)
            return None
        try:
            return self.options.model_validate(options)
        except ValidationError as error:
            raise SettingsError(explain(error, self.options, prefix)) from None


async def _with_options(function: Callable[..., Awaitable[Result]], options: Options, event: Event) -> Result:
    return await function(event, options)


@overload
def handler(
    *topics: str, needs_reply: bool = False
) -> Callable[[Callable[[Event], Result | Awaitable[Result]]], Handler]: ...
@overload
def handler(
    *topics: str, options: type[O_contra], needs_reply: bool = False
) -> Callable[[FunctionWithOptions[O_contra]], Handler]: ...
@overload
def handler(
    *topics: str, payload: type[P_contra], needs_reply: bool = False
) -> Callable[[FunctionWithPayload[P_contra]], Handler]: ...
@overload
def handler(
    *topics: str, payload: type[P_contra], options: type[O_contra], needs_reply: bool = False
) -> Callable[[FunctionWithBoth[P_contra, O_contra]], Handler]: ...
def handler(
    *topics: str,
    payload: type[BaseModel] | None = None,
    options: type[Options] | None = None,
    needs_reply: bool = False,
) -> Callable[[Any], Handler]:
    """Marks a function as a handler. `topics` are patterns: ``*`` one word, ``#`` any number of words.

    A worker subscribes to these, unless its settings name others. With `payload`, a model of the event's payload, the
    function takes an instance of it after the event; a payload that does not fit is rejected with the names of its
    wrong fields. With `options`, a model of the worker's ``[workers.<name>.options]``, the function takes an instance
    of it as its last argument. `needs_reply`: what it returns is all that comes of it, so a worker without a `reply`
    does not start.

    ``async def`` runs in the worker's event loop, and must not block it; ``def`` runs in a thread of its own, as many
    at once as the worker's `concurrency`.
    """
    if not all(isinstance(topic, str) for topic in topics):
        raise TypeError('@handler: write its topics behind it, @handler("shop.order.placed"), or @handler() without')
    wanted = ["the event", *(["its payload"] if payload else []), *(["the worker's options"] if options else [])]

    def mark(function: Callable[..., Any]) -> Handler:
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            raise TypeError(f"@handler: {function.__qualname__} yields; return the result instead")
        if len(inspect.signature(function).parameters) != len(wanted):
            raise TypeError(f"@handler: {function.__qualname__} must take {_listed(wanted)}, and nothing else")
        called = function if inspect.iscoroutinefunction(function) else _threaded(function)
        if payload is not None:
            called = _reading(called, payload)
        return Handler(
            cast("Callable[Concatenate[Event, ...], Awaitable[Result]]", called), topics, options, needs_reply
        )

    return mark


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _reading(function: Callable[..., Awaitable[Result]], model: type[BaseModel]) -> Callable[..., Awaitable[Result]]:
    """The function behind the reading of its payload, which raises Reject for one that does not fit the model."""

    @wraps(function)
    async def run(event: Event, *options: Options) -> Result:
        try:
            payload = model.model_validate(read_json(event.payload))
        except ValidationError as error:
            raise Reject(explain(error, model, "payload").replace("\n", "; ")) from None
        except (ValueError, RecursionError) as error:
            raise Reject(f"payload: is not JSON: {error}") from None
        return await function(event, payload, *options)

    return run


def _threaded(function: Callable[..., Result]) -> Callable[..., Awaitable[Result]]:
    @wraps(function)
    async def run(*args: Any) -> Result:
        return await in_thread(function, *args)

    return run


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """What a model refused, one line a mistake with the dotted name of its key; the values are not repeated."""
    lines = []
    for detail in error.errors(include_input=False, include_url=False):
        key = ".".join([*([prefix] if prefix else []), *map(str, detail["loc"])])
        what = _what(detail, model)
        lines.append(f"{key}: {what}" if key else what)
    return "\n".join(lines)


def _what(detail: ErrorDetails, model: type[BaseModel]) -> str:
    match detail["type"]:
        case "extra_forbidden" if len(detail["loc"]) == 1:
            known = (field.alias or name for name, field in model.model_fields.items())
            return f"unknown key; known: {', '.join(sorted(known))}"
        case "extra_forbidden":
            return "unknown key"
        case "missing":
            return "is missing"
        case "model_type" | "model_attributes_type":
            return "must be an object of named fields"
        # These texts of pydantic's quote what they refuse.
        case "union_tag_invalid":
            return f"its {detail['ctx']['discriminator']} is none of {detail['ctx']['expected_tags']}"
        case "uuid_parsing":
            return "is not a UUID"
        case _:
            return detail["msg"].removeprefix("Value error, ")
