"""The payload of ``shop.payment.requested``: what is to be done, and with how much."""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, StringConstraints, model_validator

_MOST: Final = 99_999_999
"""Stripe's largest amount."""

Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,255}$")]
"""Of one of Stripe's objects. It becomes a part of a URL, so it holds nothing else."""

Amount = Annotated[int, Field(strict=True, ge=1, le=_MOST)]
"""In the currency's minor unit: 1999 is 19.99 EUR, 1999 JPY, or 1.999 KWD, of which Stripe wants a multiple of ten."""

Text = Annotated[str, StringConstraints(max_length=500)]

Metadata = Annotated[dict[Annotated[str, StringConstraints(max_length=40)], Text], Field(max_length=40)]
"""Stripe takes fifty entries, of which some are ours."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    metadata: Metadata = {}


class Charge(_Part):
    """Takes money from a payment method that the customer has left with the shop, without the customer."""

    operation: Literal["charge"] = "charge"
    amount: Amount
    currency: Annotated[str, StringConstraints(pattern=r"^[a-z]{3}$")]
    customer: Id | None = None
    payment_method: Id
    capture: bool = True
    """False only reserves the money: `capture` takes it later, `cancel` lets it go."""
    description: Text | None = None

    def parameters(self) -> dict[str, Any]:
        """As Stripe has them."""
        given = {
            "amount": self.amount,
            "currency": self.currency,
            "customer": self.customer,
            "payment_method": self.payment_method,
            "description": self.description,
            "capture_method": "automatic" if self.capture else "manual",
            "confirm": True,
            "off_session": True,
        }
        return {name: value for name, value in given.items() if value is not None}


class Capture(_Part):
    """Takes money that a charge has reserved."""

    operation: Literal["capture"]
    payment_intent: Id
    amount: Amount | None = None
    """Less than what was reserved lets the rest go. None: all."""

    def parameters(self) -> dict[str, Any]:
        """As Stripe has them."""
        return {} if self.amount is None else {"amount_to_capture": self.amount}


class Cancel(_Part):
    """Lets money go that a charge has reserved, or ends one that waits for the customer."""

    operation: Literal["cancel"]
    payment_intent: Id
    reason: Literal["duplicate", "fraudulent", "requested_by_customer", "abandoned"] | None = None

    def parameters(self) -> dict[str, Any]:
        """As Stripe has them."""
        return {} if self.reason is None else {"cancellation_reason": self.reason}


class Refund(_Part):
    """Gives money back."""

    operation: Literal["refund"]
    payment_intent: Id
    amount: Amount | None = None
    """None: all that is left."""
    reason: Literal["duplicate", "fraudulent", "requested_by_customer"] | None = None

    def parameters(self) -> dict[str, Any]:
        """As Stripe has them."""
        given = {"payment_intent": self.payment_intent, "amount": self.amount, "reason": self.reason}
        return {name: value for name, value in given.items() if value is not None}


Operation = Charge | Capture | Cancel | Refund


class Request(RootModel[Annotated[Operation, Field(discriminator="operation")]]):
    """One of the operations; without an `operation` it is a charge."""

    @model_validator(mode="before")
    @classmethod
    def _charge_unless_said(cls, given: Any) -> Any:
        return {"operation": "charge", **given} if isinstance(given, dict) else given
