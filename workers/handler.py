"""What an author of a worker writes: an async function from an event to a result."""

import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.errors import SettingsError
from bridge.event import Event

Result = Mapping[str, Any] | None
"""What a handler returns: a JSON object for the worker's reply function, or nothing."""


class Retry(Exception):  # noqa: N818 - an author raises it as a request, not as an error
    """Try this event again later, without calling it a failure of the code.

    `after` is in seconds; None leaves the delay to the worker's backoff.
    """

    def __init__(self, reason: str = "", *, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Reject(Exception):  # noqa: N818
    """This event can never be handled: dead-letter it at once, with this reason."""


@dataclass(frozen=True, slots=True)
class Handler:
    """A function and the topics it was written for."""

    function: Callable[[Event], Awaitable[Result]]
    topics: tuple[str, ...]

    async def __call__(self, event: Event) -> Result:
        return await self.function(event)


def handler(*topics: str) -> Callable[[Callable[[Event], Awaitable[Result]]], Handler]:
    """Marks a function as a handler. `topics` are patterns: ``*`` one word, ``#`` any number of words.

    A worker subscribes to these, unless its settings name others.
    """

    def mark(function: Callable[[Event], Awaitable[Result]]) -> Handler:
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"@handler needs an async function; {function.__qualname__} is none")
        return Handler(function, topics)

    return mark


def load_handler(name: str) -> Handler:
    """The handler at ``package.module:function``. Raises SettingsError, saying what is wrong with the name."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise SettingsError(f"handler {name!r} is not of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SettingsError(
            f"handler {name!r}: cannot import {module_name}: {error}. "
            "Install the package that holds it, or put its folder on PYTHONPATH"
        ) from error
    found = getattr(module, attribute, None)
    if not isinstance(found, Handler):
        raise SettingsError(f"handler {name!r}: {module_name} has no @handler named {attribute}")
    return found
