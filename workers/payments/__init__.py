"""Payments with Stripe: an event ``shop.payment.requested`` is charged, captured, cancelled or refunded once.

The payload, where ``?`` marks what may be left out; amounts are integers in the currency's minor unit::

    {"amount": 1999, "currency": "eur", "payment_method": "pm_...", "customer"?: "cus_...", "capture"?: false,
     "description"?: "...", "metadata"?: {...}}
    {"operation": "capture", "payment_intent": "pi_...", "amount"?: 1500}
    {"operation": "cancel", "payment_intent": "pi_...", "reason"?: "abandoned"}
    {"operation": "refund", "payment_intent": "pi_...", "amount"?: 500, "reason"?: "duplicate"}

The reply gets an `Outcome`: what Stripe decided, a declined card too. A handler of one's own calls `perform`.

What `pay` could not find out, ``reconcile.py`` asks Stripe for later. What only ends later, Stripe's webhooks tell:
``listen.py`` makes events of them, and `conclude` outcomes of those.

``stripe_account.py`` tells what an answer of Stripe's means, ``request.py`` and ``outcome.py`` are the payload and the
reply's, and ``fake/`` is a Stripe to test against.
"""

from datetime import timedelta
from typing import Final

from bridge.event import Event
from workers.effects import effect
from workers.handler import Result, Retry, handler
from workers.payments.conclusion import conclude
from workers.payments.options import PaymentOptions
from workers.payments.outcome import NOT_EXECUTED, Outcome
from workers.payments.request import Cancel, Capture, Charge, Operation, Refund, Request
from workers.payments.stripe_account import account_of

__all__ = [
    "KEY_AGE",
    "Cancel",
    "Capture",
    "Charge",
    "Outcome",
    "PaymentOptions",
    "Refund",
    "conclude",
    "pay",
    "perform",
]

KEY_AGE: Final = timedelta(hours=23)
"""After that a key may be unknown to Stripe, which keeps them for 24 hours at least."""


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
            payment.result = await account_of(options).perform(
                operation, payment.idempotency_key, event.id, payment.started_at
            )
    if payment.result.status == NOT_EXECUTED:
        raise Retry("Stripe broke down over it, and nothing of it happened: again, under a fresh key")
    return payment.result
