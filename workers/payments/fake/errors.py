"""How Stripe says no."""

from typing import Any


class StripeRefusal(Exception):  # noqa: N818 - it is an answer
    """An answer that is an error. One that began execution is kept under the request's idempotency key."""

    def __init__(
        self,
        status: int,
        type: str,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        executed: bool = False,
        **more: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.executed = executed
        error = {"type": type, "message": message, "code": code, "param": param, **more}
        self.body = {"error": {name: value for name, value in error.items() if value is not None}}


def invalid(message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> StripeRefusal:
    """A parameter that no execution begins with."""
    return StripeRefusal(status, "invalid_request_error", message, param=param, code=code)


def unexpected(message: str, code: str, **more: Any) -> StripeRefusal:
    """Found in execution: the object does not allow it."""
    return StripeRefusal(400, "invalid_request_error", message, code=code, executed=True, **more)
