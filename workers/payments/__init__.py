"""Payments with Stripe: an event ``shop.payment.requested`` is charged, captured, cancelled or refunded once.

The payload, where ``?`` marks what may be left out; amounts are integers in the currency's minor unit::

    {"amount": 1999, "currency": "eur", "payment_method": "pm_...", "customer"?: "cus_...", "capture"?: false,
     "description"?: "...", "metadata"?: {...}}
    {"operation": "capture", "payment_intent": "pi_...", "amount"?: 1500}
    {"operation": "cancel", "payment_intent": "pi_...", "reason"?: "abandoned"}
    {"operation": "refund", "payment_intent": "pi_...", "amount"?: 500, "reason"?: "duplicate"}

The reply gets an `Outcome`: what Stripe decided, a declined card too. A handler of one's own calls `perform`.

``stripe_account.py`` tells what an answer of Stripe's means, ``request.py`` and ``outcome.py`` are the payload and the
reply's, and ``fake/`` is a Stripe to test against.
"""

import asyncio
from datetime import timedelta
from typing import Annotated, Final
from weakref import WeakKeyDictionary

from pydantic import StringConstraints

from bridge.event import Event
from bridge.settings.models import Secret, SomeDuration
from workers.effects import effect
from workers.handler import Options, Result, Retry, handler
from workers.payments.outcome import NOT_EXECUTED, Outcome
from workers.payments.request import Cancel, Capture, Charge, Operation, Refund, Request
from workers.payments.stripe_account import StripeAccount

__all__ = ["KEY_AGE", "Cancel", "Capture", "Charge", "Outcome", "PaymentOptions", "Refund", "pay", "perform"]

KEY_AGE: Final = timedelta(hours=23)
"""After that a key may be unknown to Stripe, which keeps them for 24 hours at least."""


class PaymentOptions(Options):
    """``[workers.payments.options]``."""

    api_key: Secret
    """Stripe's secret or restricted key. A restricted one needs to write PaymentIntents and refunds."""
    api_base: Annotated[str, StringConstraints(pattern=r"^https?://[^/]+$")] = "https://api.stripe.com"
    """Where Stripe is; another one for tests."""
    timeout: SomeDuration = 20.0
    """Seconds that one call may take. Less than the worker's `timeout`, or an attempt ends in the middle of a call."""


@handler("shop.payment.requested", payload=Request, options=PaymentOptions)
async def pay(event: Event, request: Request, options: PaymentOptions) -> Result:
    """Does what the payload asks for, and returns the outcome."""
    outcome = await perform(event, request.root, options)
    return outcome.model_dump(mode="json")


async def perform(event: Event, operation: Operation, options: PaymentOptions) -> Outcome:
    """Does it once for the event, in its handler: an effect of the operation's name.

    Raises Retry and Reject, as a handler does, and stripe.StripeError for what an operator must mend.
    """
    begun = effect(
        operation.operation,
        given=operation.model_dump(mode="json", exclude={"metadata"}),
        result=Outcome,
        max_age=KEY_AGE,
        again=lambda outcome: outcome.status == NOT_EXECUTED,
    )
    async with begun as payment:
        if payment.result is None:
            payment.result = await account(options).perform(
                operation, payment.idempotency_key, event.id, payment.started_at
            )
    if payment.result.status == NOT_EXECUTED:
        raise Retry("Stripe broke down over it, and nothing of it happened: again, under a fresh key")
    return payment.result


_accounts: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str, float], StripeAccount]] = (
    WeakKeyDictionary()
)
"""By event loop, since connections live in one."""


def account(options: PaymentOptions) -> StripeAccount:
    """The account of these options, with the connections that this event loop has to it."""
    ours = _accounts.setdefault(asyncio.get_running_loop(), {})
    which = (options.api_key.get_secret_value(), options.api_base, options.timeout)
    if which not in ours:
        key, base, timeout = which
        ours[which] = StripeAccount(key, base=base, timeout=timeout)
    return ours[which]
