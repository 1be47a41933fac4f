"""Stripe, through its own SDK: one call under an idempotency key, and what its answer means.

The SDK's own retries are off, since a handler's attempts are ours to count, and an attempt that waits for a repetition
may be cancelled in the middle of a charge. What Stripe documents ("Error codes", "Low-level error handling",
"Idempotent requests") is sorted into three: it decided, which is an outcome; it did not, and the same call with the
same key may be made again; or it will never, since the request is wrong.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final
from weakref import WeakKeyDictionary

import stripe
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from workers.handler import Reject, Retry
from workers.payments.options import PaymentOptions
from workers.payments.outcome import NOT_EXECUTED, Outcome, of_intent, of_refund
from workers.payments.request import Cancel, Capture, Charge, Operation, Refund

EVENT: Final = "pgbridge_event"
KEY: Final = "pgbridge_key"
"""Names in the metadata of whatever is made: the event's id, and the idempotency key, by which it is found again."""

_CLOCKS: Final = timedelta(minutes=5)
"""By how much Stripe's clock may differ from PostgreSQL's."""

_LOCKED: Final = 1.0
_LIMITED: Final = 5.0
"""Seconds to wait for an object that another request holds, and for a limit of rates, unless Stripe says how long."""

_PAGE: Final = 100

_PATIENTLY: Final = AsyncRetrying(
    retry=retry_if_exception_type((stripe.RateLimitError, stripe.APIConnectionError)),
    wait=wait_exponential_jitter(initial=1.0, max=5.0),
    stop=stop_after_attempt(4),
    reraise=True,
)
"""For what only looks. A handler's attempt, which has a time, looks for one payment, which takes a page or two."""


class StripeAccount:
    """One account. `timeout` is in seconds, for one call."""

    def __init__(self, api_key: str, *, base: str, timeout: float) -> None:
        self._http = stripe.HTTPXClient(timeout=timeout)
        self._client = stripe.StripeClient(
            api_key, base_addresses={"api": base}, max_network_retries=0, http_client=self._http
        )

    async def perform(self, operation: Operation, key: str, event_id: str, begun: datetime) -> Outcome:
        """Does it under the key, which was begun then: what Stripe decided.

        Raises Retry where the same call under the same key is to be made again, Reject where it never will do, and
        stripe.StripeError for what only an operator can mend, as a wrong API key.
        """
        metadata = {**operation.metadata, EVENT: event_id, KEY: key}
        parameters = {**operation.parameters(), "metadata": metadata}
        try:
            return await self._call(operation, parameters, key)
        except stripe.CardError as error:
            return _declined(operation, error)
        except stripe.RateLimitError as error:
            locked = _code(error) == "lock_timeout"
            raise Retry(_said(error), after=_after(error, _LOCKED if locked else _LIMITED)) from error
        except stripe.IdempotencyError as error:
            if error.http_status == 409:
                raise Retry(_said(error), after=_after(error, _LOCKED)) from error
            raise Reject(f"{_said(error)} Now: {_listed(parameters)}") from error
        except stripe.InvalidRequestError as error:
            return await self._refused(operation, error)
        except stripe.APIConnectionError as error:
            # It may have happened, or not: the same key tells.
            raise Retry(f"Stripe did not answer: {_said(error)}") from error
        except stripe.APIError as error:
            if error.http_status == 409:
                raise Retry(_said(error), after=_after(error, _LOCKED)) from error
            if _header(error, "idempotent-replayed") != "true":
                raise Retry(_said(error), after=_after(error, None)) from error
            # The key will never say anything else, so what happened must be looked for.
            return await self.find(operation, key, begun) or _not_executed(operation)

    async def find(self, operation: Operation, key: str, begun: datetime) -> Outcome | None:
        """What the key brought about, as Stripe's lists have it; None where nothing. Raises stripe.StripeError."""
        match operation:
            case Charge():
                return (await self.find_charges({key: operation}, begun)).get(key)
            case Refund():
                given = {"payment_intent": operation.payment_intent}
                async for refund in _all(self._client.v1.refunds.list_async, given):
                    if (refund["metadata"] or {}).get(KEY) == key:
                        return of_refund(refund)
            case Capture() | Cancel():
                intent = await self.intent(operation.payment_intent)
                done = ("succeeded",) if isinstance(operation, Capture) else ("canceled",)
                if intent["status"] in done:
                    return of_intent(operation.operation, intent)
        return None

    async def find_charges(
        self, charges: Mapping[str, Charge], since: datetime, until: datetime | None = None
    ) -> dict[str, Outcome]:
        """What these brought about, by their keys, of what was made between those times: the newest are looked at
        first, and it ends where all are found. Raises stripe.StripeError."""
        found: dict[str, Outcome] = {}
        created = {"gte": int((since - _CLOCKS).timestamp())}
        if until is not None:
            created["lte"] = int((until + _CLOCKS).timestamp())
        async for intent in _all(self._client.v1.payment_intents.list_async, {"created": created}):
            key = (intent["metadata"] or {}).get(KEY, "")
            if key in charges:
                found[key] = of_intent("charge", intent)
                if len(found) == len(charges):
                    break
        return found

    async def intent(self, id: str) -> Mapping[str, Any]:
        """A PaymentIntent as it is now. Raises stripe.StripeError."""
        return (await self._client.v1.payment_intents.retrieve_async(id)).to_dict()

    async def refund(self, id: str) -> Mapping[str, Any]:
        """A refund as it is now. Raises stripe.StripeError."""
        return (await self._client.v1.refunds.retrieve_async(id)).to_dict()

    async def _call(self, operation: Operation, parameters: Any, key: str) -> Outcome:
        intents, options = self._client.v1.payment_intents, stripe.RequestOptions(idempotency_key=key)
        match operation:
            case Charge():
                return of_intent(operation.operation, (await intents.create_async(parameters, options)).to_dict())
            case Capture():
                captured = await intents.capture_async(operation.payment_intent, parameters, options)
                return of_intent(operation.operation, captured.to_dict())
            case Cancel():
                del parameters["metadata"]  # Stripe takes none here
                canceled = await intents.cancel_async(operation.payment_intent, parameters, options)
                return of_intent(operation.operation, canceled.to_dict())
            case Refund():
                return of_refund((await self._client.v1.refunds.create_async(parameters, options)).to_dict())

    async def _refused(self, operation: Operation, error: stripe.InvalidRequestError) -> Outcome:
        """What an object's state forbids is an outcome, which tells the state; what is wrong in the request is not."""
        if isinstance(operation, Charge) or _code(error) not in _STATES:
            raise Reject(_said(error)) from error
        intent = await self.intent(operation.payment_intent)
        return of_intent(operation.operation, intent, _code(error)).model_copy(update={"amount": 0})


_STATES: Final = (
    "payment_intent_unexpected_state",
    "charge_already_refunded",
    "charge_already_captured",
    "amount_too_large",
    "charge_expired_for_capture",
)
"""Codes that say that the object does not allow it as it is now."""


def _declined(operation: Operation, error: stripe.CardError) -> Outcome:
    intent = error.error.payment_intent if error.error is not None else None
    if intent is None:
        return Outcome(
            operation=operation.operation, status="requires_payment_method", amount=0, code=error.code or "card_error"
        )
    return of_intent(operation.operation, intent.to_dict(), error.code, getattr(error.error, "decline_code", None))


def _not_executed(operation: Operation) -> Outcome:
    return Outcome(operation=operation.operation, status=NOT_EXECUTED, amount=0, code="api_error")


async def _all(
    list_page: Callable[[Any], Awaitable[Any]], given: Mapping[str, Any]
) -> AsyncIterator[Mapping[str, Any]]:
    """All that a list has. A page is asked for again where Stripe says that it is too much, or does not answer."""
    after: dict[str, str] = {}
    while True:
        page: Any = await _PATIENTLY.copy()(list_page, {**given, **after, "limit": _PAGE})
        for each in page.data:
            yield each.to_dict()
        if not page.has_more:
            return
        after = {"starting_after": page.data[-1].id}


def _after(error: stripe.StripeError, otherwise: float | None) -> float | None:
    told = _header(error, "retry-after")
    return float(told) if told is not None and told.isdecimal() else otherwise


def _header(error: stripe.StripeError, name: str) -> str | None:
    return next((value for key, value in (error.headers or {}).items() if key.lower() == name), None)


def _code(error: stripe.StripeError) -> str | None:
    return error.code or (error.error.code if error.error is not None else None)


def _said(error: stripe.StripeError) -> str:
    """Stripe's message, with its code and the parameter that it is about; it names no secret."""
    about = [str(part) for part in (error.http_status, _code(error), getattr(error, "param", None)) if part]
    return f"Stripe: {error.user_message or 'no message'} ({', '.join(about) or type(error).__name__})"


def _listed(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in sorted(parameters.items()) if name != "metadata")


_accounts: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str, float], StripeAccount]] = (
    WeakKeyDictionary()
)
"""By event loop, since connections live in one."""


def account_of(options: PaymentOptions) -> StripeAccount:
    """The account of these options, with the connections that this event loop has to it."""
    ours = _accounts.setdefault(asyncio.get_running_loop(), {})
    which = (options.api_key.get_secret_value(), options.api_base, options.timeout)
    if which not in ours:
        key, base, timeout = which
        ours[which] = StripeAccount(key, base=base, timeout=timeout)
    return ours[which]
