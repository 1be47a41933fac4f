"""What became of a payment, as the reply gets it."""

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

Name = Literal["charge", "capture", "cancel", "refund"]

NOT_EXECUTED: Final = "not_executed"
"""The status where Stripe broke down over it and nothing of it happened."""


class Outcome(BaseModel):
    """Whatever Stripe has decided, a refusal too: none of these is an error."""

    model_config = ConfigDict(frozen=True)

    operation: Name
    status: str
    """Stripe's, of the PaymentIntent (``succeeded``, ``requires_capture``, ``processing``, ``requires_action``,
    ``requires_payment_method`` after a card was declined, ``canceled``) or of the refund; ``not_executed`` where Stripe
    broke down over it and nothing of it happened."""
    payment_intent: str | None = None
    refund: str | None = None
    amount: int
    """That moved or was reserved, in the currency's minor unit; 0 where none did. Negative for a refund."""
    currency: str | None = None
    code: str | None = None
    """Why not, such as ``card_declined`` or ``authentication_required``; see Stripe's "Error codes"."""
    decline_code: str | None = None
    """What the bank said, such as ``insufficient_funds``."""


def of_intent(
    operation: Name, intent: Mapping[str, Any], code: str | None = None, decline_code: str | None = None
) -> Outcome:
    """`intent` is a PaymentIntent, as JSON has it."""
    reserved, received = intent["amount_capturable"], intent["amount_received"]
    error = intent.get("last_payment_error") or {}
    return Outcome(
        operation=operation,
        status=intent["status"],
        payment_intent=intent["id"],
        amount=received or reserved or 0,
        currency=intent["currency"],
        code=code or error.get("code"),
        decline_code=decline_code or error.get("decline_code"),
    )


def of_refund(refund: Mapping[str, Any]) -> Outcome:
    """`refund` is a refund, as JSON has it."""
    return Outcome(
        operation="refund",
        status=refund["status"],
        payment_intent=refund["payment_intent"],
        refund=refund["id"],
        amount=0 if refund["status"] in ("failed", "canceled") else -refund["amount"],
        currency=refund["currency"],
    )
