"""What an author of a worker writes: a function from an event to a result, a coroutine or one that may block."""

import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Concatenate, Protocol, TypeVar, cast, overload

from pydantic import BaseModel, ConfigDict, ValidationError

from bridge.errors import SettingsError
from bridge.event import Event
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


class Options(BaseModel):
    """Base of a handler's own settings, ``[workers.<name>.options]``. Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


O_contra = TypeVar("O_contra", bound=Options, contravariant=True)


class FunctionWithOptions(Protocol[O_contra]):
    """A function that takes the worker's options after the event."""

    def __call__(self, event: Event, options: O_contra, /) -> Result | Awaitable[Result]: ...


@dataclass(frozen=True, slots=True)
class Handler:
    """A function, the topics it was written for, and the model of its options. Tests await it like a coroutine."""

    function: Callable[Concatenate[Event, ...], Awaitable[Result]]
    topics: tuple[str, ...]
    options: type[Options] | None = None

    async def __call__(self, event: Event, *options: Options) -> Result:
        return await self.function(event, *options)

    def configured(self, options: Mapping[str, Any], worker: str) -> Run:
        """The function with its options bound. Raises SettingsError, one line a mistake, each naming its key."""
        prefix = f"workers.{worker}.options"
        if self.options is None:
            if options:
                keys = "\n".join(f"{prefix}.{key}: unknown key; this handler takes no options" for key in options)
                raise SettingsError(keys)
            return self.function
        try:
            bound = self.options.model_validate(options)
        except ValidationError as error:
            raise SettingsError(explain(error, self.options, prefix)) from None
        return partial(_with_options, self.function, bound)


async def _with_options(function: Callable[..., Awaitable[Result]], options: Options, event: Event) -> Result:
    return await function(event, options)


@overload
def handler(*topics: str) -> Callable[[Callable[[Event], Result | Awaitable[Result]]], Handler]: ...
@overload
def handler(*topics: str, options: type[O_contra]) -> Callable[[FunctionWithOptions[O_contra]], Handler]: ...
def handler(*topics: str, options: type[Options] | None = None) -> Callable[[Any], Handler]:
    """Marks a function as a handler. `topics` are patterns: ``*`` one word, ``#`` any number of words.

    A worker subscribes to these, unless its settings name others. With `options`, a model of the worker's
    ``[workers.<name>.options]``, the function takes an instance of it as its second argument.

    ``async def`` runs in the worker's event loop, and must not block it; ``def`` runs in a thread of its own, as many
    at once as the worker's `concurrency`.
    """

    def mark(function: Callable[..., Any]) -> Handler:
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            raise TypeError(f"@handler: {function.__qualname__} yields; return the result instead")
        wanted = 1 if options is None else 2
        if len(inspect.signature(function).parameters) != wanted:
            takes = "the event" if options is None else "the event and its options"
            raise TypeError(f"@handler: {function.__qualname__} must take {takes}, and nothing else")
        called = function if inspect.iscoroutinefunction(function) else _threaded(function)
        return Handler(cast("Callable[Concatenate[Event, ...], Awaitable[Result]]", called), topics, options)

    return mark


def _threaded(function: Callable[..., Result]) -> Callable[..., Awaitable[Result]]:
    @wraps(function)
    async def run(*args: Any) -> Result:
        return await in_thread(function, *args)

    return run


def load_handler(place: str, worker: str) -> Handler:
    """The handler at ``package.module:function``. Raises SettingsError, naming the worker's key and what is wrong."""
    key = f"workers.{worker}.handler"
    module_name, _, attribute = place.partition(":")
    if not module_name or not attribute:
        raise SettingsError(f"{key}: {place!r} is not of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SettingsError(
            f"{key}: cannot import {module_name}: {error}. "
            "Install the package that holds it, or put its folder on PYTHONPATH"
        ) from error
    found = getattr(module, attribute, None)
    if not isinstance(found, Handler):
        raise SettingsError(f"{key}: {module_name} has no @handler named {attribute}")
    return found


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """What a model refused, one line a mistake with the dotted name of its key; the values are not repeated."""
    lines = []
    for detail in error.errors(include_input=False, include_url=False, include_context=False):
        key = ".".join([*([prefix] if prefix else []), *map(str, detail["loc"])])
        match detail["type"]:
            case "extra_forbidden" if len(detail["loc"]) == 1:
                what = f"unknown key; known: {', '.join(sorted(model.model_fields))}"
            case "extra_forbidden":
                what = "unknown key"
            case "missing":
                what = "is missing"
            case _:
                what = detail["msg"].removeprefix("Value error, ")
        lines.append(f"{key}: {what}" if key else what)
    return "\n".join(lines)
