"""The layer that suppresses repetitions: the first outcome of a key is the outcome of all.

Kept is whatever execution answers, errors and 500s included. What does not begin execution keeps nothing: parameters
that are wrong, or a request under the same key that is still being executed.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from workers.payments.fake.errors import StripeRefusal


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request is told."""

    status: int
    body: Mapping[str, Any]
    replayed: bool = False


@dataclass(slots=True)
class _Seen:
    request: tuple[str, Mapping[str, Any]]
    at: float
    answer: Answer | None = None


class Idempotency:
    """What is known of keys. Thread-safe."""

    def __init__(self, clock: Callable[[], float], keep: float) -> None:
        """`keep`: seconds after which a key is forgotten, by `clock`."""
        self._clock = clock
        self._keep = keep
        self._keys: dict[str, _Seen] = {}
        self._lock = threading.Lock()

    def once(self, key: str | None, path: str, given: Mapping[str, Any], execute: Callable[[], Answer]) -> Answer:
        """Executes the request, or gives the answer of the first one under its key.

        Raises StripeRefusal for a key of other parameters, and for one whose first request is still being executed.
        """
        if key is None:
            return execute()
        with self._lock:
            seen = self._keys.get(key)
            if seen is not None and self._clock() - seen.at >= self._keep:
                seen = None
            if seen is not None:
                return self._again(seen, (path, given))
            mine = self._keys[key] = _Seen((path, given), self._clock())
        try:
            mine.answer = execute()
        except StripeRefusal as refusal:
            if not refusal.executed:
                self._forget(key, mine)
                raise
            mine.answer = Answer(refusal.status, refusal.body)
        except BaseException:
            self._forget(key, mine)
            raise
        return mine.answer

    def _again(self, seen: _Seen, request: tuple[str, Mapping[str, Any]]) -> Answer:
        if seen.request != request:
            raise StripeRefusal(
                400,
                "idempotency_error",
                "Keys for idempotent requests can only be used with the endpoint and the parameters that they were "
                "first used with",
            )
        if seen.answer is None:
            raise StripeRefusal(
                409,
                "idempotency_error",
                "Another request under this idempotency key is being executed",
                code="idempotency_key_in_use",
            )
        return Answer(seen.answer.status, seen.answer.body, replayed=True)

    def _forget(self, key: str, mine: _Seen) -> None:
        with self._lock:
            if self._keys.get(key) is mine:
                del self._keys[key]
