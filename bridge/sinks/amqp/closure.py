"""Why a connection or a channel ended."""

from dataclasses import dataclass

ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED, NOT_ALLOWED = 403, 404, 406, 530
"""AMQP's reply codes, as far as we act on them."""


@dataclass(frozen=True, slots=True)
class Closure:
    """Why a connection or channel ended. `code` is AMQP's reply code; 0 when the broker gave none."""

    reason: str
    code: int = 0

    def __str__(self) -> str:
        return f"{self.reason} ({self.code})" if self.code else self.reason


class ClosedError(Exception):
    """The connection or channel ended before the answer came."""

    def __init__(self, closure: Closure) -> None:
        super().__init__(str(closure))
        self.closure = closure
