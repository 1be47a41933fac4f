"""How a payment ended that had no end when it was made: a bank that took days, a customer who confirmed, or did not."""

from typing import Any, Final

import stripe

from bridge.event import Event
from workers.handler import Reject, Result, Retry, handler
from workers.payments.options import PaymentOptions
from workers.payments.outcome import of_intent, of_refund
from workers.payments.stripe_account import EVENT, account_of

_ENDS: Final = (
    "stripe.payment_intent.succeeded",
    "stripe.payment_intent.payment_failed",
    "stripe.payment_intent.canceled",
    "stripe.payment_intent.requires_action",
    "stripe.payment_intent.amount_capturable_updated",
    "stripe.refund.updated",
    "stripe.refund.failed",
)


@handler(*_ENDS, options=PaymentOptions)
async def conclude(event: Event, options: PaymentOptions) -> Result:
    """Returns the outcome, as `pay` does, with the id of the event that asked for the payment in `request`; null where
    none of ours did. Stripe is asked for the object as it is now, since its webhooks come in any order.
    """
    told = event.json()
    try:
        kind, id = told["data"]["object"]["object"], told["data"]["object"]["id"]
    except (KeyError, TypeError):
        raise Reject("payload: is not an event of Stripe's: it has no data.object") from None
    known = account_of(options)
    try:
        match kind:
            case "payment_intent":
                thing = await known.intent(id)
                outcome = of_intent("charge", thing)
            case "refund":
                thing = await known.refund(id)
                outcome = of_refund(thing)
            case _:
                raise Reject(f"payload: data.object is a {kind}, and neither a payment_intent nor a refund")
    except (stripe.RateLimitError, stripe.APIConnectionError) as error:
        raise Retry(f"Stripe did not say how it is now: {error.user_message or type(error).__name__}") from error
    except stripe.InvalidRequestError as error:
        raise Reject(f"Stripe: {error.user_message or 'no message'}") from error
    metadata: dict[str, Any] = thing.get("metadata") or {}
    return {**outcome.model_dump(mode="json"), "request": metadata.get(EVENT)}
